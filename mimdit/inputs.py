"""Pictures in memory of any kind that people hold them in, as tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Pictures = Image.Image | np.ndarray | Tensor | Sequence[Image.Image] | Sequence[np.ndarray]


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
