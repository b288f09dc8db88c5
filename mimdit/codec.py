"""Between pictures and latents: a pixel codec without weights, and diffusers' AutoencoderKL."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor


class PixelCodec(ModelMixin, ConfigMixin):
    """Space-to-depth: pictures [B,3,H,W] in [−1,1] ↔ latents [B,3f²,H/f,W/f], an exact inverse."""

    # Read by `dtype` and `device`, which look for a parameter or buffer.
    anchor: Tensor

    @register_to_config
    def __init__(self, factor: int = 4) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(1))

    def encode(self, pictures: Tensor) -> Tensor:
        return F.pixel_unshuffle(pictures, self.config["factor"])

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, self.config["factor"])


Codec = PixelCodec | AutoencoderKL


def codec_factor(codec: Codec) -> int:
    """Picture pixels per latent pixel, along one side."""
    if isinstance(codec, PixelCodec):
        return codec.config["factor"]
    return 2 ** (len(codec.config["block_out_channels"]) - 1)


def encode(codec: Codec, pictures: Tensor) -> Tensor:
    """Pictures [B,3,H,W] in [−1,1] → scaled latents [B,c,h,w]; the mode, so nothing is random."""
    if isinstance(codec, PixelCodec):
        return codec.encode(pictures)
    with _tiled_if_large(codec, pictures.shape[-2:]):
        latents = codec.encode(pictures.to(codec.dtype)).latent_dist.mode()
    return (latents - (codec.config["shift_factor"] or 0)) * codec.config["scaling_factor"]


def decode(codec: Codec, latents: Tensor) -> Tensor:
    """Inverse of `encode`."""
    if isinstance(codec, PixelCodec):
        return codec.decode(latents)
    latents = latents / codec.config["scaling_factor"] + (codec.config["shift_factor"] or 0)
    # Diffusers declares FloatTensor, which no torch function is typed to return.
    scaled = latents.to(codec.dtype)
    factor = codec_factor(codec)
    with _tiled_if_large(codec, (latents.shape[-2] * factor, latents.shape[-1] * factor)):
        return codec.decode(scaled).sample  # pyright: ignore[reportArgumentType]


@contextmanager
def _tiled_if_large(codec: AutoencoderKL, size: Sequence[int]) -> Iterator[None]:
    """Diffusers' tiling for pictures beyond the size that the codec was trained for.

    Whole, a picture of 2048×2048 would take tens of gigabytes. Overlapping tiles are blended; the
    user's own choice comes back afterwards.
    """
    before = codec.use_tiling
    codec.use_tiling = before or max(size) > codec.tile_sample_min_size
    try:
        yield
    finally:
        codec.use_tiling = before
