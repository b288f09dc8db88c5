"""Pictures in memory of any kind that people hold them in, as tensors."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

# The value of white by kind and bytes of whole numbers, in any byte order.
_TOPS = {("u", 1): 255, ("u", 2): 65535}
Pictures = Image.Image | np.ndarray | Tensor | Sequence[Image.Image] | Sequence[np.ndarray]


def to_tensor(image: Pictures) -> Tensor:
    """Pictures of any accepted kind as float32 [B,3,H,W] in [0,1] on the CPU.

    Not to be changed in place: it may be the caller's own memory.
    """
    if isinstance(image, (list, tuple)):
        parts = [to_tensor(part) for part in image]
        sizes = {tuple(p.shape[-2:]) for p in parts}
        if len(sizes) != 1:
            found = ", ".join(f"{h}×{w}" for h, w in sorted(sizes)) or "none"
            raise ValueError(f"image: expected pictures of one size in a batch, got {found}")
        return torch.cat(parts)
    if isinstance(image, Image.Image):
        image = _array(image)
    if isinstance(image, np.ndarray):
        image = _from_array(image)
        image = image.movedim(-1, -3) if image.ndim in (3, 4) else image
    if not isinstance(image, Tensor):
        raise ValueError(f"image: expected PIL, numpy or torch, got {type(image).__name__}")
    pictures = image.detach().float().cpu()
    pictures = pictures[None] if pictures.ndim == 3 else pictures
    if pictures.ndim != 4 or pictures.shape[1] != 3 or 0 in pictures.shape:
        raise ValueError(f"image: expected three colour channels, got shape {tuple(image.shape)}")
    # Extremes are NaN where any value is, and need no copy of a large picture.
    low, high = pictures.aminmax()
    if not (torch.isfinite(low) and torch.isfinite(high)):
        raise ValueError("image: expected finite values, got NaN or infinity")
    if low < -1e-3 or high > 1 + 1e-3:
        raise ValueError(f"image: expected values in [0, 1], got {low:.3g} to {high:.3g}")
    return pictures if low >= 0 and high <= 1 else pictures.clamp(0, 1)


def _array(image: Image.Image) -> np.ndarray:
    """[H,W,3] uint8, or of gray with more bits: uint16 of whole numbers, floats as they are."""
    if image.mode == "F":
        return np.repeat(np.asarray(image)[..., None], 3, axis=2)
    if not image.mode.startswith("I"):
        return np.asarray(image.convert("RGB"))
    values = np.asarray(image)
    if values.size and not 0 <= values.min() <= values.max() <= 65535:
        span = f"{values.min()} to {values.max()}"
        raise ValueError(f"image: expected whole numbers from 0 to 65535, got {span}")
    return np.repeat(values[..., None].astype(np.uint16), 3, axis=2)


def _from_array(image: np.ndarray) -> Tensor:
    """Floats of any array; those of a float32 array are shared, not copied."""
    if image.dtype.kind in "iu" and (image.dtype.kind, image.itemsize) not in _TOPS:
        raise ValueError(f"image: expected uint8, uint16 or floats in [0, 1], got {image.dtype}")
    top = _TOPS.get((image.dtype.kind, image.itemsize), 1)
    if image.dtype == np.float32 and image.flags.writeable and min(image.strides, default=1) > 0:
        return torch.from_numpy(image)
    values = torch.from_numpy(np.array(image, dtype=np.float32))
    return values if top == 1 else values.div_(top)
