"""Crops of picture files, decoding little more than the crop where the format allows.

- PNG, not interlaced: rows below the crop are not inflated.
- JPEG: rows below the crop are not decoded; crops that get smaller are decoded at 1/2, 1/4 or 1/8,
  which the inverse cosine transform gives for less (Pillow's `draft`).
- All else, and pictures that EXIF turns, are decoded whole, by `mimdit.image_io`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from mimdit.image_io import read_picture

Box = tuple[float, float, float, float]

# Modes that `convert("RGB")` takes over as they are; deeper ones it would clip.
_SIMPLE = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK")
_ORIENTATION = 0x0112
# Chroma of a row is interpolated from the next one, in blocks of up to 4·8 rows.
_BLOCK = 32


class PictureFile:
    """A picture file, opened but not decoded; `size` is (height, width).

    Raises PictureError, one sentence, where the file cannot be read: at once, or when decoded.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._whole: np.ndarray | None = None
        self._kind: str | None = None
        try:
            self._data = self.path.read_bytes()
            image = self._open(self._data)
            # Without "exif" Pillow would decode a PNG to look for one behind the pixels.
            turned = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) != 1
            if image.mode in _SIMPLE and not image.info.get("interlace") and not turned:
                self._kind = image.format
            self.size = (image.height, image.width)
        # What Pillow does not open this way the careful reader reads, or says why not.
        except Exception:
            self._kind = None
        if self._kind is None:
            self.size = (self.whole().shape[0], self.whole().shape[1])

    def whole(self) -> np.ndarray:
        """All of it, uint8 [H, W, 3], upright; transparency is dropped, gray is repeated."""
        if self._whole is None:
            self._whole = np.rint(read_picture(self.path).rgb * 255).astype(np.uint8)
        return self._whole

    def crop(self, top: int, left: int, height: int, width: int) -> np.ndarray:
        """uint8 [height, width, 3] as stored. Raises ValueError outside the picture."""
        rows, columns = self.size
        if not (0 <= top <= rows - height and 0 <= left <= columns - width):
            got = (top, left, height, width)
            raise ValueError(f"crop: expected top, left, height, width in {self.size}, got {got}")
        box = (left, top, left + width, top + height)
        return self._decoded(
            lambda: np.asarray(self._upto(top + height).crop(box).convert("RGB")),
            lambda: self.whole()[top : top + height, left : left + width],
        )

    def resized(self, box: Box, size: int) -> np.ndarray:
        """uint8 [size, size, 3] of the square (left, top, right, bottom), bicubic."""

        def some() -> np.ndarray:
            scale = (box[2] - box[0]) / size
            # As for Pillow's thumbnails, half of the reduction is left to the resampling.
            reduce = next((s for s in (8, 4, 2) if scale >= 2 * s), 1)
            if self._kind == "PNG" or reduce == 1:
                # The cubic reaches two pixels of the coarser picture beyond the box.
                rows = math.ceil(box[3] + 2 * max(scale, 1)) + 1
                return resampled(self._upto(rows), box, size)
            image = self._open(self._data)
            image.draft("RGB", (image.width // reduce, image.height // reduce))
            x, y = image.width / self.size[1], image.height / self.size[0]
            right, bottom = min(box[2] * x, image.width), min(box[3] * y, image.height)
            return resampled(image, (box[0] * x, box[1] * y, right, bottom), size)

        return self._decoded(some, lambda: resampled(Image.fromarray(self.whole()), box, size))

    def _decoded(
        self, some: Callable[[], np.ndarray], whole: Callable[[], np.ndarray]
    ) -> np.ndarray:
        """`some()` of the file, or `whole()` where it is decoded already or has to be."""
        if self._kind is not None and self._whole is None:
            try:
                return some()
            # Of damaged data the careful reader says what is wrong.
            except Exception:
                self._kind = None
        return whole()

    @staticmethod
    def _open(data: bytes) -> ImageFile.ImageFile:
        return Image.open(io.BytesIO(data), formats=("PNG", "JPEG"))

    def _upto(self, rows: int) -> Image.Image:
        """The picture, of which only the rows above `rows` need be right."""
        if self._kind == "JPEG":
            return self._open(_shortened(self._data, rows + _BLOCK))
        image = self._open(self._data)
        tiles = []
        for tile in image.tile:
            left, top, right, bottom = tile.extents or (0, 0, *image.size)
            tiles.append(tile._replace(extents=(left, top, right, min(bottom, rows))))
        image.tile = tiles
        return image


def _shortened(data: bytes, rows: int) -> bytes:
    """A JPEG file whose header says at most `rows`; decoders stop there.

    Frame headers (ITU-T T.81, B.2.2): marker, length, precision, then the height in two bytes.
    """
    at = 2
    while at + 7 < len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4], "big")
        # Start of a frame; C4, C8 and CC are tables and reserved.
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height = int.from_bytes(data[at + 5 : at + 7], "big")
            if height <= rows:
                return data
            return b"".join((data[: at + 5], rows.to_bytes(2, "big"), data[at + 7 :]))
        # Fill bytes may stand before a marker.
        at += 1 if marker == 0xFF else 2 + length
    return data


def resampled(image: Image.Image, box: Box, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of the square (left, top, right, bottom) of a picture, bicubic."""
    # Converting an RGB picture would copy all of it.
    rgb = image if image.mode == "RGB" else image.convert("RGB")
    # Strong reductions average whole pixels first, down to twice the size.
    small = rgb.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=2.0)
    return np.asarray(small)
