"""A decoded picture, and the error of one that cannot be had."""

from dataclasses import dataclass

import numpy as np

from mimdit.png_chunks import Chunk


class PictureError(ValueError):
    """A picture that cannot be read, written or found; the message is one sentence for a user."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded picture and what has to be written back with it.

    Attributes:
        rgb: float32 [H, W, 3] in [0, 1], upright (EXIF orientation applied).
        alpha: float32 [H, W] in [0, 1], or None.
        bits: 8 or 16, the depth of one channel in the file.
        icc: the ICC profile, or None.
        exif: an EXIF block with the orientation reset to upright, or None.
        gray: whether the file holds one gray channel; `rgb` then repeats it.
        format: Pillow's name of the format, such as "PNG", whatever the suffix says.
        xmp: an XMP packet with the orientation reset to upright, or None.
        dpi: dots per inch (across, down), or None.
        notes: what reading changed or left out, in words for a user.
        iptc: IPTC records (captions, keywords, rights), or None.
        texts: text chunks of a PNG (author, description, rights), but for EXIF and XMP.
        colours: of a PNG, what says which colours its values are, besides a profile: chunks cICP,
            cHRM, gAMA and sRGB.
        comments: of a JPEG or GIF.
        lossless: of a WebP, whether it was compressed without loss.
    """

    rgb: np.ndarray
    alpha: np.ndarray | None = None
    bits: int = 8
    icc: bytes | None = None
    exif: bytes | None = None
    gray: bool = False
    format: str = "PNG"
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()
    iptc: bytes | None = None
    texts: tuple[Chunk, ...] = ()
    colours: tuple[Chunk, ...] = ()
    comments: tuple[bytes, ...] = ()
    lossless: bool = False
