"""`MiMDiTPipeline`: a damaged picture in, a restored one out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mimdit.codec import PixelCodec, codec_factor, decode, encode
from mimdit.color import color_fix
from mimdit.inputs import Pictures, to_tensor
from mimdit.memory import shrinking
from mimdit.mim import Routing
from mimdit.options import check_options
from mimdit.sampling import Denoiser, grid_places
from mimdit.text import TEXT_COMPONENTS, encode_text
from mimdit.tiling import Tiling, plan_tiles, reflect_pad
from mimdit.transformer import MiMDiTTransformer2DModel

try:
    from diffusers.loaders import SD3LoraLoaderMixin
except ImportError:
    # Diffusers has it only beside transformers, which restoring does without.
    SD3LoraLoaderMixin = object

Callback = Callable[["MiMDiTPipeline", int, Tensor, dict[str, Any]], dict[str, Any]]

# Smaller pictures are padded up to this many tokens a side: no model saw such small grids.
_MIN_TOKENS = 16
# Tokens along a tile that is tried at last where memory is short.
_LEAST_TILE = 8


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
        tile_batch: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> MiMDiTPipelineOutput | tuple[Any, Routing]:
        """Restore one picture or a batch of equal size.

        Args:
            image: PIL, numpy [H,W,3] or [B,H,W,3], torch [3,H,W] or [B,3,H,W] (in [0,1]; uint8
                numpy in [0,255]), or a list of pictures.
            num_inference_steps, shifts: by default what the model recommends; shifts is 1 where
                only the steps are named.
            shifts: 1, 2 or 4 grids of patches, half a patch apart. The picture is restored on each
                and the results are averaged (cycle spinning; Coifman and Donoho, 1995), so that
                edges of patches vanish; the time multiplies. Latents come from one grid.
            prompt, negative_prompt: captions, where the pipeline has text encoders; by default the
                stored embeddings.
            guidance_scale: other than 1 runs both prompts, which must differ.
            strength: 0 gives the damaged picture back, 1 the restored one, between them a blend.
            color_fix: "none", "adain" or "wavelet".
            tile, tile_overlap: in pixels; 0 takes the size that the model was trained for.
            tile_batch: tiles a forward pass.
            output_type: "pil", "np" [B,H,W,3], "pt" [B,3,H,W] or "latent".

        Raises:
            ValueError: an argument out of range, or a result that is not finite.
        """
        steps = self.config["default_steps"] if num_inference_steps is None else num_inference_steps
        if num_inference_steps is None and shifts is None:
            shifts = self.config["default_shifts"]
        shifts = 1 if shifts is None or output_type == "latent" else shifts
        check_options(steps, shifts, strength, color_fix, tile, tile_batch, output_type)
        damaged = to_tensor(image)
        height, width = damaged.shape[-2:]
        prompts = self._prompts(guidance_scale, prompt, negative_prompt)
        places = grid_places(shifts, self._patch())
        images: Any = torch.zeros_like(damaged)
        # A decorator of diffusers hides the signature.
        with self.progress_bar(total=steps * shifts) as bar:  # pyright: ignore[reportCallIssue]

            def step_end(i: int, t: Tensor, latents: Tensor) -> Tensor:
                bar.update()
                if callback_on_step_end is None:
                    return latents
                named = {"latents": latents}
                state = {k: named[k] for k in callback_on_step_end_tensor_inputs}
                return callback_on_step_end(self, i, t, state).pop("latents", latents)

            routing = None
            for top, left in places:
                moved = reflect_pad(damaged.flip(-2, -1), height + top, width + left).flip(-2, -1)
                z_lq = self._encode(moved)
                noise = randn_tensor(
                    z_lq.shape, generator=generator, device=z_lq.device, dtype=z_lq.dtype
                )

                def restore(
                    side: int, batch: int, z_lq: Tensor = z_lq, noise: Tensor = noise
                ) -> tuple[Tensor, Routing]:
                    plane = (z_lq.shape[-2], z_lq.shape[-1])
                    tiling = self._tiling(plane, side, tile_overlap, asked=side == tile > 0)
                    denoiser = Denoiser(
                        self.transformer, z_lq, tiling, prompts, guidance_scale, batch
                    )
                    return self._sample(denoiser, noise, steps, step_end), denoiser.routing

                latents, taken = self._within_memory(restore, tile, tile_batch)
                routing = taken if routing is None else routing
                if output_type == "latent":
                    images = latents
                else:
                    pixels = decode(self.vae, latents).float().cpu() / 2 + 0.5
                    images += pixels[..., top : top + height, left : left + width] / shifts
        if output_type != "latent":
            images = self._finish(images, damaged, strength, color_fix, output_type)
        self.maybe_free_model_hooks()
        assert routing is not None
        return MiMDiTPipelineOutput(images, routing) if return_dict else (images, routing)

    def _within_memory(
        self, restore: Callable[[int, int], tuple[Tensor, Routing]], tile: int, batch: int
    ) -> tuple[Tensor, Routing]:
        """`restore(tile, batch)`, with less of both where memory runs out."""
        engine, side = (
            self.transformer.engine,
            self._patch() // self.transformer.config["patch_size"],
        )
        whole = tile or self.transformer.config["sample_size"] * side
        smallest = min(whole, _LEAST_TILE * self._patch())
        release = engine.release if engine is not None else lambda: None
        return shrinking(
            lambda wanted, count: restore(tile if wanted == whole else wanted, count),
            whole,
            batch,
            smallest,
            release,
        )

    def _patch(self) -> int:
        """Pixels along one side of a token."""
        return codec_factor(self.vae) * self.transformer.config["patch_size"]

    def _encode(self, damaged: Tensor) -> Tensor:
        """Latents of pictures padded to whole patches."""
        patch = self._patch()
        padded = [max(-(-n // patch), _MIN_TOKENS) * patch for n in damaged.shape[-2:]]
        pictures = reflect_pad(damaged, *padded).to(self._execution_device)
        return encode(self.vae, pictures * 2 - 1).float()

    def _sample(
        self,
        denoiser: Denoiser,
        latents: Tensor,
        steps: int,
        step_end: Callable[[int, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Latents after all steps from noise."""
        self.scheduler.set_timesteps(steps, device=latents.device)
        timesteps = cast(Tensor, self.scheduler.timesteps)
        with denoiser.steps(timesteps):
            for i, t in enumerate(timesteps):
                # Diffusers declares FloatTensor, which no torch function is typed to return.
                latents = self.scheduler.step(
                    denoiser(latents, t),  # pyright: ignore[reportArgumentType]
                    t,  # pyright: ignore[reportArgumentType]
                    latents,  # pyright: ignore[reportArgumentType]
                    return_dict=False,
                )[0]
                latents = step_end(i, t, latents)
        return latents

    def _finish(
        self, restored: Tensor, damaged: Tensor, strength: float, fix: str, output_type: str
    ) -> Any:
        if not torch.isfinite(restored).all():
            raise ValueError("the result is not finite; use fp32 precision, or another checkpoint")
        restored = color_fix(fix, restored, damaged)
        restored = torch.lerp(damaged, restored, strength).clamp(0, 1)
        return VaeImageProcessor(do_normalize=False).postprocess(restored, output_type=output_type)

    def _tiling(self, plane: tuple[int, int], tile: int, overlap: int, asked: bool) -> Tiling:
        """Tiles of a latent plane; tile and overlap in pixels, asked: by the caller, not chosen."""
        config, factor = self.transformer.config, codec_factor(self.vae)
        patch = config["patch_size"]
        largest = config["pos_embed_max_size"] * patch
        size = config["sample_size"] if tile == 0 else tile // (factor * patch) * patch
        if not 0 < size <= largest:
            low, high = factor * patch, factor * largest
            raise ValueError(f"tile: expected 0 or {low} to {high} pixels, got {tile}")
        # A chosen tile keeps the asked overlap only where it is smaller than the tile.
        wanted = overlap // factor if asked else min(overlap // factor, size // 2)
        return plan_tiles(plane, size, wanted, patch)

    def _prompts(
        self, scale: float, prompt: str | None, negative: str | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Text of the one branch, or of the positive and the negative one."""
        if scale == 1:
            return [self._prompt("prompt", "empty", prompt)]
        branches = [
            self._prompt("prompt", "positive", prompt),
            self._prompt("negative_prompt", "negative", negative),
        ]
        if all(
            torch.equal(p.float().cpu(), n.float().cpu()) for p, n in zip(*branches, strict=True)
        ):
            raise ValueError(
                "guidance_scale: expected 1, as the positive and the negative prompt are equal; "
                f"got {scale:g}"
            )
        return branches

    def _prompt(self, argument: str, name: str, text: str | None) -> tuple[Tensor, Tensor]:
        """Embeddings [1,T,C] and [1,P] of a caption, or else the stored ones of this name."""
        model = self.transformer
        if text is not None:
            if not isinstance(text, str):
                raise ValueError(f"{argument}: expected one text for all pictures, got {text!r}")
            if self.text_encoder is None:
                raise ValueError(f"{argument}: expected none, this pipeline has no text encoders")
            parts = {key: getattr(self, key) for key in TEXT_COMPONENTS}
            return encode_text(parts, model, [text], self._execution_device)
        if name != "empty" and name not in model.config["prompts"]:
            raise ValueError(
                f"guidance_scale: expected 1, as this model stores no {name} prompt; "
                f"give it a {argument}, or leave guidance off"
            )
        return model.prompt(None if name == "empty" else name)


# Diffusers looks pipelines up by name in its own namespace: `DiffusionPipeline.from_pretrained`
# opens our folders too, once this module is imported.
diffusers.MiMDiTPipeline = MiMDiTPipeline
