"""Words that travel with a picture: texts and colour chunks of PNG, comments, EXIF strings."""

import re
import struct
import zlib
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin, TiffImagePlugin

from mimdit.image_io import read_picture, write_picture
from tests.mimdit.hostile_pictures import chunk

RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (9, 14, 3), dtype=np.uint8)
# Kept in this order, with two of one name, three ways to store, and a language.
TEXTS = [
    (b"tEXt", b"Author\0Jane"),
    (b"iTXt", "Description\0\0\0\0\0Brücke 橋".encode()),
    (b"zTXt", b"Copyright\0\0" + zlib.compress("© Jane".encode("latin-1"))),
    (b"iTXt", b"Title\0\1\0de\0Titel\0" + zlib.compress(b"Nacht")),
    (b"iTXt", b"Title\0\0\0en\0Title\0Night"),
    (b"tEXt", b"Comment\0one\ntwo"),
    (b"tEXt", b"parameters\0" + b"x" * 3_000_000),
]
LINEAR = (b"gAMA", struct.pack(">I", 100_000))
WIDE = (b"cHRM", struct.pack(">8I", 31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000))
SRGB = (b"sRGB", b"\0")
CODES = (b"cICP", bytes((9, 16, 0, 1)))


def png(
    path: Path, *before: bytes, after: tuple[bytes, ...] = (), pixels: np.ndarray = COLOUR
) -> Path:
    """A PNG with more chunks: before its pixels, and after them."""
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    start, end = data.index(b"IDAT") - 4, data.index(b"IEND") - 4
    parts = [data[:start], *before, data[start:end], *after, data[end:]]
    path.write_bytes(b"".join(parts))
    return path


def chunks(path: Path) -> list[tuple[bytes, bytes]]:
    """All chunks of a sound PNG, by another program's rules: every one has its checksum."""
    data, place, found = path.read_bytes(), 8, []
    while place < len(data):
        size = struct.unpack(">I", data[place : place + 4])[0]
        kind, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert chunk(kind, body) == data[place : place + 12 + size]
        found.append((kind, body))
        place += 12 + size
    return found


def deep(path: Path, channels: int) -> None:
    """Makes 16 bits of a picture, in place."""
    picture = read_picture(path)
    alpha = np.ones(picture.rgb.shape[:2], np.float32) if channels == 4 else None
    made = type(picture)(
        picture.rgb, alpha, 16, texts=picture.texts, colours=picture.colours, dpi=picture.dpi
    )
    write_picture(path, made.rgb, made)


@pytest.mark.parametrize("channels", [None, 3, 4])
@pytest.mark.parametrize("late", [False, True])
def test_texts_of_a_png_are_kept_as_they_are(
    tmp_path: Path, late: bool, channels: int | None
) -> None:
    made = tuple(chunk(*each) for each in TEXTS)
    path = png(tmp_path / "a.png", *made[: 0 if late else 9], after=made if late else ())
    if channels:
        deep(path, channels)
    picture = read_picture(path)
    assert not picture.notes and picture.bits == (16 if channels else 8)
    assert write_picture(tmp_path / "b.png", picture.rgb, picture) == ()
    found = [each for each in chunks(tmp_path / "b.png") if each[0] in (b"tEXt", b"zTXt", b"iTXt")]
    assert found == TEXTS
    assert np.array_equal(read_picture(tmp_path / "b.png").rgb, picture.rgb)
    with Image.open(tmp_path / "b.png") as image:
        assert isinstance(image, PngImagePlugin.PngImageFile)
        assert image.text["Author"] == "Jane" and image.text["Copyright"] == "© Jane"


