"""What comes with a picture's pixels: EXIF, XMP, IPTC, texts, resolution, how many there are."""

import math
import re
import struct
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from mimdit.png_chunks import Chunk, png_info, words

_ORIENTATION = 0x0112
# From this orientation on the axes are swapped.
_SWAPPED = 5
_EXIF_IFD, _GPS_IFD, _INTEROP_IFD = 0x8769, 0x8825, 0xA005
# Width and height of the photograph, in the directory of its exposure; dots across and down.
_SIZE_TAGS, _DOTS_TAGS = (0xA002, 0xA003), (0x011A, 0x011B)
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
# Names of PNG texts (ISO 15948, 11.3.3.2) and the EXIF tags for the same (Exif 3.0, 4.6.5).
_TEXT_TAGS = {"Description": 270, "Software": 305, "Author": 315, "Copyright": 33432}
# What a tag takes in an EXIF block besides its text, with what surrounds the first.
_ENTRY = 40
# Names of lost texts that a note gives.
_NAMED = 3
# What Pillow warns of where it leaves a tag out, or all that follow it.
_LEFT_OUT = re.compile(
    "corrupt EXIF data|Truncated File Read|Tag data larger than file|Tag offset too large", re.I
)


@dataclass(frozen=True)
class Metadata:
    """Of an upright picture: an EXIF block, an XMP packet, dots per inch (across, down).

    orientation: what it was, the value of EXIF tag 0x0112. frames: pictures in the file. notes:
    what could not be read, in words for a user. iptc: IPTC records. texts, colours: chunks of a
    PNG. comments: of a JPEG or GIF.
    """

    exif: bytes | None = None
    xmp: bytes | None = None
    dpi: tuple[float, float] | None = None
    orientation: int = 1
    frames: int = 1
    notes: tuple[str, ...] = ()
    iptc: bytes | None = None
    texts: tuple[Chunk, ...] = ()
    colours: tuple[Chunk, ...] = ()
    comments: tuple[bytes, ...] = ()


class _Words(str):
    """Text of an EXIF block, as bytes what it was: Pillow reads Latin-1 and writes ASCII."""

    def encode(self, encoding: str = "latin-1", errors: str = "strict") -> bytes:
        return super().encode("latin-1")


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
    notes: tuple[str, ...] = ()
    if not sound or any(_LEFT_OUT.search(str(each.message)) for each in caught):
        kept = "were left out" if exif is None else "were kept as far as they can be read"
        notes = (f"the EXIF data are damaged and {kept}",)
    xmp = image.info.get("xmp")
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    xmp = _XMP_ORIENTATION.sub(rb"\g<1>1", xmp) if isinstance(xmp, bytes) and xmp else None
    aspect = image.info.get("aspect", ())
    if image.info.get("jfif_unit") == 0:
        aspect = image.info.get("jfif_density", ())
    if len(set(aspect)) > 1:
        notes += (f"its pixels are not square ({aspect[0]}:{aspect[1]}), which is not kept",)
    # Of a TIFF without one Pillow says 1.
    known = _DOTS_TAGS[0] in getattr(image, "tag_v2", _DOTS_TAGS)
    dpi = _resolution(image.info.get("dpi")) if known else None
    if dpi is not None and (opened.swaps or orientation >= _SWAPPED):
        dpi = dpi[1], dpi[0]
    iptc, comments = _iptc(image), _comments(image)
    frames = opened.frames
    return Metadata(exif, xmp, dpi, orientation, frames, notes, iptc, comments=comments)


def look(image: ImageFile.ImageFile) -> Opened:
    """What decoding would hide: it turns a TIFF, and closes files of one page."""
    try:
        tags = getattr(image, "tag_v2", {})
        return Opened(int(getattr(image, "n_frames", 1)), tags.get(_ORIENTATION, 1) >= _SWAPPED)
    # Damage behind the first picture is no reason to lose it.
    except Exception:
        return Opened(1, False)


def metadata_options(kind: str, held: Metadata) -> tuple[dict[str, Any], list[str]]:
    """Pillow's arguments for saving, and sentences about what the format cannot hold."""
    options: dict[str, Any] = {}
    lost: list[str] = []
    if held.dpi is not None and kind != "WEBP":
        options["dpi"] = held.dpi
    exif = _with_texts(kind, held, lost)
    for name, block, most in (("exif", exif, _SEGMENT), ("xmp", held.xmp, _XMP_SEGMENT)):
        if block is None:
            continue
        if kind == "BMP":
            lost.append(f"BMP holds no {name.upper()}")
        elif kind == "JPEG" and len(block) > most:
            lost.append(f"{name.upper()} of {len(block)} bytes does not fit into a JPEG")
        else:
            options[name] = block
    if kind == "JPEG":
        options["extra"] = _segments(held, lost)
    elif kind != "TIFF" and held.iptc is not None:
        lost.append(f"{kind} holds no IPTC")
    if kind == "PNG":
        comments = [_text(comment) for comment in held.comments]
        chunks = (*held.colours, *held.texts)
        options["pnginfo"] = png_info(chunks, comments, options.pop("xmp", None))
    elif kind != "JPEG" and held.comments:
        lost.append(f"{kind} holds no comment")
    if kind == "TIFF" and not (exif is held.xmp is held.iptc is None):
        tags = _loaded(exif)
        for tag, block in ((_XMP_TAG, options.pop("xmp", None)), (_IPTC_TAG, held.iptc)):
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


