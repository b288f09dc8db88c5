"""What comes with a picture's pixels: EXIF, XMP, IPTC, resolution, how many pictures there are."""

import re
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFile

_ORIENTATION = 0x0112
# From this orientation on the axes are swapped.
_SWAPPED = 5
_EXIF_IFD = 0x8769
# Width and height of the photograph, in the directory of its exposure.
_SIZE_TAGS = (0xA002, 0xA003)
_XMP_TAG = 700
# IPTC records in a TIFF, and among the resources that Photoshop keeps in a JPEG.
_IPTC_TAG, _IPTC_RESOURCE = 33723, 0x0404
# Tags that describe the stored strips of a TIFF, its profile, XMP and IPTC, not the photograph.
_STORAGE_TAGS = (
    *(254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324),
    *(325, 330, 338, 339, 347, 512, 513, 514, 529, 530, 531, 532, 34377, 34675),
    _XMP_TAG,
    _IPTC_TAG,
)
# The orientation inside XMP, as an attribute or an element.
_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation(?:=[\"']|>)\s*)[2-8]")
# One JPEG segment holds at most 65,533 bytes, XMP's name included.
_SEGMENT = 65533
_XMP_SEGMENT = _SEGMENT - len(b"http://ns.adobe.com/xap/1.0/\0")
# What Pillow warns of where it leaves a tag out, or all that follow it.
_LEFT_OUT = re.compile(
    "corrupt EXIF data|Truncated File Read|Tag data larger than file|Tag offset too large", re.I
)


@dataclass(frozen=True)
class Metadata:
    """Of an upright picture: an EXIF block, an XMP packet, dots per inch (across, down).

    orientation: what it was, the value of EXIF tag 0x0112. frames: pictures in the file. notes:
    what could not be read, in words for a user. iptc: IPTC records.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    orientation: int = 1
    frames: int = 1
    notes: tuple[str, ...] = ()
    iptc: bytes | None = None


@dataclass(frozen=True)
class Opened:
    """Of a picture not yet decoded: frames or pages, and whether decoding will swap its axes."""

    frames: int
    swaps: bool


def read_metadata(
    image: ImageFile.ImageFile, opened: Opened, caught: Sequence[warnings.WarningMessage]
) -> Metadata:
    """Of a decoded picture: a PNG may hold its EXIF behind the pixels.

    caught: the list of warnings since the file was opened, which grows while this reads.
    """
    exif, orientation, sound = _exif(image, opened.swaps)
    notes = ()
    if not sound or any(_LEFT_OUT.search(str(each.message)) for each in caught):
        kept = "were left out" if exif is None else "were kept as far as they can be read"
        notes = (f"the EXIF data are damaged and {kept}",)
    xmp = image.info.get("xmp")
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    xmp = _XMP_ORIENTATION.sub(rb"\g<1>1", xmp) if isinstance(xmp, bytes) and xmp else None
    dpi = _resolution(image.info.get("dpi"))
    if dpi is not None and (opened.swaps or orientation >= _SWAPPED):
        dpi = dpi[1], dpi[0]
    return Metadata(exif, xmp, dpi, orientation, opened.frames, notes, _iptc(image))


def look(image: ImageFile.ImageFile) -> Opened:
    """What decoding would hide: it turns a TIFF, and closes files of one page."""
    try:
        tags = getattr(image, "tag_v2", {})
        return Opened(int(getattr(image, "n_frames", 1)), tags.get(_ORIENTATION, 1) >= _SWAPPED)
    # Damage behind the first picture is no reason to lose it.
    except Exception:
        return Opened(1, False)


def metadata_options(
    kind: str,
    exif: bytes | None,
    xmp: bytes | None,
    dpi: tuple[float, float] | None,
    iptc: bytes | None,
) -> tuple[dict[str, Any], list[str]]:
    """Pillow's arguments for saving, and sentences about what the format cannot hold."""
    options: dict[str, Any] = {}
    lost: list[str] = []
    if dpi is not None and kind != "WEBP":
        options["dpi"] = dpi
    for name, block, most in (("exif", exif, _SEGMENT), ("xmp", xmp, _XMP_SEGMENT)):
        if block is None:
            continue
        if kind == "BMP":
            lost.append(f"BMP holds no {name.upper()}")
        elif kind == "JPEG" and len(block) > most:
            lost.append(f"{name.upper()} of {len(block)} bytes does not fit into a JPEG")
        else:
            options[name] = block
    if kind == "JPEG" and iptc is not None:
        resource = b"8BIM" + struct.pack(">HHI", _IPTC_RESOURCE, 0, len(iptc)) + iptc
        segment = b"Photoshop 3.0\0" + resource + bytes(len(iptc) % 2)
        if len(segment) <= _SEGMENT:
            options["extra"] = b"\xff\xed" + struct.pack(">H", len(segment) + 2) + segment
        else:
            lost.append(f"IPTC of {len(iptc)} bytes does not fit into a JPEG")
    elif kind != "TIFF" and iptc is not None:
        lost.append(f"{kind} holds no IPTC")
    if kind == "TIFF" and (xmp is not None or iptc is not None):
        tags = Image.Exif()
        if exif is not None:
            tags.load(exif)
        for tag, block in ((_XMP_TAG, options.pop("xmp", None)), (_IPTC_TAG, iptc)):
            if block is not None:
                tags[tag] = block
        options["exif"] = tags
    return options, lost


def turn(planes: np.ndarray, orientation: int) -> np.ndarray:
    """Turn [H, W, C] upright; the cases are the values of EXIF tag 0x0112."""
    if orientation in (5, 7):
        planes = planes.swapaxes(0, 1)
    if orientation in (2, 4):
        planes = planes[:, ::-1]
    return np.rot90(planes, {3: 2, 4: 2, 6: -1, 7: 2, 8: 1}.get(orientation, 0))


def _iptc(image: ImageFile.ImageFile) -> bytes | None:
    """IPTC records (Information Interchange Model, each begins with 0x1C) of a JPEG or TIFF."""
    try:
        found = image.info.get("photoshop", {}).get(_IPTC_RESOURCE)
        directory = getattr(image, "tag", None)
        if found is None and directory is not None:
            # As stored: some programs declare the bytes as whole numbers of four.
            found = directory.tagdata.get(_IPTC_TAG)
        return found if isinstance(found, bytes) and found[:1] == b"\x1c" else None
    # Damaged as all else may be.
    except Exception:
        return None


def _resolution(dpi: Any) -> tuple[float, float] | None:
    try:
        across, down = (float(value) for value in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    # The largest that formats store in their units; written so that NaN fails.
    return (across, down) if 1 <= across <= 65535 and 1 <= down <= 65535 else None


def _exif(image: ImageFile.ImageFile, swapped: bool) -> tuple[bytes | None, int, bool]:
    """The EXIF block with its orientation reset, what that was, and whether the block is sound."""
    orientation = 1
    try:
        exif = image.getexif()
        found = exif.get(_ORIENTATION, 1)
        if isinstance(found, int) and 1 <= found <= 8:
            orientation = found
        # That of a JPEG was read when it was opened, and hides what failed then.
        Image.Exif().load(image.info.get("exif") or b"")
        for tag in _STORAGE_TAGS:
            if tag in exif:
                del exif[tag]
        if _ORIENTATION in exif:
            exif[_ORIENTATION] = 1
        if swapped or orientation >= _SWAPPED:
            photograph = exif.get_ifd(_EXIF_IFD)
            if all(tag in photograph for tag in _SIZE_TAGS):
                sizes = [photograph[tag] for tag in _SIZE_TAGS]
                photograph.update(zip(_SIZE_TAGS, sizes[::-1], strict=True))
        return exif.tobytes() if len(exif) else None, orientation, True
    # A damaged block fails in as many ways as damaged pixels, and is no reason to lose those, nor
    # to leave the picture on its side.
    except Exception:
        return None, orientation, False
