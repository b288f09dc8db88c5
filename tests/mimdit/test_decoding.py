"""Rare kinds of files: what they hold, and that it comes through to what is written."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mimdit.image_io import PictureError, read_picture, write_picture
from mimdit.metadata import turn
from mimdit.picture import Picture

H, W = 11, 14
DEEP = np.random.default_rng(0).integers(0, 65536, (H, W, 4)).astype(np.uint16)
# TIFF: what the values mean, and what a fourth channel is.
WHITE_IS_ZERO, GRAY, RGB, INKS = 0, 1, 2, 5
UNKNOWN, MULTIPLIED, ALPHA = 0, 1, 2


def tiff(
    parts: list[bytes], channels: int, meaning: int, order: str = "<", **tags: list[int]
) -> bytes:
    """TIFF 6.0 of 16-bit values H × W, in one strip for all channels or one for each."""
    entries = {
        256: [W],
        257: [H],
        258: [16] * channels,
        259: tags.get("compression", [1]),
        262: [meaning],
        274: tags.get("turned", [1]),
        277: [channels],
        278: [H],
        279: [len(part) for part in parts],
        284: tags.get("planar", [1]),
        **({338: tags["extra"]} if "extra" in tags else {}),
        **({339: tags["kind"] * channels} if "kind" in tags else {}),
    }
    first = 8 + sum(map(len, parts))
    starts = np.cumsum([8, *map(len, parts)])[:-1].tolist()
    entries = dict(sorted((entries | {273: starts}).items()))
    place, fields, behind = first + 2 + 12 * len(entries) + 4, b"", b""
    for tag, values in entries.items():
        data = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            data, behind = struct.pack(f"{order}I", place + len(behind)), behind + data
        fields += struct.pack(f"{order}HHI", tag, 4, len(values)) + data
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}I", first)
    count = struct.pack(f"{order}H", len(entries))
    return b"".join([head, *parts, count, fields, bytes(4), behind])


def values(pixels: np.ndarray, order: str = "<") -> bytes:
    return pixels.astype(f"{order}u2").tobytes()


def read(folder: Path, data: bytes, name: str = "a.tif") -> Picture:
    path = folder / name
    path.write_bytes(data)
    return read_picture(path)


def whole(picture: Picture) -> np.ndarray:
    """Colour, and alpha where there is such, from 0 to 65535."""
    alpha = [] if picture.alpha is None else [picture.alpha[..., None]]
    return np.rint(np.concatenate([picture.rgb, *alpha], axis=2) * 65535)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("channels", [3, 4])
def test_planes_of_their_own(tmp_path: Path, channels: int, order: str) -> None:
    """Each channel in a strip of its own."""
    parts = [values(DEEP[..., c], order) for c in range(channels)]
    extra = {"extra": [ALPHA]} if channels == 4 else {}
    picture = read(tmp_path, tiff(parts, channels, RGB, order, planar=[2], **extra))
    assert picture.bits == 16 and not picture.notes
    assert np.array_equal(whole(picture), DEEP[..., :channels])


def test_compressed_planes_have_a_note(tmp_path: Path) -> None:
    parts = [zlib.compress(values(DEEP[..., c])) for c in range(3)]
    picture = read(tmp_path, tiff(parts, 3, RGB, planar=[2], compression=[8]))
    assert picture.bits == 8 and picture.notes == ("its 16 bits a channel were read as 8",)
    assert np.array_equal(np.rint(picture.rgb * 255), DEEP[..., :3] >> 8)


@pytest.mark.parametrize("order", ["<", ">"])
def test_a_fourth_channel_of_unknown_meaning_is_left_out(tmp_path: Path, order: str) -> None:
    data = tiff([values(DEEP, order)], 4, RGB, order, extra=[UNKNOWN])
    picture = read(tmp_path, data)
    assert picture.bits == 16 and picture.alpha is None
    assert np.array_equal(whole(picture), DEEP[..., :3])


def test_colours_multiplied_by_alpha(tmp_path: Path) -> None:
    multiplied = DEEP.copy()
    multiplied[..., :3] = np.rint(DEEP[..., :3] * (DEEP[..., 3:] / 65535.0))
    multiplied[0, 0] = 0
    picture = read(tmp_path, tiff([values(multiplied)], 4, RGB, extra=[MULTIPLIED]))
    found = whole(picture)
    assert picture.bits == 16 and np.array_equal(found[..., 3], multiplied[..., 3])
    # As far as rounding left the colour there.
    off = np.abs(found - DEEP)[..., :3] * (multiplied[..., 3:] / 65535)
    off[0, 0] = 0
    assert off.max() <= 1 and np.array_equal(found[0, 0], [0, 0, 0, 0])


def test_white_is_zero(tmp_path: Path) -> None:
    picture = read(tmp_path, tiff([values(DEEP[..., 0])], 1, WHITE_IS_ZERO))
    assert picture.gray and np.array_equal(whole(picture)[..., 0], 65535 - DEEP[..., 0])
    write_picture(tmp_path / "b.tif", picture.rgb, picture)
    assert np.array_equal(whole(read_picture(tmp_path / "b.tif")), whole(picture))


@pytest.mark.parametrize("orientation", [2, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("mode", ["L", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_plain_values_on_their_side(tmp_path: Path, mode: str, orientation: int) -> None:
    if mode == "I;16":
        image = Image.fromarray(DEEP[..., 0])
    else:
        image = Image.fromarray((DEEP[..., :3] >> 8).astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "plain.tif")
    image.save(tmp_path / "turned.tif", exif=exif)
    plain, turned = (read_picture(tmp_path / f"{name}.tif") for name in ("plain", "turned"))
    assert np.array_equal(turned.rgb, turn(plain.rgb, orientation))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("planar", [1, 2])
def test_deep_colour_on_its_side(tmp_path: Path, planar: int, orientation: int) -> None:
    pixels = DEEP[..., :3]
    parts = [values(pixels)] if planar == 1 else [values(pixels[..., c]) for c in range(3)]
    picture = read(tmp_path, tiff(parts, 3, RGB, planar=[planar], turned=[orientation]))
    assert np.array_equal(whole(picture), turn(pixels, orientation))


def test_inks_with_16_bits_have_a_note(tmp_path: Path) -> None:
    picture = read(tmp_path, tiff([values(DEEP)], 4, INKS))
    assert picture.bits == 8 and "its 16 bits a channel were read as 8" in picture.notes


def test_a_tiff_of_a_rare_kind_is_not_told_to_be_a_tiff(tmp_path: Path) -> None:
    # Values of half precision.
    with pytest.raises(PictureError, match="or one of a rare kind; save it again with 8 or 16"):
        read(tmp_path, tiff([values(DEEP)], 3, RGB, kind=[3]))


def png(bits: int, kind: int, rows: list[bytes], key: list[int]) -> bytes:
    """PNG with one value, or colour, that stands for nothing (ISO 15948, 11.3.2.1)."""
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", W, H, bits, kind, 0, 0, 0),
        b"tRNS": struct.pack(f">{len(key)}H", *key),
        b"IDAT": zlib.compress(b"".join(b"\0" + row for row in rows)),
        b"IEND": b"",
    }
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_deep_value_that_stands_for_nothing(tmp_path: Path, channels: int) -> None:
    pixels, kind = DEEP[..., :channels], {1: 0, 3: 2}[channels]
    key = pixels[3, 4].tolist()
    picture = read(tmp_path, png(16, kind, [values(row, ">") for row in pixels], key), "a.png")
    assert picture.bits == 16 and picture.alpha is not None
    assert np.array_equal(picture.alpha == 0, (pixels == pixels[3, 4]).all(-1))
    assert picture.alpha.max() == 1
    wanted = np.broadcast_to(pixels, (H, W, 3))
    write_picture(tmp_path / "b.png", picture.rgb, picture)
    for found in (picture, read_picture(tmp_path / "b.png")):
        assert np.array_equal(whole(found)[..., :3], wanted)
        assert found.alpha is not None and np.array_equal(found.alpha, picture.alpha)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_gray_value_that_stands_for_nothing(tmp_path: Path, bits: int) -> None:
    gray = (DEEP[..., 0] >> (16 - bits)).astype(np.uint8)
    places = np.unpackbits(gray[..., None], axis=2)[..., 8 - bits :].reshape(H, -1)
    rows = [row.tobytes() for row in np.packbits(places, axis=1)]
    key = int(gray[3, 4])
    picture = read(tmp_path, png(bits, 0, rows, [key]), "a.png")
    assert picture.gray and picture.alpha is not None
    assert np.array_equal(picture.alpha, (gray != key).astype(np.float32))
    assert np.array_equal(np.rint(picture.rgb[..., 0] * (2**bits - 1)), gray)


def webp(folder: Path, channels: tuple[int, ...] = (3,), **options: Any) -> Picture:
    """Of one picture, or an animation of several."""
    pixels = np.random.default_rng(1).integers(0, 256, (20, 24, 4), np.uint8)
    frames = [Image.fromarray(pixels[..., :c]) for c in channels]
    buffer = io.BytesIO()
    many = {"save_all": True, "append_images": frames[1:]} if len(frames) > 1 else {}
    frames[0].save(buffer, "WEBP", exact=True, **options, **many)
    return read(folder, buffer.getvalue(), "a.webp")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"channels": (4,)},
        {"exif": b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"},
        {"channels": (3, 3)},
    ],
    ids=["plain", "alpha", "exif", "animated"],
)
def test_a_webp_without_loss_stays_one(tmp_path: Path, options: dict[str, Any]) -> None:
    picture = webp(tmp_path, lossless=True, **options)
    assert picture.lossless
    write_picture(tmp_path / "b.webp", picture.rgb, picture)
    again = read_picture(tmp_path / "b.webp")
    assert again.lossless and np.array_equal(whole(again), whole(picture))
    lossy = webp(tmp_path, quality=80, **options)
    write_picture(tmp_path / "b.webp", lossy.rgb, lossy)
    assert not lossy.lossless and not read_picture(tmp_path / "b.webp").lossless
