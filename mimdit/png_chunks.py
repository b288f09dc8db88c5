"""What a PNG says of itself in chunks: texts, and the colour space of its values (ISO 15948).

Pillow keeps one text of a name, not how it was stored, and refuses a picture for a damaged text. So
these chunks are checked here, travel as they are stored, and Pillow sees none that it would choke
on.
"""

import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import PngImagePlugin

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_TEXTS = (b"tEXt", b"zTXt", b"iTXt")
# Colour chunks and their lengths.
_COLOURS = {b"cICP": 4, b"cHRM": 32, b"gAMA": 4, b"sRGB": 1}
_XMP = b"XML:com.adobe.xmp"
# Texts that Pillow reads as XMP and EXIF, which are written anew.
_METADATA = (_XMP, b"Raw profile type exif")
# Under these names Pillow keeps what it knows of a picture, and texts under the same name.
_TAKEN = {
    *(b"aspect", b"bbox", b"blend", b"chromaticity", b"default_image", b"disposal", b"dpi"),
    *(b"duration", b"exif", b"gamma", b"icc_profile", b"interlace", b"loop", b"srgb"),
    *(b"transparency", b"xmp"),
}
_LONGEST_NAME, _MOST_TEXTS = 79, 1000
# sRGB as cICP (ITU-T H.273), as gAMA and as cHRM: white, red, green and blue, x and y.
_SRGB_CODES = b"\1\x0d\0\1"
_SRGB_GAMMA = 45455
_SRGB_PLACES = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
# Of gamma and places, in units of 1e-5: programs round.
_NEAR = 500


class Chunk(NamedTuple):
    """Its type, such as b"tEXt", and what it holds."""

    kind: bytes
    data: bytes


@dataclass(frozen=True)
class Chunks:
    """Of a PNG; of other files all of it is empty.

    texts: in their order. colours: cICP, cHRM, gAMA and sRGB. notes: what was left out, in words
    for a user. sound: the file without what Pillow must not see, where there is such.
    """

    texts: tuple[Chunk, ...] = ()
    colours: tuple[Chunk, ...] = ()
    notes: tuple[str, ...] = ()
    sound: io.BytesIO | None = None


def read_chunks(path: Path) -> Chunks:
    """The chunks of a file that exists; a damaged one, or one too large, is left out with a note.

    Too large is a text beyond Pillow's limit, as far as it is compressed, and what lies beyond its
    limit for all texts together. Raises OSError.
    """
    texts: list[Chunk] = []
    colours: dict[bytes, Chunk] = {}
    unseen: list[tuple[int, int]] = []
    broken: Counter[str] = Counter()
    room, pixels = PngImagePlugin.MAX_TEXT_MEMORY, False
    with open(path, "rb", buffering=0) as file:
        for kind, start, end in _walk(file):
            pixels |= kind == b"IDAT"
            if kind not in _TEXTS and kind not in _COLOURS:
                continue
            try:
                data = _body(file, kind, start, end, room)
                if kind in _COLOURS:
                    # Behind the pixels, or a second time, it says nothing.
                    if not pixels:
                        colours.setdefault(kind, Chunk(kind, data))
                    continue
                name, text = read_text(Chunk(kind, data))
                room -= max(len(text), len(data))
                if room < 0 or len(texts) >= _MOST_TEXTS:
                    raise ValueError("too much")
                if name not in _METADATA:
                    texts.append(Chunk(kind, data))
                if name in _TAKEN:
                    unseen.append((start, end))
            except (ValueError, zlib.error):
                unseen.append((start, end))
                broken[kind.decode()] += 1
                # Looking at many bombs takes long, too.
                room -= PngImagePlugin.MAX_TEXT_CHUNK
    notes = [
        f"{count} {kind} chunk{'s' * (count > 1)} damaged or too large, left out"
        for kind, count in broken.items()
    ]
    sound = _without(path, unseen) if unseen else None
    return Chunks((*texts,), (*colours.values(),), (*notes,), sound)


