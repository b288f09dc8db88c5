"""Colour transfer from the damaged picture; off by default, as it undoes some restorations.

Dehazing and brightening change colours on purpose.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

COLOR_FIXES = ("none", "adain", "wavelet")


def color_fix(kind: str, restored: Tensor, damaged: Tensor) -> Tensor:
    """[B,3,H,W] → [B,3,H,W] with the colours of `damaged`.

    "adain" matches mean and deviation of each channel (arXiv 1703.06868, Eq. 8); "wavelet" takes
    the low frequencies (five à-trous levels) of `damaged` and the rest of `restored` (StableSR).
    """
    if kind == "none":
        return restored
    if kind == "adain":
        mean, std = _moments(restored)
        target_mean, target_std = _moments(damaged)
        return (restored - mean) / std * target_std + target_mean
    if kind == "wavelet":
        return restored - _low(restored) + _low(damaged)
    raise ValueError(f"color_fix: expected one of {', '.join(COLOR_FIXES)}, got {kind!r}")


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    std = x.std(dim=(2, 3), keepdim=True, correction=0)
    return x.mean(dim=(2, 3), keepdim=True), std.clamp(min=1e-5)


def _low(x: Tensor) -> Tensor:
    line = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype, device=x.device)
    kernel = (line[:, None] * line).expand(3, 1, 3, 3)
    for level in range(5):
        reach = 2**level
        padded = F.pad(x, (reach,) * 4, mode="replicate")
        x = F.conv2d(padded, kernel, dilation=reach, groups=3)
    return x
