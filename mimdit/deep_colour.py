"""16-bit pictures with several channels, which Pillow reads with 8 bits and does not write."""

import io
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFile, PngImagePlugin

_NATIVE = "L" if sys.byteorder == "little" else "B"
_SWAPPED = {"L": "B", "B": "L"}
# Rows that are packed at once.
_ROWS = 256
# Tags and a type of TIFF.
_WIDTH, _BITS, _PLANAR, _SHORT = 256, 258, 284, 3
# What Pillow calls interleaved channels, and what they are unpacked as.
_CHANNELS = {"RGB": "RGB", "RGBX": "RGBX", "RGBA": "RGBA", "RGBa": "RGBA"}


def deep_planes(image: ImageFile.ImageFile, source: Path | io.BytesIO) -> np.ndarray | None:
    """Planes float32 [H, W, 2..4] in [0, 1] of an opened, not yet decoded 16-bit picture.

    None for any other picture. `source`, which it was opened from, is opened a second time.

    Pillow has no such mode: it unpacks the high byte of each value. Told the other byte order it
    unpacks the low byte, so two passes give the whole value.
    """
    raw_modes = [_raw_mode(tile) for tile in image.tile]
    if set(raw_modes) == {"LA;16B"} and image.mode == "RGBA":
        # Four plain bytes a pixel: gray high, gray low, alpha high, alpha low.
        _set_raw_modes(image, ["RGBA"])
        parts = np.asarray(image)
        return _joined(parts[..., 0::2], parts[..., 1::2]) / 65535
    high = [_high_bytes(image, raw) for raw in raw_modes]
    if "" in high or not high:
        return None
    _set_raw_modes(image, high)
    with Image.open(source, formats=(image.format or "",)) as again:
        _set_raw_modes(again, [raw[:-1] + _SWAPPED[raw[-1]] for raw in high])
        low = np.asarray(again)
    values = _joined(np.asarray(image), low)
    if isinstance(key := image.info.get("transparency"), tuple):
        # One colour that stands for nothing.
        seen = (values != np.array(key, np.float32)).any(-1, keepdims=True)
        values = np.concatenate([values, seen * np.float32(65535)], axis=2)
    if raw_modes[0].startswith("RGBa"):
        # Colours that were multiplied by alpha.
        share = np.maximum(values[..., 3:], 1) / 65535
        values[..., :3] = np.minimum(values[..., :3] / share, 65535)
    values /= 65535
    return values


def _high_bytes(image: ImageFile.ImageFile, raw: str) -> str:
    """The raw mode, with its byte order, that unpacks the high bytes; "" where there is none."""
    tags = getattr(image, "tag_v2", {})
    if raw in ("R", "G", "B", "A") and tags.get(_BITS, (8,))[0] == 16:
        # A plane of its own, whose values Pillow takes for bytes.
        return f"{raw};16{'L' if tags.prefix == b'II' else 'B'}"
    name, _, order = raw.partition(";16")
    # Of compressed planes it gives the high bytes alone, whatever it is told.
    if name not in _CHANNELS or order not in ("L", "B", "N") or tags.get(_PLANAR) == 2:
        return ""
    return f"{_CHANNELS[name]};16{_NATIVE if order == 'N' else order}"


def _joined(high: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Whole values, 0 to 65535, of their bytes."""
    values = high.astype(np.float32)
    values *= 256
    values += low
    return values


def _raw_mode(tile: Any) -> str:
    return str(tile.args[0] if isinstance(tile.args, tuple) else tile.args)


def _set_raw_modes(image: ImageFile.ImageFile, raw_modes: Sequence[str]) -> None:
    """One for each tile."""
    image.tile = [
        tile._replace(args=(raw, *tile.args[1:]) if isinstance(tile.args, tuple) else raw)
        for tile, raw in zip(image.tile, raw_modes, strict=True)
    ]


def encode_deep_png(pixels: np.ndarray, options: Mapping[str, Any]) -> bytes:
    """PNG of uint16 [H, W, 2..4], which Pillow cannot write (PNG specification, ISO 15948).

    options: Pillow's icc_profile, exif, dpi and pnginfo.
    """
    height, width, channels = pixels.shape
    colour_type = {2: 4, 3: 2, 4: 6}[channels]
    head = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([16, colour_type, 0, 0, 0])
    buffer = io.BytesIO(b"\x89PNG\r\n\x1a\n")
    buffer.seek(0, io.SEEK_END)
    PngImagePlugin.putchunk(buffer, b"IHDR", head)
    if "icc_profile" in options:
        icc = zlib.compress(options["icc_profile"])
        PngImagePlugin.putchunk(buffer, b"iCCP", b"ICC Profile\0\0" + icc)
    if "dpi" in options:
        # Dots a metre.
        per_metre = (round(value / 0.0254).to_bytes(4, "big") for value in options["dpi"])
        PngImagePlugin.putchunk(buffer, b"pHYs", b"".join(per_metre) + b"\1")
    if "exif" in options:
        PngImagePlugin.putchunk(buffer, b"eXIf", options["exif"].removeprefix(b"Exif\0\0"))
    for kind, data, *_ in options["pnginfo"].chunks:
        # A picture has a profile or this chunk.
        if kind != b"sRGB" or "icc_profile" not in options:
            PngImagePlugin.putchunk(buffer, kind, data)
    # Differences to the row above, some rows at a time.
    packer, before, parts = zlib.compressobj(), np.zeros((1, width * channels * 2), np.uint8), []
    for start in range(0, height, _ROWS):
        some = np.ascontiguousarray(pixels[start : start + _ROWS].astype(">u2"))
        rows = some.view(np.uint8).reshape(len(some), -1)  # [rows, W * C * 2], big-endian
        up = np.full((len(rows), rows.shape[1] + 1), 2, np.uint8)
        up[:, 1:] = np.diff(rows, axis=0, prepend=before)
        before = rows[-1:]
        parts.append(packer.compress(up.tobytes()))
    for part in (*parts, packer.flush()):
        if part:
            PngImagePlugin.putchunk(buffer, b"IDAT", part)
    PngImagePlugin.putchunk(buffer, b"IEND")
    return buffer.getvalue()


def encode_deep_tiff(pixels: np.ndarray, options: Mapping[str, Any]) -> bytes:
    """TIFF of uint16 [H, W, 2..4], which Pillow cannot write (TIFF 6.0, sections 2 and 8).

    Its rows are those of an 8-bit picture twice as wide, byte for byte: Pillow writes that one, and
    then its width and depth are set. options: of Pillow's `save`.
    """
    height, width, channels = pixels.shape
    halves = np.ascontiguousarray(pixels.astype("<u2")).view(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(halves.reshape(height, 2 * width, channels)).save(buffer, "TIFF", **options)
    data = bytearray(buffer.getvalue())
    (directory,) = struct.unpack_from("<4xI", data)
    (count,) = struct.unpack_from("<H", data, directory)
    for entry in range(directory + 2, directory + 2 + 12 * count, 12):
        tag, kind, values = struct.unpack_from("<HHI", data, entry)
        if tag == _WIDTH:
            struct.pack_into("<H" if kind == _SHORT else "<I", data, entry + 8, width)
        elif tag == _BITS:
            # Up to four bytes of values stand in place of their address.
            place = entry + 8 if 2 * values <= 4 else struct.unpack_from("<I", data, entry + 8)[0]
            struct.pack_into(f"<{values}H", data, place, *[16] * values)
    return bytes(data)