@pytest.mark.parametrize("suffix", [".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("turned", [False, True])
def test_texts_that_exif_has_tags_for_reach_other_formats(
    tmp_path: Path, suffix: str, turned: bool
) -> None:
    path = png(tmp_path / "a.png", *(chunk(*each) for each in TEXTS[:6]))
    if turned:
        exif = Image.Exif()
        exif[0x0112], exif[0x010F] = 6, "Maker"
        exif.get_ifd(0x8769)[0x829A] = 0.01
        path.unlink()
        block = exif.tobytes().removeprefix(b"Exif\0\0")
        path = png(path, chunk(b"eXIf", block), *(chunk(*each) for each in TEXTS[:6]))
    picture = read_picture(path)
    notes = write_picture(tmp_path / f"b{suffix}", picture.rgb, picture)
    kind = {".jpg": "JPEG", ".webp": "WEBP", ".tif": "TIFF"}[suffix]
    lost = "Title" if kind == "JPEG" else "Title, Comment"
    assert notes == (f"{kind} holds no text {lost}",)
    with Image.open(tmp_path / f"b{suffix}") as image:
        tags = image.getexif()
        # Pillow takes the bytes of a text for Latin-1; they are UTF-8.
        words = {tag: str(tags[tag]).encode("latin-1").decode() for tag in (270, 315, 33432)}
        assert words == {270: "Brücke 橋", 315: "Jane", 33432: "© Jane"}
        if kind == "JPEG":
            assert image.info["comment"] == b"one\ntwo"
        if turned:
            assert tags[0x010F] == "Maker"
            assert float(tags.get_ifd(0x8769)[0x829A]) == pytest.approx(0.01)


def test_what_exif_says_already_is_not_replaced(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[315] = "Joan"
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    path = png(tmp_path / "a.png", chunk(b"eXIf", block), chunk(*TEXTS[0]))
    picture = read_picture(path)
    notes = write_picture(tmp_path / "b.jpg", picture.rgb, picture)
    assert notes == ("JPEG holds no text Author",)
    with Image.open(tmp_path / "b.jpg") as image:
        assert image.getexif()[315] == "Joan"


def test_a_long_text_does_not_push_out_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F], exif[270] = "Maker", "   "
    block = exif.tobytes().removeprefix(b"Exif\0\0")
    for size in (60_000, 65_400, 65_500, 70_000):
        text = b"Description\0" + b"x" * size
        made = [chunk(b"eXIf", block), chunk(*TEXTS[0]), chunk(b"tEXt", text)]
        picture = read_picture(png(tmp_path / "a.png", *made))
        notes = write_picture(tmp_path / "b.jpg", picture.rgb, picture)
        with Image.open(tmp_path / "b.jpg") as image:
            tags = image.getexif()
            assert tags[0x010F] == "Maker" and tags[315] == "Jane"
            kept = tags[270] == "x" * size
        # In between it depends on a few bytes.
        assert kept or size > 65_000
        assert not kept or size < 65_500
        assert notes == (() if kept else ("JPEG holds no text Description",))
        # Elsewhere there is room.
        assert not write_picture(tmp_path / "b.webp", picture.rgb, picture)


def test_names_of_many_lost_texts_are_cut_short(tmp_path: Path) -> None:
    made = [chunk(b"tEXt", b"k%d\0text" % i) for i in (0, 0, 1, 2, 3, 4)]
    picture = read_picture(png(tmp_path / "a.png", *made))
    notes = write_picture(tmp_path / "b.bmp", picture.rgb, picture)
    assert notes == ("BMP holds no text k0, k1, k2 and 2 more",)


@cache
def bombs() -> dict[str, list[bytes]]:
    """Chunks of which none may be kept."""
    bomb = zlib.compress(b"a" * 2**25, 9)
    cut = zlib.compress(RNG.bytes(500))[:200]
    spoiled = bytearray(chunk(b"tEXt", b"Author\0Jane"))
    spoiled[12] ^= 1
    return {
        "packed": [chunk(b"zTXt", b"k\0\0" + bomb), chunk(b"iTXt", b"k\0\1\0\0\0" + bomb)],
        "xmp": [chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + bomb)],
        "cut": [chunk(b"zTXt", b"k\0\0" + cut), chunk(b"iTXt", b"k\0\1\0\0\0" + cut)],
        "method": [chunk(b"zTXt", b"k\0\7x"), chunk(b"iTXt", b"k\0\1\7\0\0x")],
        "fields": [
            chunk(b"iTXt", b"k\0\0"),
            chunk(b"iTXt", b"k\0\0\0one\0two"),
            chunk(b"zTXt", b""),
        ],
        "name": [
            chunk(b"tEXt", b"\0text"),
            chunk(b"tEXt", b"k" * 80 + b"\0x"),
            chunk(b"tEXt", b"k"),
        ],
        "coding": [chunk(b"iTXt", b"k\0\0\0\0\0\xff\xfe")],
        "checksum": [bytes(spoiled)],
        "many": [chunk(b"tEXt", b"k\0x")] * 2000,
        "colour": [chunk(b"gAMA", b"\0"), chunk(b"cHRM", b"\0" * 9), chunk(b"sRGB", b"")],
    }


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", sorted(bombs()))
def test_a_bad_chunk_is_left_out_with_a_note(tmp_path: Path, name: str, late: bool) -> None:
    bad, good = bombs()[name], chunk(*TEXTS[1])
    made = (good, *bad)
    path = png(tmp_path / "a.png", *made[: 0 if late else None], after=made if late else ())
    picture = read_picture(path)
    np.testing.assert_array_equal(picture.rgb * 255, COLOUR)
    assert picture.xmp is None and not picture.colours
    left_out = 0
    for note in picture.notes:
        found = re.fullmatch(r"(\d+) \w{4} chunks? damaged or too large, left out", note)
        assert found is not None, note
        left_out += int(found[1])
    kept = 999 if name == "many" else 0
    assert left_out == len(bad) - kept and len(picture.texts) == 1 + kept
    assert tuple(picture.texts[0]) == TEXTS[1]
    assert write_picture(tmp_path / "b.png", picture.rgb, picture) == ()
    assert not read_picture(tmp_path / "b.png").notes


def test_all_texts_together_have_a_limit(tmp_path: Path) -> None:
    some = zlib.compress(b"a" * 900_000, 9)
    made = [chunk(b"zTXt", b"k%d\0\0" % i + some) for i in range(100)]
    picture = read_picture(png(tmp_path / "a.png", *made))
    assert len(picture.texts) == 2**26 // 900_000
    assert picture.notes == ("26 zTXt chunks damaged or too large, left out",)


def test_a_text_is_not_taken_for_something_else(tmp_path: Path) -> None:
    names = (b"icc_profile", b"dpi", b"transparency", b"xmp", b"exif", b"interlace", b"aspect")
    path = png(tmp_path / "a.png", *(chunk(b"tEXt", name + b"\0text") for name in names))
    picture = read_picture(path)
    assert not picture.notes
    assert picture.icc is picture.dpi is picture.alpha is picture.xmp is picture.exif is None
    np.testing.assert_array_equal(picture.rgb * 255, COLOUR)
    assert [name for _, name in picture.texts] == [name + b"\0text" for name in names]
    for suffix in (".png", ".jpg"):
        write_picture(tmp_path / f"b{suffix}", picture.rgb, picture)
        assert read_picture(tmp_path / f"b{suffix}").icc is None


def test_an_orientation_in_a_text_is_applied_once(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    block = exif.tobytes()
    text = f"\nexif\n{len(block)}\n{block.hex()}\n".encode()
    path = png(tmp_path / "a.png", chunk(b"tEXt", b"Raw profile type exif\0" + text))
    picture = read_picture(path)
    assert picture.rgb.shape[:2] == COLOUR.shape[1::-1] and not picture.texts
    write_picture(tmp_path / "b.png", picture.rgb, picture)
    assert read_picture(tmp_path / "b.png").rgb.shape == picture.rgb.shape


@pytest.mark.parametrize("channels", [None, 3, 4])
def test_colour_chunks_are_kept(tmp_path: Path, channels: int | None) -> None:
    path = png(tmp_path / "a.png", *(chunk(*each) for each in (CODES, WIDE, LINEAR, SRGB)))
    if channels:
        deep(path, channels)
    picture = read_picture(path)
    assert write_picture(tmp_path / "b.png", picture.rgb, picture) == ()
    kinds = (b"cICP", b"cHRM", b"gAMA", b"sRGB")
    found = [each for each in chunks(tmp_path / "b.png") if each[0] in kinds]
    assert found == [CODES, WIDE, LINEAR, SRGB]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ([LINEAR], "gAMA"),
        ([WIDE, LINEAR], "cHRM and gAMA"),
        ([CODES, SRGB], "cICP and sRGB"),
        ([SRGB, LINEAR], None),
        ([(b"cICP", bytes((1, 13, 0, 1))), LINEAR], None),
        ([(b"gAMA", struct.pack(">I", 45454))], None),
    ],
)
def test_colours_that_another_format_cannot_name_are_noted(
    tmp_path: Path, given: list[tuple[bytes, bytes]], named: str | None
) -> None:
    picture = read_picture(png(tmp_path / "a.png", *(chunk(*each) for each in given)))
    for suffix, kind in ((".jpg", "JPEG"), (".tif", "TIFF"), (".bmp", "BMP")):
        notes = write_picture(tmp_path / f"b{suffix}", picture.rgb, picture)
        said = f"{kind} holds no {named}, which say what the colours are; they may shift"
        assert notes == ((said,) if named else ())


