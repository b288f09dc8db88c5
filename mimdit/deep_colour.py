"""16-bit pictures with several channels, which Pillow reads with 8 bits and does not write."""

import io
import sys
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin

_NATIVE = "L" if sys.byteorder == "little" else "B"
_SWAPPED = {"L": "B", "B": "L"}


def deep_planes(image: ImageFile.ImageFile, path: Path) -> np.ndarray | None:
    """Planes float32 [H, W, 2..4] in [0, 1] of an opened, not yet decoded 16-bit picture.

    None for any other picture. `path` is opened a second time.

    Pillow has no such mode: it unpacks the high byte of each value. Told the other byte order it
    unpacks the low byte, so two passes give the whole value.
    """
    raw_modes = {t.args[0] if isinstance(t.args, tuple) else t.args for t in image.tile}
    raw = raw_modes.pop() if len(raw_modes) == 1 else None
    if raw == "LA;16B" and image.mode == "RGBA":
        # Four plain bytes a pixel: gray high, gray low, alpha high, alpha low.
        _set_raw_mode(image, "RGBA")
        parts = np.asarray(image)
        return (parts[..., 0::2] * np.float32(256) + parts[..., 1::2]) / 65535
    name, _, order = str(raw).partition(";16")
    if name not in ("RGB", "RGBA") or order not in ("L", "B", "N"):
        return None
    with Image.open(path, formats=(image.format or "",)) as again:
        _set_raw_mode(again, f"{name};16{_SWAPPED[_NATIVE if order == 'N' else order]}")
        low = np.asarray(again)
    high = np.asarray(image)
    return (high * np.float32(256) + low) / 65535


def _set_raw_mode(image: ImageFile.ImageFile, raw: str) -> None:
    image.tile = [
        tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw)
        for tile in image.tile
    ]


def encode_deep_png(pixels: np.ndarray, icc: bytes | None, exif: bytes | None) -> bytes:
    """PNG of uint16 [H, W, 2..4], which Pillow cannot write (PNG specification, ISO 15948)."""
    height, width, channels = pixels.shape
    colour_type = {2: 4, 3: 2, 4: 6}[channels]
    # [H, W * C * 2] bytes, big-endian
    rows = np.ascontiguousarray(pixels.astype(">u2")).view(np.uint8).reshape(height, -1)
    up = np.full((height, rows.shape[1] + 1), 2, np.uint8)
    up[:, 1:] = np.diff(rows, axis=0, prepend=np.zeros_like(rows[:1]))
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, colour_type, 0, 0, 0])
    buffer = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    buffer.seek(0, io.SEEK_END)
    PngImagePlugin.putchunk(buffer, b"IHDR", head)
    if icc is not None:
        PngImagePlugin.putchunk(buffer, b"iCCP", b"ICC Profile\0\0" + zlib.compress(icc))
    if exif is not None:
        PngImagePlugin.putchunk(buffer, b"eXIf", exif.removeprefix(b"Exif\0\0"))
    PngImagePlugin.putchunk(buffer, b"IDAT", zlib.compress(up.tobytes()))
    PngImagePlugin.putchunk(buffer, b"IEND")
    return buffer.getvalue()
