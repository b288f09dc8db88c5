"""`MiMDiTPipeline`: a damaged picture in, a restored one out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.utils import BaseOutput
from torch import Tensor

from mimdit.codec import PixelCodec, codec_factor
from mimdit.grids import GridRun
from mimdit.inputs import Pictures, to_tensor
from mimdit.mim import Routing
from mimdit.options import callback_tensors, check_options, grid_places
from mimdit.outputs import finished
from mimdit.passes import Progress
from mimdit.planning import Fits, PicturePlan, Wish, make_plan
from mimdit.steering import check_experts
from mimdit.text import TEXT_COMPONENTS, branches
from mimdit.transformer import MiMDiTTransformer2DModel

try:
    from diffusers.loaders import SD3LoraLoaderMixin
except ImportError:
    # Diffusers has it only beside transformers, which restoring does without.
    SD3LoraLoaderMixin = object

Callback = Callable[["MiMDiTPipeline", int, Tensor, dict[str, Any]], dict[str, Any]]


@dataclass
class MiMDiTPipelineOutput(BaseOutput):
    """images: as `output_type` says; routing: inter [L,B,G], intra and index [L,B,G,k]."""

    images: Any
    routing: Routing


class MiMDiTPipeline(
    DiffusionPipeline,
    SD3LoraLoaderMixin,  # pyright: ignore[reportGeneralTypeIssues]
):
    """Restores pictures with a MiM-DiT (arXiv 2603.02710).

    Args:
        transformer: the denoiser with its expert mixtures.
        vae: `PixelCodec` or diffusers' `AutoencoderKL`.
        scheduler: flow-matching Euler steps.
        text_encoder … tokenizer_3: those of SD3.5, only for captions.
        default_steps, default_shifts: used when a call names no number of steps.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->text_encoder_3->transformer->vae"
    _optional_components: ClassVar[list[str]] = list(TEXT_COMPONENTS)
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]
    transformer: MiMDiTTransformer2DModel
    vae: PixelCodec | AutoencoderKL
    scheduler: FlowMatchEulerDiscreteScheduler

    def __init__(
        self,
        transformer: MiMDiTTransformer2DModel,
        vae: PixelCodec | AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
        text_encoder: Any = None,
        tokenizer: Any = None,
        text_encoder_2: Any = None,
        tokenizer_2: Any = None,
        text_encoder_3: Any = None,
        tokenizer_3: Any = None,
        default_steps: int = 40,
        default_shifts: int = 1,
    ) -> None:
        super().__init__()
        self.register_modules(
            transformer=transformer,
            vae=vae,
            scheduler=scheduler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            text_encoder_3=text_encoder_3,
            tokenizer_3=tokenizer_3,
        )
        self.register_to_config(default_steps=default_steps, default_shifts=default_shifts)
        self._fits = Fits()

    # The base class's other parameters pass through `kwargs`.
    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | Path, **kwargs: Any
    ) -> None:
        """Write a folder that `from_pretrained` reads; always safetensors."""
        if not kwargs.setdefault("safe_serialization", True):
            raise ValueError("safe_serialization: expected True, weights are stored as safetensors")
        super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def download(cls, pretrained_model_name: str, **kwargs: Any) -> str:
        """Fetch a model from the hub; returns its folder.

        Diffusers' own version takes components outside diffusers for code inside the repository.
        """
        from huggingface_hub import snapshot_download

        known = ("cache_dir", "force_download", "local_files_only", "token", "revision")
        return snapshot_download(
            pretrained_model_name,
            allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"],
            **{name: kwargs[name] for name in known if kwargs.get(name) is not None},
        )

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        num_inference_steps: int | None = None,
        shifts: int | None = None,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        guidance_scale: float = 1.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        strength: float = 1.0,
        color_fix: str = "none",
        tile: int = 0,
        tile_overlap: int = 64,
        tile_batch: int | None = None,
        routing: str = "picture",
        experts: Mapping[str, float] | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        progress: Progress | None = None,
    ) -> MiMDiTPipelineOutput | tuple[Any, Routing]:
        """Restore one picture or a batch of equal size.

        Args:
            image: PIL, numpy [H,W,3] or [B,H,W,3] (floats in [0,1], uint8 or uint16), torch [3,H,W]
                or [B,3,H,W] in [0,1], or a list of pictures.
            num_inference_steps, shifts: by default what the model recommends; shifts is 1 where
                only the steps are named.
            shifts: 1, 2 or 4 grids of patches, shifted by parts of one. The picture is restored on
                each and the results are averaged (cycle spinning; Coifman and Donoho, 1995), so
                that edges of patches vanish; the time multiplies. Latents come from one grid.
            prompt, negative_prompt: captions, where the pipeline has text encoders; by default the
                stored embeddings.
            guidance_scale: other than 1 runs both prompts, which must differ.
            strength: 0 gives the damaged picture back, 1 the restored one, between them a blend.
            color_fix: "none", "adain" or "wavelet".
            tile, tile_overlap: in pixels; 0 takes as few tiles of at most the trained size as cover
                the picture, or smaller ones where free memory does not hold them.
            tile_batch: tiles a forward pass; None or 0 takes what free memory holds.
            routing: "picture" chooses the experts once, from the whole picture; "tile" for each
                tile. The output's routing then lists the B pictures of every tile, tile by tile.
            experts: weights of groups by name, such as {"spatial": 0.5}, instead of the router's;
                the others are scaled so that the sum stays 1.
            output_type: "pil", "np" [B,H,W,3], "pt" [B,3,H,W] or "latent".
            callback_on_step_end, callback_on_step_end_tensor_inputs: as in diffusers; there are
                "latents", those of the grid at work.
            progress: called after every forward pass with the passes done and all of them; what it
                raises ends the call. The passes are more where memory runs out.

        Raises:
            ValueError: an argument out of range, or a result that is not finite.
        """
        steps, shifts = self._steps(num_inference_steps, shifts)
        check_options(
            steps, shifts, strength, color_fix, tile, tile_overlap, tile_batch, routing, output_type
        )
        check_experts(self.transformer.mim.groups, experts or {})
        asked = callback_on_step_end_tensor_inputs
        named = callback_tensors(callback_on_step_end, asked, self._callback_tensor_inputs)
        damaged = to_tensor(image)
        texts = (prompt, negative_prompt)
        device = self._execution_device
        prompts = branches(self.transformer, self.components, texts, guidance_scale, device)
        wish = Wish(steps, shifts, tile, tile_overlap, tile_batch or 0)

        def step_end(i: int, t: Tensor, latents: Tensor) -> Tensor:
            if callback_on_step_end is None:
                return latents
            state = dict.fromkeys(named, latents)
            return callback_on_step_end(self, i, t, state).pop("latents", latents)

        # A decorator of diffusers hides the signature.
        with self.progress_bar(total=0) as bar:  # pyright: ignore[reportCallIssue]
            run = GridRun(
                model=self.transformer,
                codec=self.vae,
                scheduler=self.scheduler,
                device=device,
                plan=lambda size: self._plan(size, len(damaged), wish),
                replan=lambda failed, reduced: self._replan(failed, wish, reduced),
                release=self._release,
                prompts=prompts,
                guidance_scale=guidance_scale,
                shared=routing == "picture",
                experts=experts or {},
                steps=steps,
                generator=generator,
                step_end=step_end,
                bar=bar,
                progress=progress,
            )
            if output_type == "latent":
                images, taken = run.latents(damaged)
            else:
                images, taken = run.restore(damaged, grid_places(shifts, self._patch()))
        if output_type != "latent":
            refusal = "the result is not finite; use fp32 precision, or another checkpoint"
            images = finished(images, damaged, strength, color_fix, output_type, refusal)
        self.maybe_free_model_hooks()
        return MiMDiTPipelineOutput(images, taken) if return_dict else (images, taken)

    def plan(
        self,
        height: int,
        width: int,
        pictures: int = 1,
        num_inference_steps: int | None = None,
        shifts: int | None = None,
        tile: int = 0,
        tile_overlap: int = 64,
        tile_batch: int | None = None,
    ) -> PicturePlan:
        """What pictures of this size will take: tiles, passes, memory. Nothing is run; print it.

        The arguments are those of a call. Raises ValueError for one that is out of range.
        """
        steps, shifts = self._steps(num_inference_steps, shifts)
        check_options(steps, shifts, 1, "none", tile, tile_overlap, tile_batch, "picture", "pil")
        if min(height, width, pictures) < 1:
            raise ValueError(
                f"height, width, pictures: expected at least 1, got {height}, {width}, {pictures}"
            )
        wish = Wish(steps, shifts, tile, tile_overlap, tile_batch or 0)
        return self._plan((height, width), pictures, wish)

    def _steps(self, steps: int | None, shifts: int | None) -> tuple[int, int]:
        """Steps and grids of a call, of which either may be left to the model."""
        if steps is None:
            shifts = self.config["default_shifts"] if shifts is None else shifts
            steps = int(self.config["default_steps"])
        return steps, 1 if shifts is None else shifts

    def _plan(
        self,
        size: tuple[int, int],
        pictures: int,
        wish: Wish,
        reduced: tuple[int, int] | None = None,
    ) -> PicturePlan:
        return make_plan(
            self.transformer,
            self.vae,
            self._execution_device,
            size,
            pictures,
            wish,
            self._fits,
            reduced,
            self._release,
        )

    def _replan(self, failed: PicturePlan, wish: Wish, reduced: tuple[int, int]) -> PicturePlan:
        self._fits.ran_out(failed)
        return self._plan(failed.size, failed.pictures, wish, reduced)

    def _release(self) -> None:
        """Give back what an engine keeps for later calls."""
        if self.transformer.engine is not None:
            self.transformer.engine.release()

    def _patch(self) -> int:
        """Pixels along one side of a token."""
        return codec_factor(self.vae) * self.transformer.config["patch_size"]


# Diffusers looks pipelines up by name in its own namespace: `DiffusionPipeline.from_pretrained`
# opens our folders too, once this module is imported.
diffusers.MiMDiTPipeline = MiMDiTPipeline