# Two, of which one is no UTF-8, one ends with NUL, and the third is as long as they may be.
COMMENTS = (b"caf\xe9", "Brücke\0".encode(), b"x" * 65533)


def commented(path: Path) -> Path:
    made = [b"\xff\xfe" + struct.pack(">H", len(c) + 2) + c for c in COMMENTS]
    Image.fromarray(COLOUR).save(path, extra=b"".join(made))
    return path


def test_comments_of_a_jpeg_are_kept(tmp_path: Path) -> None:
    picture = read_picture(commented(tmp_path / "a.jpg"))
    assert picture.comments == COMMENTS and not picture.notes
    assert write_picture(tmp_path / "b.jpg", picture.rgb, picture) == ()
    assert read_picture(tmp_path / "b.jpg").comments == COMMENTS
    assert write_picture(tmp_path / "c.png", picture.rgb, picture) == ()
    found = [data for kind, data in chunks(tmp_path / "c.png") if kind in (b"tEXt", b"iTXt")]
    # Both fit Latin-1, which tEXt holds.
    words = [b"Comment\0" + text for text in (b"caf\xe9", b"Br\xfccke", COMMENTS[2])]
    assert found == words
    for suffix, kind in ((".webp", "WEBP"), (".tif", "TIFF"), (".bmp", "BMP")):
        notes = write_picture(tmp_path / f"d{suffix}", picture.rgb, picture)
        assert notes == (f"{kind} holds no comment",)