def _comments(image: ImageFile.ImageFile) -> tuple[bytes, ...]:
    """Of a JPEG, whose segments Pillow lists, or a GIF; a PNG may have a text of that name."""
    found: Any = ()
    if image.format in ("JPEG", "MPO"):
        found = [data for name, data in getattr(image, "applist", ()) if name == "COM"]
    elif image.format == "GIF":
        found = [image.info.get("comment")]
    return tuple(data for data in found if isinstance(data, bytes) and data)


def _text(comment: bytes) -> str:
    """A comment as text, which has no NUL: of no stated coding, so UTF-8 where it is that."""
    try:
        text = comment.decode()
    except UnicodeDecodeError:
        text = comment.decode("latin-1")
    return text.rstrip("\0").replace("\0", " ")


def _segments(held: Metadata, lost: list[str]) -> bytes:
    """Comments and IPTC as segments of a JPEG; what is too long for one is added to `lost`."""
    segments: list[bytes] = []

    def add(marker: bytes, data: bytes, what: str, size: int) -> None:
        if len(data) <= _SEGMENT:
            segments.append(marker + struct.pack(">H", len(data) + 2) + data)
        else:
            lost.append(f"{what} of {size} bytes does not fit into a JPEG")

    texts = [text for name, text in map(words, held.texts) if name == "Comment"]
    for comment in (*held.comments, *(text.encode() for text in texts)):
        add(b"\xff\xfe", comment, "a comment", len(comment))
    if (iptc := held.iptc) is not None:
        resource = b"8BIM" + struct.pack(">HHI", _IPTC_RESOURCE, 0, len(iptc)) + iptc
        segment = b"Photoshop 3.0\0" + resource + bytes(len(iptc) % 2)
        add(b"\xff\xed", segment, "IPTC", len(iptc))
    return b"".join(segments)


def _with_texts(kind: str, held: Metadata, lost: list[str]) -> bytes | None:
    """The EXIF block with texts of a PNG that it has tags for; `lost` gets the names of others."""
    if kind == "PNG" or not held.texts:
        return held.exif
    tags, names, changed = _loaded(held.exif), [], False
    # Texts must not push out what is there.
    room = _SEGMENT - len(held.exif or b"") if kind == "JPEG" else math.inf
    for name, text in map(words, held.texts):
        tag, value = _TEXT_TAGS.get(name, 0), _exif_text(text)
        size = len(value) + _ENTRY
        # What EXIF says already stays; a text of the same may be another.
        before = str(tags.get(tag, "")).strip("\0 ")
        if tag and kind != "BMP" and before in ("", value) and size <= room:
            tags[tag], changed, room = value, True, room - size
        elif name != "Comment" or kind != "JPEG":
            names.append(name)
    if names := [*dict.fromkeys(names)]:
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        lost.append(f"{kind} holds no text {', '.join(names[:_NAMED])}{more}")
    return tags.tobytes() if changed else held.exif


def _exif_text(text: str) -> _Words:
    return _Words(text.replace("\0", " ").encode().decode("latin-1"))


def _loaded(exif: bytes | None) -> Image.Exif:
    """An EXIF block to be changed and written, in which texts stay what they are."""
    tags = Image.Exif()
    if exif is not None:
        tags.load(exif)
    _keep_words(tags)
    return tags


def _keep_words(tags: Image.Exif) -> None:
    parts: list[Any] = [tags, *(tags.get_ifd(tag) for tag in (_EXIF_IFD, _GPS_IFD) if tag in tags)]
    if any(_INTEROP_IFD in part for part in parts[1:]):
        parts.append(tags.get_ifd(_INTEROP_IFD))
    for part in parts:
        for tag in [*part]:
            if isinstance(part[tag], str):
                part[tag] = _Words(part[tag])


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
            for part, (x, y) in ((exif.get_ifd(_EXIF_IFD), _SIZE_TAGS), (exif, _DOTS_TAGS)):
                if x in part and y in part:
                    part[x], part[y] = part[y], part[x]
        _keep_words(exif)
        return exif.tobytes() if len(exif) else None, orientation, True
    # A damaged block fails in as many ways as damaged pixels, and is no reason to lose those, nor
    # to leave the picture on its side.
    except Exception:
        return None, orientation, False
