"""`MiMDiTPipeline`: a damaged picture in, a restored one out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import diffusers
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import SD3LoraLoaderMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mimdit.codec import PixelCodec, codec_factor, decode, encode
from mimdit.color import COLOR_FIXES, color_fix
from mimdit.inputs import Pictures, to_tensor
from mimdit.mim import Routing
from mimdit.text import TEXT_COMPONENTS, encode_text
from mimdit.tiling import Tiling, plan_tiles, reflect_pad
from mimdit.transformer import Condition, MiMDiTTransformer2DModel

Callback = Callable[["MiMDiTPipeline", int, Tensor, dict[str, Any]], dict[str, Any]]

# Smaller pictures are padded up to this many tokens a side: no model saw such small grids.
_MIN_TOKENS = 16
# Conditioning tokens beyond this many bytes are computed anew in every step instead of kept.
_CONDITION_BYTES = 2**30


@dataclass
class MiMDiTPipelineOutput(BaseOutput):
    """images: as `output_type` says; routing: inter [L,B,G], intra and index [L,B,G,k]."""

    images: Any
    routing: Routing


class MiMDiTPipeline(DiffusionPipeline, SD3LoraLoaderMixin):
    """Restores pictures with a MiM-DiT (arXiv 2603.02710).

    Args:
        transformer: the denoiser with its expert mixtures.
        vae: `PixelCodec` or diffusers' `AutoencoderKL`.
        scheduler: flow-matching Euler steps.
        text_encoder … tokenizer_3: those of SD3.5, only for captions.
        default_steps: used when a call names no number of steps.
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
        self.register_to_config(default_steps=default_steps)

    # The base class's other parameters pass through `kwargs`.
    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, save_directory: str | Path, **kwargs: Any
    ) -> None:
        """Write a folder that `from_pretrained` reads; always safetensors."""
        if not kwargs.setdefault("safe_serialization", True):
            raise ValueError("safe_serialization: expected True, weights are stored as safetensors")
        super().save_pretrained(save_directory, **kwargs)

    @torch.no_grad()
    def __call__(
        self,
        image: Pictures,
        num_inference_steps: int | None = None,
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
        _check(steps, strength, color_fix, tile, tile_batch, output_type)
        damaged = to_tensor(image)
        height, width = damaged.shape[-2:]
        model, device = self.transformer, self._execution_device
        prompts = self._prompts(guidance_scale, prompt, negative_prompt)

        factor, patch = codec_factor(self.vae), model.config["patch_size"]
        step_px = factor * patch
        padded = [max(-(-n // step_px), _MIN_TOKENS) * step_px for n in (height, width)]
        z_lq = encode(self.vae, reflect_pad(damaged, *padded).to(device) * 2 - 1).float()
        tiling = self._tiling((z_lq.shape[-2], z_lq.shape[-1]), tile, tile_overlap)
        routing = self._route(z_lq, tiling, tile_batch)
        keep = _condition_bytes(model, tiling, len(z_lq)) <= _CONDITION_BYTES
        kept: dict[int, Condition] = {}

        def condition_of(tiles: slice) -> Condition:
            if tiles.start in kept:
                return kept[tiles.start]
            cut = tiling.cut(z_lq, tiles).to(model.dtype)
            found = model.encode_condition(cut, routing.repeat(len(cut) // len(z_lq)))
            if keep:
                kept[tiles.start] = found
            return found

        def velocity(tiles: slice) -> Tensor:
            x = tiling.cut(latents, tiles).to(model.dtype)
            condition, time = condition_of(tiles), t.expand(len(x)).to(device)
            parts = [
                model(
                    x,
                    time,
                    condition,
                    encoder_hidden_states=text.to(x).expand(len(x), -1, -1),
                    pooled_projections=pooled.to(x).expand(len(x), -1),
                    return_dict=False,
                )[0].float()
                for text, pooled in prompts
            ]
            if len(parts) == 1:
                return parts[0]
            return parts[1] + guidance_scale * (parts[0] - parts[1])

        latents = randn_tensor(z_lq.shape, generator=generator, device=device, dtype=z_lq.dtype)
        self.scheduler.set_timesteps(steps, device=device)
        timesteps = cast(Tensor, self.scheduler.timesteps)
        # A decorator of diffusers hides the signature.
        with self.progress_bar(total=len(timesteps)) as bar:  # pyright: ignore[reportCallIssue]
            for i, t in enumerate(timesteps):
                v = tiling.blend(velocity, latents, tile_batch)
                # Diffusers declares FloatTensor, which no torch function is typed to return.
                latents = self.scheduler.step(
                    v,  # pyright: ignore[reportArgumentType]
                    t,  # pyright: ignore[reportArgumentType]
                    latents,  # pyright: ignore[reportArgumentType]
                    return_dict=False,
                )[0]
                if callback_on_step_end is not None:
                    named = {"latents": latents}
                    state = {k: named[k] for k in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, i, t, state).pop("latents", latents)
                bar.update()

        images = latents
        if output_type != "latent":
            images = self._finish(latents, damaged, strength, color_fix, output_type)
        self.maybe_free_model_hooks()
        return MiMDiTPipelineOutput(images, routing) if return_dict else (images, routing)

    def _finish(
        self, latents: Tensor, damaged: Tensor, strength: float, fix: str, output_type: str
    ) -> Any:
        height, width = damaged.shape[-2:]
        restored = decode(self.vae, latents).float().cpu()[..., :height, :width] / 2 + 0.5
        if not torch.isfinite(restored).all():
            raise ValueError("the result is not finite; use fp32 precision, or another checkpoint")
        restored = color_fix(fix, restored, damaged)
        restored = torch.lerp(damaged, restored, strength).clamp(0, 1)
        return VaeImageProcessor(do_normalize=False).postprocess(restored, output_type=output_type)

    def _tiling(self, plane: tuple[int, int], tile: int, overlap: int) -> Tiling:
        config, factor = self.transformer.config, codec_factor(self.vae)
        patch = config["patch_size"]
        largest = config["pos_embed_max_size"] * patch
        size = config["sample_size"] if tile == 0 else tile // (factor * patch) * patch
        if not 0 < size <= largest:
            low, high = factor * patch, factor * largest
            raise ValueError(f"tile: expected 0 or {low} to {high} pixels, got {tile}")
        # The automatic tile keeps the asked overlap only where it is smaller than the tile.
        wanted = overlap // factor if tile else min(overlap // factor, size // 2)
        return plan_tiles(plane, size, wanted, patch)

    def _route(self, z_lq: Tensor, tiling: Tiling, batch: int) -> Routing:
        """One routing for the whole picture, so that its tiles never disagree."""
        model, count = self.transformer, len(tiling.corners)
        total = torch.zeros(())
        for tiles in tiling.chunks(batch):
            pooled = model.pool_condition(tiling.cut(z_lq, tiles).to(model.dtype))
            total = total.to(pooled.device) + pooled.unflatten(1, (-1, len(z_lq))).sum(1)
        return model.mim.route(total / count)

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
        if all(torch.equal(p, n) for p, n in zip(*branches, strict=True)):
            raise ValueError(
                "guidance_scale: expected 1, as the positive and the negative prompt are equal; "
                f"got {scale:g}"
            )
        return branches

    def _prompt(self, argument: str, name: str, text: str | None) -> tuple[Tensor, Tensor]:
        """Embeddings [1,T,C] and [1,P] of a caption, or else the stored ones of this name."""
        model = self.transformer
        if text is not None:
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


def _condition_bytes(model: MiMDiTTransformer2DModel, tiling: Tiling, batch: int) -> int:
    tokens = tiling.size[0] * tiling.size[1] // model.config["patch_size"] ** 2
    elements = batch * len(tiling.corners) * tokens * model.inner_dim * model.mim.layers
    return elements * model.dtype.itemsize


def _check(
    steps: int, strength: float, fix: str, tile: int, tile_batch: int, output_type: str
) -> None:
    if steps < 1:
        raise ValueError(f"num_inference_steps: expected at least 1, got {steps}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: expected 0 to 1, got {strength:g}")
    if tile < 0:
        raise ValueError(f"tile: expected 0 (automatic) or pixels, got {tile}")
    if tile_batch < 1:
        raise ValueError(f"tile_batch: expected at least 1, got {tile_batch}")
    if fix not in COLOR_FIXES:
        raise ValueError(f"color_fix: expected one of {', '.join(COLOR_FIXES)}, got {fix!r}")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type: expected pil, np, pt or latent, got {output_type!r}")
