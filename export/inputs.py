"""Inputs for comparisons: random ones, and a photograph damaged in several ways."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimdit import flow
from mimdit.codec import codec_factor, encode
from mimdit.inputs import to_tensor
from mimdit.pipeline import MiMDiTPipeline
from mimdit.tiling import reflect_pad

# Of a step's time t, whose reciprocal magnifies the rounding of velocities.
LEAST_TIME = 0.05
# Draws of random latents until pictures of a batch take different experts.
_TRIES = 8
# Contrasts and offsets of random latents, picture by picture: likes would take the same experts.
_KINDS = ((1.0, 0.0), (0.15, -0.8), (0.3, 0.6), (0.6, -0.4))

Size = tuple[int, int, int]


def random_latents(pipe: MiMDiTPipeline, size: Size, generator: torch.Generator) -> Tensor:
    """Uniform latents [B,c,h,w]; the pictures of a batch take different experts where possible."""
    shape = latent_shape(pipe, size)
    scale, offset = torch.tensor([_KINDS[i % len(_KINDS)] for i in range(shape[0])]).T
    tries = 0
    while True:
        noise = torch.rand(shape, generator=generator) * 2 - 1
        channels = torch.rand(shape[:2], generator=generator)[..., None, None] * 0.5 + 0.75
        latents = noise * scale.view(-1, 1, 1, 1) + offset.view(-1, 1, 1, 1) * channels
        index = pipe.transformer.mim.route(pipe.transformer.pool_condition(latents)).index
        tries += 1
        if different(index) == shape[0] or tries == _TRIES:
            return latents


def photograph_latents(pipe: MiMDiTPipeline, size: Size) -> Tensor:
    """The photograph, darkened, with noise and in haze, one picture of a batch each."""
    batch, rows, columns = size
    patch = codec_factor(pipe.vae) * pipe.transformer.config["patch_size"]
    clean = photograph(rows * patch, columns * patch)
    pictures = torch.stack([damage(clean.flip(-1) if i % 2 else clean, i) for i in range(batch)])
    return encode(pipe.vae, pictures * 2 - 1).float()


def step_inputs(
    pipe: MiMDiTPipeline, z_lq: Tensor, generator: torch.Generator
) -> dict[str, Tensor]:
    """Inputs of one step from damaged latents, each picture at a time of its own."""
    batch = len(z_lq)
    text, pooled_text = pipe.transformer.prompt(batch=batch)
    t = LEAST_TIME + torch.rand(batch, generator=generator) * (1 - LEAST_TIME)
    noise = torch.randn(z_lq.shape, generator=generator)
    return {
        "z_lq": z_lq,
        "x_t": flow.interpolate(z_lq, noise, t),
        "timestep": 1000 * t,
        "text": text.detach().float().contiguous(),
        "pooled_text": pooled_text.detach().float().contiguous(),
    }


def latent_shape(pipe: MiMDiTPipeline, size: Size) -> tuple[int, ...]:
    """[B,c,h,w] of a size in tokens."""
    config = pipe.transformer.config
    batch, *tokens = size
    return (batch, config["in_channels"], *(n * config["patch_size"] for n in tokens))


def size_text(size: Sequence[int]) -> str:
    """Batch×rows×columns."""
    return "×".join(map(str, size))


def different(index: Tensor | np.ndarray) -> int:
    """How many pictures of index [L,B,G,k] pick unlike all pictures before them."""
    picks = np.sort(np.asarray(index), axis=-1)
    return len(np.unique(np.moveaxis(picks, 1, 0).reshape(picks.shape[1], -1), axis=0))


def photograph(height: int, width: int) -> Tensor:
    """[3,H,W] in [0,1]: the corner of a photograph, continued by reflection.

    Scikit-image's coffee by Rachel Michetti (CC0), made smaller.
    """
    with Image.open(Path(__file__).with_name("picture.jpg")) as file:
        picture = to_tensor(file)
    whole = reflect_pad(picture, max(height, picture.shape[-2]), max(width, picture.shape[-1]))
    return whole[0, :, :height, :width]


def damage(clean: Tensor, kind: int) -> Tensor:
    """clean [3,H,W] in [0,1] darkened with a little noise, with noise, or in haze."""
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(kind))
    kinds = (0.3 * clean**1.5 + 0.02 * noise, clean + 0.15 * noise, 0.4 * clean + 0.55)
    return kinds[kind % len(kinds)].clamp(0, 1)
