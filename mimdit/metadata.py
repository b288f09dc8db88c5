"""What comes with a picture's pixels: EXIF, XMP, resolution, and how many pictures there are."""

import re
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageFile

_ORIENTATION = 0x0112
# From this orientation on the axes are swapped.
_SWAPPED = 5
_EXIF_IFD = 0x8769
# Width and height of the photograph, in the directory of its exposure.
_SIZE_TAGS = (0xA002, 0xA003)
_XMP_TAG = 700
# Tags that describe the stored strips of a TIFF, its profile and its XMP, not the photograph.
_STORAGE_TAGS = (
    *(254, 255, 256, 257, 258, 259, 262, 266, 273, 277, 278, 279, 284, 317, 320, 322, 323, 324),
    *(325, 330, 338, 339, 347, 512, 513, 514, 529, 530, 531, 532, 33723, 34377, 34675),
    _XMP_TAG,
)
# The orientation inside XMP, as an attribute or an element.
_XMP_ORIENTATION = re.compile(rb"(tiff:Orientation(?:=[\"']|>)\s*)[2-8]")
# One JPEG segment holds at most 65,533 bytes, XMP's name included.
_SEGMENT = 65533
_XMP_SEGMENT = _SEGMENT - len(b"http://ns.adobe.com/xap/1.0/\0")


@dataclass(frozen=True)
class Metadata:
    """Of an upright picture: an EXIF block, an XMP packet, dots per inch (across, down).

    orientation: what it was, the value of EXIF tag 0x0112. frames: pictures in the file.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    orientation: int = 1
    frames: int = 1


@dataclass(frozen=True)
class Opened:
    """Of a picture not yet decoded: frames or pages, and whether decoding will swap its axes."""

    frames: int
    swaps: bool


def read_metadata(image: ImageFile.ImageFile, opened: Opened) -> Metadata:
    """Of a decoded picture: a PNG may hold its EXIF behind the pixels."""
    exif, orientation = _exif(image, opened.swaps)
    xmp = image.info.get("xmp")
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    xmp = _XMP_ORIENTATION.sub(rb"\g<1>1", xmp) if isinstance(xmp, bytes) and xmp else None
    dpi = _resolution(image.info.get("dpi"))
    if dpi is not None and (opened.swaps or orientation >= _SWAPPED):
        dpi = dpi[1], dpi[0]
    return Metadata(exif, xmp, dpi, orientation, opened.frames)


def look(image: ImageFile.ImageFile) -> Opened:
    """What decoding would hide: it turns a TIFF, and closes files of one page."""
    try:
        tags = getattr(image, "tag_v2", {})
        return Opened(int(getattr(image, "n_frames", 1)), tags.get(_ORIENTATION, 1) >= _SWAPPED)
    # Damage behind the first picture is no reason to lose it.
    except Exception:
        return Opened(1, False)


def metadata_options(
    kind: str, exif: bytes | None, xmp: bytes | None, dpi: tuple[float, float] | None
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
    if kind == "TIFF" and xmp is not None:
        tags = Image.Exif()
        if exif is not None:
            tags.load(exif)
        tags[_XMP_TAG] = options.pop("xmp")
        options["exif"] = tags
    return options, lost


def _resolution(dpi: Any) -> tuple[float, float] | None:
    try:
        across, down = (float(value) for value in dpi)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    # The largest that formats store in their units; written so that NaN fails.
    return (across, down) if 1 <= across <= 65535 and 1 <= down <= 65535 else None


def _exif(image: ImageFile.ImageFile, swapped: bool) -> tuple[bytes | None, int]:
    """The EXIF block with its orientation reset, and what the orientation was."""
    try:
        exif = image.getexif()
        orientation = exif.get(_ORIENTATION, 1)
        if not isinstance(orientation, int) or not 1 <= orientation <= 8:
            orientation = 1
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
        return exif.tobytes() if len(exif) else None, orientation
    # A damaged block fails in as many ways as damaged pixels, and is no reason to lose those.
    except Exception:
        return None, 1