def read_text(chunk: Chunk) -> tuple[bytes, bytes]:
    """The name (Latin-1) and the text of a text chunk; in iTXt it is UTF-8, else Latin-1.

    Raises ValueError or zlib.error for one that is damaged, or compressed and too large.
    """
    name, separator, rest = chunk.data.partition(b"\0")
    packed = chunk.kind == b"zTXt"
    if not separator or not 0 < len(name) <= _LONGEST_NAME:
        raise ValueError("no name")
    if chunk.kind == b"iTXt":
        flags, (_, _, rest) = rest[:2], rest[2:].split(b"\0", 2)
        packed = flags[:1] != b"\0"
        rest = flags[1:] + rest if packed else rest
    if packed:
        if rest[:1] != b"\0":
            raise ValueError("a compression that does not exist")
        stream = zlib.decompressobj()
        rest = stream.decompress(rest[1:], PngImagePlugin.MAX_TEXT_CHUNK)
        if not stream.eof:
            raise ValueError("too large, or cut")
    if chunk.kind == b"iTXt":
        rest.decode("utf-8")
    return name, rest


def words(chunk: Chunk) -> tuple[str, str]:
    """The name and the text of a sound text chunk."""
    name, text = read_text(chunk)
    return name.decode("latin-1"), text.decode("utf-8" if chunk.kind == b"iTXt" else "latin-1")


def png_info(
    chunks: Sequence[Chunk], comments: Sequence[str], xmp: bytes | None
) -> PngImagePlugin.PngInfo:
    """What Pillow writes before the pixels: chunks as they are, comments as texts, and XMP.

    The name of XMP is that of the XMP specification, part 3.
    """
    info = PngImagePlugin.PngInfo()
    for chunk in chunks:
        info.add(*chunk)
    for comment in comments:
        info.add_text("Comment", comment)
    if xmp is not None:
        info.add_itxt(_XMP, xmp.decode("utf-8", "replace"))
    return info


def other_than_srgb(colours: Sequence[Chunk]) -> bool:
    """Whether values are not sRGB's, which a picture without a profile is taken for."""
    held = dict(colours)
    if b"cICP" in held:
        return held[b"cICP"] != _SRGB_CODES
    if b"sRGB" in held:
        return False
    found = [*struct.unpack(">I", held.get(b"gAMA", struct.pack(">I", _SRGB_GAMMA)))]
    found += struct.unpack(">8I", held.get(b"cHRM", struct.pack(">8I", *_SRGB_PLACES)))
    known = (_SRGB_GAMMA, *_SRGB_PLACES)
    return any(abs(a - b) > _NEAR for a, b in zip(found, known, strict=True))


def _walk(file: io.FileIO) -> Iterator[tuple[bytes, int, int]]:
    """Type, start and end of each chunk, as far as the file has such."""
    if file.read(len(_SIGNATURE)) != _SIGNATURE:
        return
    place = len(_SIGNATURE)
    while True:
        file.seek(place)
        head = file.read(8)
        kind = head[4:]
        if len(kind) < 4 or not kind.isalpha():
            return
        end = place + 12 + int.from_bytes(head[:4], "big")
        yield kind, place, end
        if kind == b"IEND":
            return
        place = end


def _body(file: io.FileIO, kind: bytes, start: int, end: int, room: int) -> bytes:
    """What a chunk holds. Raises ValueError where it is cut, changed or too long."""
    length = end - start - 12
    if end > os.fstat(file.fileno()).st_size or length > room:
        raise ValueError("cut, or too much")
    if length != _COLOURS.get(kind, length):
        raise ValueError("another length")
    file.seek(start + 8)
    data = file.read(length)
    if zlib.crc32(kind + data).to_bytes(4, "big") != file.read(4):
        raise ValueError("changed")
    return data


def _without(path: Path, unseen: Sequence[tuple[int, int]]) -> io.BytesIO:
    """A copy of a file in memory without some of its parts, which are in their order."""
    data, place, parts = path.read_bytes(), 0, []
    for start, end in unseen:
        parts.append(data[place:start])
        place = end
    return io.BytesIO(b"".join([*parts, data[place:]]))
