"""Models and pictures to measure with."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mimdit import codec, flow
from mimdit.codec import PixelCodec, codec_factor
from mimdit.engine import plan
from mimdit.loading import PRECISIONS, WEIGHTS, assemble, load_pipeline
from mimdit.metrics import psnr
from mimdit.pipeline import MiMDiTPipeline
from mimdit.presets import PRESETS, build
from training.scenes import procedural

# The shape of SD3.5's own, from its configuration.
_SD35_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "sample_size": 1024,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}


@dataclass(frozen=True)
class Inputs:
    """Of a batch: pixels [B,3,H,W] in [−1,1], latents z and noise x [B,c,h,w] in float32, and one
    step: what the network reads at the times t [B].

    step_bytes: the least that a step of the engine moves, weights and joint buffers.
    """

    pixels: Tensor
    z: Tensor
    x: Tensor
    seen: Tensor
    t: Tensor
    step_bytes: int

    def psnr(self, pipe: MiMDiTPipeline, a: Tensor, b: Tensor) -> float | None:
        """Of latents a to b in dB, of pixels; of latents where the VAE has random weights.

        None where b is not finite, as runs of random weights may end.
        """
        if not b.isfinite().all():
            return None
        if not a.isfinite().all():
            return -999.0
        if isinstance(pipe.vae, PixelCodec):
            a, b = (codec.decode(pipe.vae, v).clamp(-1, 1) / 2 for v in (a, b))
        else:
            span = (b.max() - b.min()).clamp(min=1e-6)
            a, b = a / span, b / span
        # Identical pictures have no error; JSON has no infinity.
        return min(psnr(a, b), 999.0)


def load(name: str, device: str, precision: str) -> MiMDiTPipeline:
    """A trained model by name or folder, or a preset with random weights (and VAE)."""
    if name in PRESETS and not (WEIGHTS / name).is_dir():
        dtype = PRECISIONS[precision]
        with torch.device(device):
            model = build(name, dtype).randomize_(0)
            pixels = model.config["in_channels"] == 48
            vae = None if pixels else cast(Any, AutoencoderKL(**_SD35_VAE)).to(dtype)
        pipe = assemble(model)
        if vae is not None:
            pipe = MiMDiTPipeline(model, vae, FlowMatchEulerDiscreteScheduler())
    else:
        pipe = load_pipeline(name, device, precision)
    for part in (pipe.transformer, pipe.vae):
        part.requires_grad_(False).eval()
    return pipe


def unit_of(pipe: MiMDiTPipeline) -> int:
    """Pixels along a token; sizes of pictures are multiples of it."""
    return codec_factor(pipe.vae) * pipe.transformer.config["patch_size"]


def make_inputs(pipe: MiMDiTPipeline, size: int, batch: int) -> Inputs:
    """Drawn scenes with noise, and half of the way of a sampling run."""
    model = pipe.transformer
    unit = unit_of(pipe)
    if size < 1 or size % unit:
        raise ValueError(f"sizes: expected multiples of {unit} pixels, got {size}")
    device, rng = next(model.parameters()).device, np.random.default_rng(0)
    generator = torch.Generator().manual_seed(0)
    scenes = np.stack([procedural(size, rng) for _ in range(batch)])
    clean = torch.from_numpy(scenes).permute(0, 3, 1, 2)
    noisy = clean + 0.1 * torch.randn(clean.shape, generator=generator)
    pixels = (noisy.clamp(0, 1) * 2 - 1).to(device)
    shape = (batch, model.config["in_channels"], *(size // codec_factor(pipe.vae),) * 2)
    x, random = (torch.randn(shape, generator=generator).to(device) for _ in range(2))
    # A VAE with random weights makes latents of any scale.
    known = isinstance(pipe.vae, PixelCodec)
    z = codec.encode(pipe.vae, pixels).float() if known else random
    t = torch.full((batch,), 500.0, device=device)
    kind, std = model.config["prediction_type"], model.config["damage_std"]
    seen = flow.network_input(kind, x, t / 1000, z, std)
    backbone = sum(
        p.numel() * p.element_size()
        for name, p in model.named_parameters()
        if not name.startswith(("mim.", "prompt_embeds", "pooled_prompt_embeds"))
    )
    return Inputs(pixels, z, x, seen, t, backbone + plan(model, shape).buffers)