def test_comments_of_a_gif_and_comments_too_long(tmp_path: Path) -> None:
    long = b"y" * 70_000
    for comment, notes in ((b"a storm", ()), (long, ("a comment of 70000 bytes",))):
        Image.fromarray(COLOUR).quantize(8).save(tmp_path / "a.gif", comment=comment)
        picture = read_picture(tmp_path / "a.gif")
        assert picture.comments == (comment,)
        write_picture(tmp_path / "b.png", picture.rgb, picture)
        assert (b"tEXt", b"Comment\0" + comment) in chunks(tmp_path / "b.png")
        lost = write_picture(tmp_path / "b.jpg", picture.rgb, picture)
        assert len(lost) == len(notes)
        assert all(note.startswith(words) for note, words in zip(lost, notes, strict=True))
        assert read_picture(tmp_path / "b.jpg").comments == (() if lost else (comment,))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tif"])
@pytest.mark.parametrize("text", ["© Jürgen 橋".encode(), "© Jürgen".encode("latin-1")])
def test_texts_in_exif_stay_byte_for_byte(tmp_path: Path, suffix: str, text: bytes) -> None:
    # Pillow writes ASCII alone, so other bytes of that length take the place of it.
    plain = "#" * len(text)
    exif = Image.Exif()
    exif[33432] = exif[315] = plain
    # A lens, in the directory of the exposure.
    exif.get_ifd(0x8769)[0xA434] = plain
    path = tmp_path / f"a{suffix}"
    if suffix == ".tif":
        Image.fromarray(COLOUR).save(path, exif=exif.tobytes())
        path.write_bytes(path.read_bytes().replace(plain.encode(), text))
    else:
        Image.fromarray(COLOUR).save(path, exif=exif.tobytes().replace(plain.encode(), text))
    picture = read_picture(tmp_path / f"a{suffix}")
    assert picture.exif is not None and picture.exif.count(text + b"\0") == 3
    for name in ("b.jpg", "b.png", "b.webp", "b.tif"):
        assert write_picture(tmp_path / name, picture.rgb, picture) == ()
        again = read_picture(tmp_path / name).exif
        assert again is not None and again.count(text + b"\0") == 3


