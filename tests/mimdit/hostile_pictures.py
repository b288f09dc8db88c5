"""Files that look like pictures and are not: cut, damaged, absurd, or of another kind."""

import io
import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

_RNG = np.random.default_rng(7)


def sound() -> dict[str, bytes]:
    """Pictures that are well, by file name."""
    pixels = _RNG.integers(0, 256, (24, 20, 3), np.uint8)
    rgb, alpha = Image.fromarray(pixels), Image.fromarray(pixels[..., 0])
    clear = rgb.copy()
    clear.putalpha(alpha)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    deep = Image.fromarray(_RNG.integers(0, 65536, (24, 20), np.uint16))
    profile = b"\0" * 12 + b"mntrRGB XYZ " + b"\0" * 400
    kinds: dict[str, tuple[Image.Image, str, dict[str, object]]] = {
        "plain.png": (rgb, "PNG", {"exif": exif, "icc_profile": profile}),
        "clear.png": (clear, "PNG", {}),
        "deep.png": (deep, "PNG", {}),
        "palette.png": (rgb.quantize(16), "PNG", {"transparency": 0}),
        "plain.jpg": (rgb, "JPEG", {"exif": exif, "icc_profile": profile}),
        "slow.jpg": (rgb, "JPEG", {"progressive": True}),
        "inks.jpg": (rgb.convert("CMYK"), "JPEG", {}),
        "lossy.webp": (clear, "WEBP", {"exif": exif}),
        "exact.webp": (rgb, "WEBP", {"lossless": True}),
        "plain.tif": (rgb, "TIFF", {}),
        "packed.tif": (clear, "TIFF", {"compression": "tiff_adobe_deflate"}),
        "deep.tif": (deep, "TIFF", {}),
        "plain.bmp": (rgb, "BMP", {}),
        "plain.gif": (rgb, "GIF", {}),
        "plain.ppm": (rgb, "PPM", {}),
    }
    made = {}
    for name, (image, kind, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, kind, **options)
        made[name] = buffer.getvalue()
    return made


