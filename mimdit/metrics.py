"""Image quality figures; training, evaluation and tests use these."""

import math

import torch
from torch import Tensor


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all RGB values, data range 1; any equal shapes."""
    if a.shape != b.shape:
        raise ValueError(f"psnr: expected equal shapes, got {tuple(a.shape)} and {tuple(b.shape)}")
    error = torch.mean((a.double() - b.double()) ** 2).item()
    return math.inf if error == 0 else -10 * math.log10(error)