def test_tags_of_a_tiff_are_kept(tmp_path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    words = {270: "A storm", 305: "Editor", 306: "2024:01:02 03:04:05", 315: "Jane", 33432: "Jane"}
    for tag, text in words.items():
        tags[tag] = text
    # A ratio, without a unit.
    tags[282], tags[283], tags[296] = 72.5, 144.0, 1
    Image.fromarray(COLOUR).save(tmp_path / "a.tif", tiffinfo=tags)
    picture = read_picture(tmp_path / "a.tif")
    assert picture.dpi is None and not picture.notes
    assert write_picture(tmp_path / "b.tif", picture.rgb, picture) == ()
    with Image.open(tmp_path / "b.tif") as image:
        assert isinstance(image, TiffImagePlugin.TiffImageFile)
        kept = {tag: image.tag_v2[tag] for tag in words}
        assert kept == words
        assert [float(image.tag_v2[tag]) for tag in (282, 283, 296)] == [72.5, 144, 1]
    for name in ("b.png", "b.jpg", "b.webp"):
        assert write_picture(tmp_path / name, picture.rgb, picture) == ()
        with Image.open(tmp_path / name) as image:
            exif = image.getexif()
            assert {tag: exif[tag] for tag in words} == words


@pytest.mark.parametrize("suffix", [".jpg", ".tif", ".png"])
def test_dots_turn_with_the_picture(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[282], exif[283], exif[296] = 6, 300.0, 150.0, 2
    Image.fromarray(COLOUR).save(tmp_path / f"a{suffix}", exif=exif, dpi=(300, 150))
    picture = read_picture(tmp_path / f"a{suffix}")
    assert picture.dpi == pytest.approx((150, 300), rel=1e-3)
    write_picture(tmp_path / f"b{suffix}", picture.rgb, picture)
    with Image.open(tmp_path / f"b{suffix}") as image:
        image.load()
        assert image.info["dpi"] == pytest.approx((150, 300), rel=1e-3)
        kept = image.getexif()
        assert (float(kept[282]), float(kept[283])) == pytest.approx((150, 300), rel=1e-3)


def test_a_tiff_that_names_no_resolution_has_none(tmp_path: Path) -> None:
    Image.fromarray(COLOUR).save(tmp_path / "a.tif")
    picture = read_picture(tmp_path / "a.tif")
    assert picture.dpi is None
    for name in ("b.png", "b.jpg"):
        write_picture(tmp_path / name, picture.rgb, picture)
        assert read_picture(tmp_path / name).dpi is None


def test_pixels_that_are_not_square_are_noted(tmp_path: Path) -> None:
    path = png(tmp_path / "a.png", chunk(b"pHYs", struct.pack(">IIB", 4, 3, 0)))
    assert read_picture(path).notes == ("its pixels are not square (4:3), which is not kept",)
    path = png(tmp_path / "b.png", chunk(b"pHYs", struct.pack(">IIB", 1, 1, 0)))
    assert not read_picture(path).notes