def structures(data: bytes, kind: str) -> list[int]:
    """Places where a file's parts begin: cut there, and inside the heads that stand there."""
    found: list[int] = []
    if kind == ".png":
        place = 8
        while place < len(data):
            found.append(place)
            place += 12 + struct.unpack(">I", data[place : place + 4])[0]
    elif kind == ".jpg":
        found = [i for i in range(len(data) - 1) if data[i] == 0xFF and data[i + 1] >= 0xC0]
    elif kind == ".webp":
        place = 12
        while place < len(data):
            found.append(place)
            size = struct.unpack("<I", data[place + 4 : place + 8])[0]
            place += 8 + size + size % 2
    elif kind == ".tif":
        place = struct.unpack("<I", data[4:8])[0]
        count = struct.unpack("<H", data[place : place + 2])[0]
        found = [4, 8, place, *(place + 2 + 12 * i for i in range(count + 1))]
    return sorted({place + more for place in found for more in (0, 6)} | {1, 3, 10})


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, *more: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG file of black pixels, of which only a few rows are there."""
    head = struct.pack(">IIBBBBB", width & 0xFFFFFFFF, height & 0xFFFFFFFF, depth, colour, 0, 0, 0)
    body = zlib.compress(b"\0" * 100_000, 9)
    parts = [chunk(b"IHDR", head), *more, chunk(b"IDAT", body), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def bmp(width: int, height: int) -> bytes:
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 1000, 0, 0, 54) + head + b"\0" * 900


def tiff(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, "TIFF")
    return buffer.getvalue()


def absurd() -> Iterator[tuple[str, bytes]]:
    """Sizes, depths and values that no picture has, and bombs."""
    most = 2**31 - 1
    for i, size in enumerate([(0, 0), (0, 5), (5, 0), (most, most), (most, 1), (1, most), (-1, 5)]):
        yield f"size{i}.png", png(*size)
    for i, size in enumerate([(30_000, 30_000), (100_000, 20_000)]):
        yield f"bomb{i}.png", png(*size)
        yield f"bomb{i}.bmp", bmp(*size)
        yield f"bomb{i}.ppm", b"P6 %d %d 255\n" % size
        yield f"bomb{i}.gif", b"GIF89a" + struct.pack("<HH", 65535, 65535 - i) + b"\0" * 50
    for depth, colour in ((3, 2), (16, 3), (8, 7), (255, 255)):
        yield f"depth{depth}-{colour}.png", png(20, 20, depth=depth, colour=colour)
    for i, size in enumerate([(0, 0), (-5, 5), (most, most), (1, -most)]):
        yield f"size{i}.bmp", bmp(*size)
    for i, text in enumerate([b"P6 0 0 255\n", b"P6 -1 5 255\n", b"P6 9 9 0\n", b"P5 x y z\n"]):
        yield f"size{i}.ppm", text
    text = zlib.compress(b"a" * 2**27, 9)
    yield "chunk.png", png(5, 5, chunk(b"zTXt", b"k\0\0" + text))
    yield "profile.png", png(5, 5, chunk(b"iCCP", b"k\0\0" + text))
    for i, value in enumerate([np.nan, np.inf, -np.inf, -1, 2, 1e38]):
        yield f"value{i}.tif", tiff(np.full((9, 9), value, np.float32))
    yield "wide.tif", tiff(np.full((9, 9), 2**30, np.int32))


def others() -> Iterator[tuple[str, bytes]]:
    """Files of other kinds under the suffix of a picture; some would start programs."""
    starts = {
        "html": b"<!doctype html><img src=x>",
        "svg": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        "ps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(x) (w) file\n",
        "pdf": b"%PDF-1.7\n",
        "zip": b"PK\3\4" + b"\0" * 60,
        "gzip": b"\x1f\x8b\x08" + b"\0" * 60,
        "elf": b"\x7fELF" + b"\0" * 60,
        "mp4": b"\0\0\0\x18ftypmp42" + b"\0" * 60,
        "heic": b"\0\0\0\x18ftypheic" + b"\0" * 60,
        "psd": b"8BPS\0\1" + b"\0" * 60,
        "ico": b"\0\0\1\0\1\0" + b"\0" * 60,
        "raw": b"II*\0\x10\0\0\0CR\2\0" + b"\xff" * 60,
        "nul": b"\0" * 500,
        "ones": b"\xff" * 500,
        "text": "ÿØÿà a picture".encode(),
        "pickle": b"cos\nsystem\n(S'touch hacked'\ntR.",
        "npy": b"\x93NUMPY\1\0" + b"\0" * 60,
        "empty": b"",
        "one": b"\x89",
    }
    for name, data in starts.items():
        for suffix in (".png", ".JPG"):
            yield name + suffix, data


def damaged() -> Iterator[tuple[str, bytes]]:
    """Sound files, cut at every structure and evenly, and with bytes changed."""
    for name, data in sound().items():
        stem, kind = os.path.splitext(name)
        # Results of some kinds are PNG, too: names differ in more than their suffix.
        stem = f"{kind[1:]}-{stem}"
        even = {len(data) * i // 8 for i in range(1, 8)}
        for place in sorted({*structures(data, kind), *even}):
            if 0 < place < len(data):
                yield f"{stem}-cut{place}{kind}", data[:place]
        for i in range(6):
            spoiled = bytearray(data)
            for place in _RNG.integers(0, len(data), 1 + 4 * i):
                spoiled[place] ^= int(_RNG.integers(1, 256))
            yield f"{stem}-spoiled{i}{kind}", bytes(spoiled)
        yield f"{stem}-magic{kind}", b"\0\1\2\3" + data[4:]


def write_corpus(folder: Path) -> int:
    """Fill a folder; returns how many pictures, or what goes as such, are in it."""
    folder.mkdir()
    made = [*damaged(), *absurd(), *others()]
    for name, data in made:
        (folder / name).write_bytes(data)
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "round.png").symlink_to("trip.png")
    (folder / "trip.png").symlink_to("round.png")
    (folder / "nowhere.png").symlink_to("gone/x.png")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "again").symlink_to(".", target_is_directory=True)
    # Opened without care, it would wait for a writer for ever.
    os.mkfifo(folder / "pipe.png")
    (folder / "folder.png").mkdir()
    for raw in (b"line\nbreak.png", b"\xff\xfe.png", b"tab\t\x1b[31m.png"):
        (folder / os.fsdecode(raw)).write_bytes(b"text")
    return len(made) + 6 + 3
