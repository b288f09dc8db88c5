"""Pictures of any size through a codec: in bands or blended tiles, never the whole on a device."""

from collections.abc import Callable

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from mimdit.codec import Codec, PixelCodec, codec_factor, decode, encode
from mimdit.memory import shrinking
from mimdit.tiling import Tiling, codec_tiles

# Pixels along the smallest tile that is tried.
LEAST_CODEC_TILE = 128
# Rows of a picture that the pixel codec takes at once.
_ROWS = 512


def codec_tile(codec: Codec) -> int:
    """Pixels along a tile of a codec, the size that it was trained for; 0 for the pixel codec."""
    return 0 if isinstance(codec, PixelCodec) else int(codec.tile_sample_min_size)


def codec_bytes(codec: Codec, tile: int) -> int:
    """An estimate of what decoding one tile of so many pixels a side holds at once."""
    if isinstance(codec, PixelCodec):
        return 0
    # At full resolution: the widest input, its normalised copy, and two outputs half as wide.
    widths = codec.config["block_out_channels"]
    return 3 * max(widths[:2]) * tile**2 * codec.dtype.itemsize


def encode_tiles(
    codec: Codec,
    pictures: Tensor,
    tile: int,
    device: torch.device,
    home: torch.device,
    release: Callable[[], None] = lambda: None,
) -> Tensor:
    """Pictures [B,3,H,W] in [0,1] on the CPU → float32 latents [B,c,h,w] on `home`.

    tile: pixels, of an AutoencoderKL; less where memory runs out (`release` gives some back).
    device: where the codec computes.
    """
    if isinstance(codec, PixelCodec):
        bands = pictures.split(_band(codec), dim=-2)
        factor, (b, c, h, w) = codec.config["factor"], pictures.shape
        out = torch.empty(b, c * factor**2, h // factor, w // factor, device=home)
        for place, band in zip(out.split(_band(codec) // factor, dim=-2), bands, strict=True):
            place.copy_(codec.encode(band * 2 - 1))
        return out

    def blended(tile: int, _: int) -> Tensor:
        latents, pixels = _tilings(codec, (pictures.shape[-2], pictures.shape[-1]), tile)
        channels = codec.config["latent_channels"]
        like = torch.empty(1, device=home).expand(len(pictures), channels, *latents.plane)

        def run(tiles: slice) -> Tensor:
            return encode(codec, pixels.cut(pictures, tiles, device) * 2 - 1).float()

        return latents.blend(run, like, 1)

    return shrinking(blended, tile, 1, LEAST_CODEC_TILE, release)


def decode_tiles(
    codec: Codec,
    latents: Tensor,
    tile: int,
    device: torch.device,
    release: Callable[[], None] = lambda: None,
) -> Tensor:
    """Inverse of `encode_tiles`: float32 pictures [B,3,H,W] on the CPU, 1 white but not clipped."""
    factor = codec_factor(codec)
    size = (latents.shape[-2] * factor, latents.shape[-1] * factor)
    if isinstance(codec, PixelCodec):
        out = torch.empty(len(latents), latents.shape[1] // factor**2, *size)
        bands = latents.split(_band(codec) // factor, dim=-2)
        for place, band in zip(out.split(_band(codec), dim=-2), bands, strict=True):
            place.copy_(codec.decode(band.float().cpu()) / 2 + 0.5)
        return out

    def blended(tile: int, _: int) -> Tensor:
        coarse, fine = _tilings(codec, size, tile)
        like = torch.empty(1).expand(len(latents), codec.config["out_channels"], *size)

        def run(tiles: slice) -> Tensor:
            return decode(codec, coarse.cut(latents, tiles, device)).float() / 2 + 0.5

        return fine.blend(run, like, 1)

    return shrinking(blended, tile, 1, LEAST_CODEC_TILE, release)


def _band(codec: PixelCodec) -> int:
    """Rows of a band, whole blocks of the codec."""
    factor = codec.config["factor"]
    return max(_ROWS // factor, 1) * factor


def _tilings(codec: AutoencoderKL, size: tuple[int, int], tile: int) -> tuple[Tiling, Tiling]:
    """Tiles of the latent plane, and of the pixels that they stand for."""
    factor = codec_factor(codec)
    side = max(tile // factor, 1)
    plane = (size[0] // factor, size[1] // factor)
    return codec_tiles(plane, side, factor)
