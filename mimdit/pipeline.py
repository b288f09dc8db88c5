"""`MiMDiTPipeline`: a damaged picture in, a restored one out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from mimdit.codec import PixelCodec, codec_factor, decode, encode
from mimdit.color import COLOR_FIXES, color_fix
from mimdit.mim import Routing
from mimdit.tiling import Tiling, plan_tiles, reflect_pad
from mimdit.transformer import Condition, MiMDiTTransformer2DModel

Pictures = Image.Image | np.ndarray | Tensor | Sequence[Image.Image] | Sequence[np.ndarray]
Callback = Callable[["MiMDiTPipeline", int, Tensor, dict[str, Any]], dict[str, Any]]

# Smaller pictures are padded up to this many tokens a side: no model saw such small grids.
_MIN_TOKENS = 16
# Conditioning tokens beyond this many bytes are computed anew in every step instead of kept.
_CONDITION_BYTES = 2**30
# Folders of trained models that come with the package.
WEIGHTS = Path(__file__).parent / "weights"


@dataclass
class MiMDiTPipelineOutput(BaseOutput):
    """images: as `output_type` says; routing: inter [L,B,G], intra and index [L,B,G,k]."""

    images: Any
    routing: Routing


class MiMDiTPipeline(DiffusionPipeline):
    """Restores pictures with a MiM-DiT (arXiv 2603.02710).

    Args:
        transformer: the denoiser with its expert mixtures.
        vae: `PixelCodec` or diffusers' `AutoencoderKL`.
        scheduler: flow-matching Euler steps.
        default_steps: used when a call names no number of steps.
    """

    model_cpu_offload_seq = "transformer->vae"
    transformer: MiMDiTTransformer2DModel
    vae: PixelCodec | AutoencoderKL
    scheduler: FlowMatchEulerDiscreteScheduler

    def __init__(
        self,
        transformer: MiMDiTTransformer2DModel,
        vae: PixelCodec | AutoencoderKL,
        scheduler: FlowMatchEulerDiscreteScheduler,
        default_steps: int = 40,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
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
            guidance_scale: other than 1 needs stored "positive" and "negative" prompts.
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
        prompts = self._prompts(guidance_scale, len(damaged))

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
                    encoder_hidden_states=text.repeat(len(x) // len(z_lq), 1, 1),
                    pooled_projections=pooled.repeat(len(x) // len(z_lq), 1),
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

    def _prompts(self, scale: float, batch: int) -> list[tuple[Tensor, Tensor]]:
        """Text of the one branch, or of the positive and the negative one."""
        model = self.transformer
        if scale == 1:
            return [model.prompt(None, batch)]
        if not {"positive", "negative"} <= set(model.config["prompts"]):
            raise ValueError(
                "guidance_scale: expected 1, as this model stores no positive and negative prompt; "
                f"got {scale:g}"
            )
        positive, negative = model.prompt("positive", batch), model.prompt("negative", batch)
        if all(torch.equal(p, n) for p, n in zip(positive, negative, strict=True)):
            raise ValueError(
                "guidance_scale: expected 1, as the stored positive and negative prompts are "
                f"equal; got {scale:g}"
            )
        return [positive, negative]


def to_tensor(image: Pictures) -> Tensor:
    """Pictures of any accepted kind as float32 [B,3,H,W] in [0,1] on the CPU."""
    if isinstance(image, (list, tuple)):
        parts = [to_tensor(part) for part in image]
        sizes = {tuple(p.shape[-2:]) for p in parts}
        if len(sizes) != 1:
            found = ", ".join(f"{h}×{w}" for h, w in sorted(sizes)) or "none"
            raise ValueError(f"image: expected pictures of one size in a batch, got {found}")
        return torch.cat(parts)
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if isinstance(image, np.ndarray):
        scale = 255 if image.dtype == np.uint8 else 1
        image = torch.from_numpy(np.array(image, dtype=np.float32) / scale)
        image = image.movedim(-1, -3) if image.ndim in (3, 4) else image
    if not isinstance(image, Tensor):
        raise ValueError(f"image: expected PIL, numpy or torch, got {type(image).__name__}")
    pictures = image.detach().float().cpu()
    pictures = pictures[None] if pictures.ndim == 3 else pictures
    if pictures.ndim != 4 or pictures.shape[1] != 3 or 0 in pictures.shape:
        raise ValueError(f"image: expected three colour channels, got shape {tuple(image.shape)}")
    if not torch.isfinite(pictures).all():
        raise ValueError("image: expected finite values, got NaN or infinity")
    if pictures.min() < -1e-3 or pictures.max() > 1 + 1e-3:
        span = f"{pictures.min():.3g} to {pictures.max():.3g}"
        raise ValueError(f"image: expected values in [0, 1], got {span}")
    return pictures.clamp(0, 1)


def assemble(transformer: MiMDiTTransformer2DModel, default_steps: int = 40) -> MiMDiTPipeline:
    """A pipeline around a pixel-codec transformer."""
    codec = PixelCodec(factor=int((transformer.config["in_channels"] // 3) ** 0.5))
    return MiMDiTPipeline(transformer, codec, FlowMatchEulerDiscreteScheduler(), default_steps)


def load_pipeline(model: str, device: str = "cpu", precision: str | None = None) -> MiMDiTPipeline:
    """A pipeline by the name of a shipped model, by folder, or by hub id.

    precision: "fp32" (default), "bf16" or "fp16". Raises ValueError or OSError in one sentence.
    """
    dtypes = {
        None: torch.float32,
        "fp32": torch.float32,
        "bf16": torch.bfloat16,
        "fp16": torch.float16,
    }
    if precision not in dtypes:
        raise ValueError(f"precision: expected bf16, fp16 or fp32, got {precision!r}")
    shipped = {p.name for p in WEIGHTS.iterdir() if p.is_dir()} if WEIGHTS.is_dir() else set()
    folder = str(WEIGHTS / model) if model in shipped else model
    if model not in shipped and not Path(model).is_dir() and model.count("/") != 1:
        names = ", ".join([*sorted(shipped), "a folder", "or a hub id"])
        raise ValueError(f"no such model folder; expected {names}")
    if Path(folder).is_dir() and not (Path(folder) / "model_index.json").is_file():
        raise ValueError("not a model folder, it has no model_index.json")
    options: dict[str, Any] = {"dtype": dtypes[precision], "use_safetensors": True}
    # With `output_loading_info` diffusers returns a pair, which its annotation leaves out.
    transformer, info = MiMDiTTransformer2DModel.from_pretrained(  # pyright: ignore[reportGeneralTypeIssues]
        folder, subfolder="transformer", output_loading_info=True, **options
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        wrong = sorted({*info["missing_keys"], *info["unexpected_keys"]})
        raise ValueError(
            f"not the weights of this model: {len(wrong)} tensors differ ({wrong[0]}, …)"
        )
    pipe = MiMDiTPipeline.from_pretrained(folder, transformer=transformer, **options)
    return pipe.to(device)


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
