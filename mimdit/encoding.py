"""Pixels as the bytes of a picture file."""

import io
from typing import Any

import numpy as np
from PIL import Image

from mimdit.deep_colour import encode_deep_png, encode_deep_tiff

# Rows that are turned into whole numbers at once.
_ROWS = 256


def quantised(planes: np.ndarray, top: int, dtype: Any) -> np.ndarray:
    """Values in [0, 1] as whole numbers up to `top`, some rows at a time."""
    out = np.empty(planes.shape, dtype)
    for start in range(0, len(planes), _ROWS):
        rows = slice(start, start + _ROWS)
        out[rows] = np.rint(planes[rows].clip(0, 1) * top)
    return out


def encode(
    pixels: np.ndarray, kind: str, icc: bytes | None, options: dict[str, Any], quality: int
) -> bytes:
    """The bytes of a file of pixels uint8 or uint16 [H, W, 1..4].

    kind: Pillow's name of the format. options: those of its `save`. quality: of JPEG and WebP.
    """
    options = options | {
        "JPEG": {"quality": quality, "subsampling": 0},
        "WEBP": {"quality": quality, "exact": True},
        # Pillow's compressed TIFFs lose the directories inside EXIF (exposure, position).
        "TIFF": {} if "exif" in options else {"compression": "tiff_adobe_deflate"},
    }.get(kind, {})
    if icc is not None:
        options["icc_profile"] = icc
    if pixels.dtype == np.uint16 and pixels.shape[2] > 1:
        deep = encode_deep_png if kind == "PNG" else encode_deep_tiff
        return deep(pixels, options)
    buffer = io.BytesIO()
    plane = pixels[..., 0] if pixels.shape[2] == 1 else pixels
    Image.fromarray(plane).save(buffer, kind, **options)
    return buffer.getvalue()
