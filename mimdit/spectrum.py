"""Gains and thresholds for the cosine coefficients of small blocks of a picture.

Shrinkage of 8×8 cosine coefficients in overlapping blocks (Yu and Sapiro, "DCT image denoising",
IPOL 2011), where a network says for every place, coefficient and colour what to keep. Noise is
thousands of small coefficients, rain a few large ones, blur a want of high ones: what would fill a
network that has to draw the correction takes it two numbers a coefficient.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# A threshold at raw value 0, for pixels from −1 to 1: too small to be seen.
_LEAST = 0.01
# Brightness and two differences of colour, orthonormal: noise is even in them, detail is not.
_OPPONENT = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (1.0, -2.0, 1.0))


def reshape_spectrum(pixels: Tensor, controls: Tensor, strength: Tensor) -> Tensor:
    """Every coefficient k of every block becomes k·e^(s·g)/(1 + (s·h/k)⁴), the mean one stays.

    pixels: [B,3,H,W] from −1 to 1. controls: [B,6f²,H/f,W/f] for an even number of cells of f×f
    pixels along each axis, unshuffled in these cells: g, then ln(h/0.01), each 3 colours by a block
    of 2×2 cells. Blocks overlap by a cell; one between others takes the mean of their controls.
    strength: s [B,1,1,1]; at 0 the pixels come back.
    """
    side, given = pixels.shape[-1] // controls.shape[-1], pixels.dtype
    wide = torch.promote_types(given, torch.float32)
    pixels, controls, strength = (x.to(wide) for x in (pixels, controls, strength))
    basis, mix = _bases(side, pixels)
    padded = F.pad(pixels, (side, side, side, side), mode="reflect")
    # [B·3,4f²,H/f+1,W/f+1]: a block at every corner of a cell.
    found = _coefficients(padded, side, basis, mix)
    # Beyond e⁹ nothing or all is left, and 0·∞ would not be a number.
    controls = _of_blocks(controls.clamp(max=9), side)
    gain, threshold = (x.reshape(found.shape) for x in controls.chunk(2, dim=1))
    # The first coefficient of a block is its mean.
    others = torch.ones(len(basis), 1, 1, device=pixels.device, dtype=pixels.dtype)
    others[0] = 0
    scale = others * strength.repeat_interleave(3, dim=0)
    # Fourth powers, not a ratio of coefficients near zero, which rounding would decide.
    power = found.square().square()
    least = (scale * _LEAST * threshold.exp()).square().square()
    # Not a sum with 1e-30, which optimisers of graphs take for zero.
    shrunk = power / (power + least).clamp(min=1e-30)
    found = found * (scale * gain).exp() * shrunk
    # Each pixel lies in four blocks.
    planes = F.pixel_shuffle(F.conv_transpose2d(found, basis), side) / 4
    planes = planes[:, 0, side:-side, side:-side].reshape(pixels.shape)
    return F.conv2d(planes, mix.T[:, :, None, None]).to(given)


def cell_side(channels: int) -> int:
    """f of latents that are pixels unshuffled in cells of f×f; ValueError for any others."""
    side = math.isqrt(channels // 3)
    if not channels == 3 * side**2 > 0:
        raise ValueError(f"in_channels: expected 3·f² (unshuffled pixels), got {channels}")
    return side


def mean_powers(latents: Tensor) -> Tensor:
    """Mean squares, over a picture's blocks, of what `reshape_spectrum` works on, [B,12f²].

    latents: [B,3f²,h,w], unshuffled pixels, h and w at least 2. They tell how strong noise is and
    how far detail reaches.
    """
    side = cell_side(latents.shape[1])
    wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
    found = _coefficients(F.pixel_shuffle(wide, side), side, *_bases(side, wide))
    return found.square().mean((2, 3)).unflatten(0, (-1, 3)).flatten(1)


def _bases(side: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Filters [4f²,f²,2,2], a block's transform from its cells, and planes of the colours [3,3]."""
    basis = F.pixel_unshuffle(_cosines(2 * side, like), side)
    planes = torch.tensor(_OPPONENT, device=like.device, dtype=like.dtype)
    return basis, F.normalize(planes, dim=1)


def _coefficients(pixels: Tensor, side: int, basis: Tensor, mix: Tensor) -> Tensor:
    """[B·3,4f²,H/f−1,W/f−1] of the blocks around the corners of cells."""
    planes = F.conv2d(pixels, mix[:, :, None, None]).flatten(0, 1)[:, None]
    return F.conv2d(F.pixel_unshuffle(planes, side), basis)


def _of_blocks(controls: Tensor, side: int) -> Tensor:
    """[B,6f²,h,w] to one value a coefficient and block, [B,6·4f²,h+1,w+1]."""
    own = F.pixel_unshuffle(F.pixel_shuffle(controls, side), 2 * side)
    return _with_means(_with_means(own, 2), 3)


def _with_means(x: Tensor, dim: int) -> Tensor:
    """n values along an axis and the means between them: 2n + 1, the ends repeated."""
    first, last = x.narrow(dim, 0, 1), x.narrow(dim, -1, 1)
    means = (torch.cat([first, x], dim) + torch.cat([x, last], dim)) / 2
    pairs = torch.stack([means.narrow(dim, 0, x.shape[dim]), x], dim + 1)
    return torch.cat([pairs.flatten(dim, dim + 1), last], dim)


def _cosines(size: int, like: Tensor) -> Tensor:
    """The orthonormal cosine transform of blocks [size,size] as filters [size²,1,size,size]."""
    place = torch.arange(size, device=like.device, dtype=like.dtype)
    wave = torch.cos(math.pi / size * (place + 0.5) * place[:, None]) * math.sqrt(2 / size)
    wave = torch.cat([wave[:1] / math.sqrt(2), wave[1:]])
    return torch.einsum("ax,by->abxy", wave, wave).reshape(size**2, 1, size, size)
