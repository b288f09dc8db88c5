"""A picture file as pixels, and what comes with them."""

import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageFile

from mimdit.colour_space import SPACES, to_srgb
from mimdit.deep_colour import deep_planes
from mimdit.metadata import look, read_metadata, turn
from mimdit.picture import Picture, PictureError
from mimdit.png_chunks import read_chunks

# Pillow also opens formats that start other programs (EPS), so the list is closed.
_OPEN_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")
_GRAY_MODES = ("1", "L", "LA", "La")
# Tags of TIFF, and a value: 0 is white.
_BITS, _MEANING, _WHITE_IS_ZERO = 258, 262, 0
# Gray that Pillow widens to 8 bits, but not the value that stands for nothing: steps of the latter.
_STEPS = {"L;2": 85, "L;4": 17}


def decode(path: Path) -> Picture:
    """The picture in a file that exists.

    Raises what Pillow raises for one that is none, damaged or too large; PictureError where its
    values cannot be taken.
    """
    # With `formats` given, Pillow neither loads its rarer readers nor passes over absent ones.
    Image.init()
    formats = [name for name in _OPEN_FORMATS if name in Image.OPEN]
    # Pillow warns about odd metadata of pictures that it decodes well.
    listen = warnings.catch_warnings(record=True, action="always")
    chunks = read_chunks(path)
    source = chunks.sound or path
    # Given a name, Pillow maps plain values of a TIFF into memory: of one on its side, in rows of
    # the wrong length.
    with (
        chunks.sound or open(path, "rb") as file,
        listen as caught,
        Image.open(file, formats=formats) as image,
    ):
        if 0 in image.size:
            raise PictureError(f"{path}: has no pixels; copy or download it again")
        form, notes = image.format or "", []
        opened = look(image)
        icc = image.info.get("icc_profile") or None
        planes, bits = deep_planes(image, source), 16
        if planes is None and image.mode in SPACES:
            rgb, icc, note = to_srgb(image, icc)
            planes, bits, notes = _planes(path, rgb), 8, [note]
        elif planes is None:
            planes = _planes(path, image)
            bits = 16 if image.mode[0] in "IF" else 8
        stored = max(getattr(image, "tag_v2", {}).get(_BITS, (8,)))
        if bits == 8 < stored:
            notes.append(f"its {stored} bits a channel were read as 8")
        # Only now: a PNG may hold its EXIF behind the pixels, and a TIFF is turned when decoded.
        known = read_metadata(image, opened, caught)
        icc = image.info.get("icc_profile") or icc if image.mode not in SPACES else icc
    notes += [*known.notes, *chunks.notes]
    if known.frames > 1:
        notes.append(f"holds {known.frames} pictures (frames or pages); only the first is restored")
    upright = np.ascontiguousarray(turn(planes, known.orientation), dtype=np.float32)
    channels = upright.shape[2]
    alpha = upright[..., -1].copy() if channels in (2, 4) else None
    gray = channels < 3
    rgb = np.repeat(upright[..., :1], 3, axis=2) if gray else upright
    # A view of the colours would keep alpha a second time.
    rgb = rgb[..., :3].copy() if rgb.shape[2] > 3 else rgb
    return Picture(
        rgb,
        alpha,
        bits,
        icc,
        known.exif,
        gray,
        form,
        known.xmp,
        known.dpi,
        (*notes,),
        known.iptc,
        chunks.texts,
        chunks.colours,
        known.comments,
        form == "WEBP" and _lossless(path),
    )


def _planes(path: Path, image: Image.Image) -> np.ndarray:
    """Planes float32 [H, W, 1..4] in [0, 1], by the modes that Pillow has."""
    key = image.info.get("transparency")
    if image.mode[0] in "IF":
        white = 65535 if image.mode[0] == "I" else 1
        values = np.asarray(image)[..., None]
        # Pillow turns the values of 8 bits, not these.
        if getattr(image, "tag_v2", {}).get(_MEANING) == _WHITE_IS_ZERO:
            values = white - values
        # Written so that NaN fails.
        if not (values.min() >= 0 and values.max() <= white):
            what = "32-bit values" if white > 1 else "values outside [0, 1]"
            raise PictureError(f"{path}: has {what}; save it with 16 bits")
        if isinstance(key, int):
            values = np.concatenate([values, white * (values != key)], axis=2)
        return values.astype(np.float32) / white
    if image.mode == "L" and isinstance(key, int) and isinstance(image, ImageFile.ImageFile):
        raw = {tile.args for tile in image.tile if isinstance(tile.args, str)}
        image.info["transparency"] = key * max((_STEPS.get(each, 1) for each in raw), default=1)
    mode = "L" if image.mode in _GRAY_MODES else "RGB"
    if image.has_transparency_data:
        mode = "LA" if mode == "L" else "RGBA"
    values = np.asarray(image.convert(mode)).astype(np.float32)
    values /= 255
    return values.reshape(*values.shape[:2], -1)


def _lossless(path: Path) -> bool:
    """Whether a WebP, or the first picture of an animated one, was compressed without loss."""
    with open(path, "rb") as file:
        # Behind the name of the file's kind.
        place = 12
        while True:
            file.seek(place)
            head = file.read(8)
            if len(head) < 8 or head[:4] in (b"VP8 ", b"ALPH"):
                return False
            if head[:4] == b"VP8L":
                return True
            size = int.from_bytes(head[4:], "little")
            # A frame has 16 bytes of its own before its parts.
            place += 8 + (16 if head[:4] == b"ANMF" else size + size % 2)
