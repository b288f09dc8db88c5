import os
import struct
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, IptcImagePlugin

from mimdit import image_io
from mimdit.image_io import PictureError, compare, find_pictures, read_picture, write_picture

ICC = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
RNG = np.random.default_rng(0)
COLOUR = RNG.integers(0, 256, (9, 14, 3), dtype=np.uint8)
# JPEG and lossy WebP keep smooth pictures only.
SMOOTH = np.stack(np.meshgrid(np.arange(48), np.arange(32)) * 2, axis=2).astype(np.uint8)[..., :3]


def save(path, pixels: np.ndarray = COLOUR, mode: str | None = None, **options):
    image = Image.fromarray(pixels)
    (image if mode is None else image.convert(mode)).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".tif", ".bmp"])
def test_lossless_round_trip(tmp_path, suffix):
    picture = read_picture(save(tmp_path / f"a{suffix}"))
    assert picture.rgb.dtype == np.float32 and picture.bits == 8 and not picture.gray
    write_picture(tmp_path / f"b{suffix}", picture.rgb, picture)
    np.testing.assert_array_equal(read_picture(tmp_path / f"b{suffix}").rgb * 255, COLOUR)


@pytest.mark.parametrize("suffix", [".jpg", ".JPEG", ".webp"])
def test_lossy_formats_stay_close(tmp_path, suffix):
    write_picture(tmp_path / f"a{suffix}", SMOOTH / 255)
    rgb = read_picture(tmp_path / f"a{suffix}").rgb
    assert rgb.shape == SMOOTH.shape
    assert np.abs(rgb * 255 - SMOOTH).mean() < 2


@pytest.mark.parametrize(
    ("mode", "name", "gray", "alpha"),
    [
        ("P", "a.png", False, False),
        ("P", "a.gif", False, False),
        ("1", "a.png", True, False),
        ("L", "a.png", True, False),
        ("LA", "a.png", True, True),
        ("RGBA", "a.png", False, True),
        ("CMYK", "a.jpg", False, False),
        ("I;16", "a.png", True, False),
    ],
)
def test_modes(tmp_path, mode, name, gray, alpha):
    path = save(tmp_path / name, COLOUR[..., 0] if mode == "I;16" else COLOUR, mode)
    picture = read_picture(path)
    assert picture.rgb.shape == COLOUR.shape
    assert (picture.gray, picture.alpha is not None) == (gray, alpha)
    assert picture.rgb.min() >= 0 and picture.rgb.max() <= 1


def test_transparent_palette_and_first_frame(tmp_path):
    frames = [Image.new("P", (4, 3), index) for index in (0, 1)]
    for frame in frames:
        frame.putpalette([255, 0, 0, 0, 255, 0])
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(read_picture(tmp_path / "a.gif").rgb[0, 0], [1, 0, 0])
    frames[0].save(tmp_path / "a.png", transparency=0)
    alpha = read_picture(tmp_path / "a.png").alpha
    assert alpha is not None and alpha.max() == 0


def test_one_pixel(tmp_path):
    write_picture(tmp_path / "a.png", np.full((1, 1, 3), 0.2))
    np.testing.assert_allclose(read_picture(tmp_path / "a.png").rgb, np.full((1, 1, 3), 0.2))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_and_reset(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010F] = "Maker"
    exif.get_ifd(0x8769)[0x829A] = 0.01
    path = save(tmp_path / f"a{suffix}", SMOOTH, exif=exif.tobytes())
    with Image.open(path) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    picture = read_picture(path)
    np.testing.assert_array_equal(picture.rgb * 255, expected)
    again = tmp_path / f"b{suffix}"
    write_picture(again, picture.rgb, picture)
    with Image.open(again) as image:
        image.load()
        assert image.size == expected.shape[1::-1]
        kept = image.getexif()
        assert kept.get(0x0112, 1) == 1
        assert kept[0x010F] == "Maker"
        assert float(kept.get_ifd(0x8769)[0x829A]) == pytest.approx(0.01)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_profile_is_kept(tmp_path, suffix):
    picture = read_picture(save(tmp_path / f"a{suffix}", icc_profile=ICC))
    write_picture(tmp_path / f"b{suffix}", picture.rgb, picture)
    assert read_picture(tmp_path / f"b{suffix}").icc == ICC


def test_profile_of_another_colour_space_is_left_out(tmp_path):
    cmyk = ICC[:16] + b"CMYK" + ICC[20:]
    picture = read_picture(save(tmp_path / "a.jpg", mode="CMYK", icc_profile=cmyk))
    write_picture(tmp_path / "b.jpg", picture.rgb, picture)
    assert read_picture(tmp_path / "b.jpg").icc is None


# A caption and a keyword: 0x1C, record 2, data set, length, text.
IPTC = b"\x1c\x02\x78\0\x07A storm" + b"\x1c\x02\x19\0\x03sea"


@pytest.mark.parametrize("source", ["a.jpg", "a.tif"])
def test_iptc_is_kept(tmp_path, source):
    if source == "a.jpg":
        # Photoshop's resources: a name, 8 bits of another kind, and the records.
        body = b"8BIM\x04\x0a\0\0\0\0\0\x01\1\0" + b"8BIM\x04\x04\0\0\0\0\0\x14" + IPTC
        body = b"Photoshop 3.0\0" + body
        options = {"extra": b"\xff\xed" + (len(body) + 2).to_bytes(2, "big") + body}
    else:
        tags = Image.Exif()
        tags[33723] = IPTC
        options = {"exif": tags}
    picture = read_picture(save(tmp_path / source, SMOOTH, **options))
    assert picture.iptc == IPTC and picture.exif is None
    for name in ("b.jpg", "b.tif"):
        assert not write_picture(tmp_path / name, picture.rgb, picture)
        with Image.open(tmp_path / name) as image:
            assert IptcImagePlugin.getiptcinfo(image) == {(2, 120): b"A storm", (2, 25): b"sea"}
        again = read_picture(tmp_path / name)
        assert again.iptc == IPTC
        write_picture(tmp_path / f"again-{name}", again.rgb, again)
        assert read_picture(tmp_path / f"again-{name}").iptc == IPTC
    for name, kind in (("b.png", "PNG"), ("b.webp", "WEBP")):
        notes = write_picture(tmp_path / name, picture.rgb, picture)
        assert notes == (f"{kind} holds no IPTC",)
    long = replace(picture, iptc=IPTC + bytes(70_000))
    assert "does not fit" in write_picture(tmp_path / "c.jpg", picture.rgb, long)[0]
    assert read_picture(tmp_path / "c.jpg").iptc is None


def test_iptc_declared_as_whole_numbers(tmp_path):
    path = tmp_path / "a.tif"
    tags = Image.Exif()
    tags[33723] = IPTC
    save(path, SMOOTH, exif=tags)
    # 20 undefined bytes, as five whole numbers.
    given, changed = (struct.pack("<HHI", 33723, *kind) for kind in ((7, 20), (4, 5)))
    assert path.read_bytes().count(given) == 1
    path.write_bytes(path.read_bytes().replace(given, changed))
    assert read_picture(path).iptc == IPTC


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_what_is_replaced_leaves_its_rights(tmp_path):
    path = save(tmp_path / "a.png")
    path.chmod(0o600)
    write_picture(path, np.zeros((4, 4, 3)))
    assert path.stat().st_mode & 0o777 == 0o600
    assert read_picture(path).rgb.shape == (4, 4, 3)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".webp"])
@pytest.mark.parametrize("channels", [2, 4])
def test_alpha_is_kept(tmp_path, suffix, channels):
    pixels = RNG.integers(0, 256, (9, 14, channels), dtype=np.uint8)
    picture = read_picture(save(tmp_path / "a.png", pixels))
    write_picture(tmp_path / f"b{suffix}", picture.rgb, picture)
    alpha = read_picture(tmp_path / f"b{suffix}").alpha
    assert alpha is not None
    np.testing.assert_array_equal(alpha * 255, pixels[..., -1])
    write_picture(tmp_path / "b.jpg", picture.rgb, picture)
    assert read_picture(tmp_path / "b.jpg").alpha is None


@pytest.mark.parametrize("suffix", [".png", ".tif", ".jpg"])
def test_gray_is_kept(tmp_path, suffix):
    picture = read_picture(save(tmp_path / f"a{suffix}", mode="L"))
    write_picture(tmp_path / f"b{suffix}", picture.rgb, picture)
    with Image.open(tmp_path / f"b{suffix}") as image:
        assert image.mode == "L"


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_deep_gray_is_exact(tmp_path, suffix):
    pixels = RNG.integers(0, 65536, (9, 14), dtype=np.uint16)
    picture = read_picture(save(tmp_path / f"a{suffix}", pixels))
    assert picture.bits == 16 and picture.gray
    write_picture(tmp_path / f"b{suffix}", picture.rgb, picture)
    with Image.open(tmp_path / f"b{suffix}") as image:
        np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("channels", [2, 3, 4])
def test_deep_colour_png_is_exact(tmp_path, channels):
    values = RNG.integers(0, 65536, (9, 14, channels)).astype(np.float32) / 65535
    rgb = np.repeat(values[..., :1], 3, axis=2) if channels == 2 else values[..., :3]
    alpha = None if channels == 3 else values[..., -1]
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    icc = ICC[:16] + b"GRAY" + ICC[20:] if channels == 2 else ICC
    source = image_io.Picture(rgb, alpha, 16, icc, exif.tobytes(), channels == 2)
    write_picture(tmp_path / "a.png", rgb, source)
    picture = read_picture(tmp_path / "a.png")
    assert (picture.bits, picture.gray, picture.icc) == (16, channels == 2, icc)
    assert picture.exif is not None and b"Maker" in picture.exif
    np.testing.assert_array_equal(picture.rgb, rgb)
    if alpha is not None and picture.alpha is not None:
        np.testing.assert_array_equal(picture.alpha, alpha)
    with Image.open(tmp_path / "a.png") as image:
        image.verify()
    write_picture(tmp_path / "b.tif", rgb, source)
    picture = read_picture(tmp_path / "b.tif")
    assert (picture.bits, picture.icc) == (16, None if channels == 2 else icc)
    assert picture.exif is not None and b"Maker" in picture.exif
    np.testing.assert_array_equal(picture.rgb, rgb)
    assert (picture.alpha is None) == (alpha is None)
    if alpha is not None and picture.alpha is not None:
        np.testing.assert_array_equal(picture.alpha, alpha)


def broken(tmp_path, kind):
    path = tmp_path / f"a.{'png' if kind in ('text', 'empty') else kind}"
    if kind == "text":
        path.write_text("not a picture")
    elif kind == "empty":
        path.touch()
    else:
        data = save(path, RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8)).read_bytes()
        path.write_bytes(data[: len(data) // 2])
    return path


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("text", "not a picture of a known type"),
        ("empty", "empty"),
        ("jpg", "truncated"),
        ("png", "truncated"),
        ("webp", "a.webp: "),
        ("tif", "a.tif: "),
    ],
)
def test_broken_files_are_one_sentence(tmp_path, kind, words):
    path = broken(tmp_path, kind)
    with pytest.raises(PictureError, match=words) as caught:
        read_picture(path)
    assert str(caught.value).startswith(f"{path}: ") and "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(PictureError, match="no such file"):
        read_picture(tmp_path / "a.png")
    with pytest.raises(PictureError, match="is a folder"):
        read_picture(tmp_path)


def test_too_many_pixels(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(PictureError, match="million pixels"):
        read_picture(path)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp"])
@pytest.mark.parametrize(
    ("change", "upright", "note"),
    [
        # A directory of more tags than there are bytes.
        (lambda exif: b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\0", False, "and were left out"),
        # No directory at all.
        (lambda exif: b"Exif\0\0MM\0*", False, "and were left out"),
        # The maker as a number: read well, but it cannot be written.
        (
            lambda exif: exif.replace(b"\x01\x0f\0\x02", b"\x01\x0f\0\x0b"),
            True,
            "and were left out",
        ),
        # The exposure ends early.
        (lambda exif: exif[:-6], True, "and were kept as far as they can be read"),
    ],
    ids=["tags", "head", "type", "cut"],
)
def test_damaged_exif_does_not_lose_the_picture(tmp_path, suffix, change, upright, note):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    exif.get_ifd(0x8769)[0x829A] = 0.01
    path = save(tmp_path / f"a{suffix}", SMOOTH, exif=change(exif.tobytes()))
    picture = read_picture(path)
    assert picture.rgb.shape == (SMOOTH.swapaxes(0, 1) if upright else SMOOTH).shape
    assert picture.notes == (f"the EXIF data are damaged {note}",)
    assert (picture.exif is not None) == ("kept" in note)
    again = tmp_path / f"b{suffix}"
    write_picture(again, picture.rgb, picture)
    kept = read_picture(again)
    assert not kept.notes and kept.rgb.shape == picture.rgb.shape
    assert (kept.exif is not None and b"Maker" in kept.exif) == ("kept" in note)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_non_finite_values_are_not_written(tmp_path, value):
    rgb = np.zeros((4, 4, 3))
    rgb[1, 2, 0] = value
    with pytest.raises(PictureError, match="non-finite"):
        write_picture(tmp_path / "a.png", rgb)
    assert not list(tmp_path.iterdir())


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = save(tmp_path / "a.png")
    before = path.read_bytes()

    def fail(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(PictureError, match="No space left"):
        write_picture(path, np.zeros((4, 4, 3)))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_wrong_suffix_shape_and_folder(tmp_path):
    with pytest.raises(PictureError, match=r"cannot write '\.gif'"):
        write_picture(tmp_path / "a.gif", np.zeros((4, 4, 3)))
    with pytest.raises(PictureError, match="cannot be written"):
        write_picture(tmp_path / "none" / "a.png", np.zeros((4, 4, 3)))
    with pytest.raises(ValueError, match=r"\[H, W, 3\]"):
        write_picture(tmp_path / "a.png", np.zeros((4, 4)))


def test_find_pictures(tmp_path):
    for name in ("b.png", "A.JPG", "c.txt", ".hidden.png", "x[1].png"):
        (tmp_path / name).touch()
    (tmp_path / "sub.png").mkdir()
    names = [path.name for path in find_pictures(tmp_path)]
    assert names == ["A.JPG", "b.png", "x[1].png"]
    assert find_pictures(f"{tmp_path}/*.png") == [tmp_path / "b.png", tmp_path / "x[1].png"]
    assert find_pictures(tmp_path / "x[1].png") == [tmp_path / "x[1].png"]
    assert find_pictures(tmp_path / "c.txt") == [tmp_path / "c.txt"]
    for nothing, words in (
        ("sub.png", "no pictures"),
        ("*.bmp", "no picture matches"),
        ("d.png", "no such file"),
    ):
        with pytest.raises(PictureError, match=words):
            find_pictures(tmp_path / nothing)


def test_compare():
    before, after = np.zeros((5, 6, 3), np.float32), np.full((5, 6, 3), 0.5, np.float32)
    both = compare(before, after)
    assert both.shape == (5, 14, 3)
    np.testing.assert_array_equal(both[0, :, 0], [0] * 6 + [1] * 2 + [0.5] * 6)
    with pytest.raises(ValueError, match="expected shape"):
        compare(before, after[1:])


def ink_profile(lab: tuple[int, int, int]) -> bytes:
    """A CMYK profile: no ink is white, and full cyan alone has this 8-bit Lab colour."""

    def text(kind: bytes, words: bytes) -> bytes:
        return kind + bytes(4) + words

    # lut8Type (ICC.1, 10.11): plain curves, two points an axis, the first channel slowest
    ramp = bytes(range(256))
    grid = bytearray(bytes((128, 128, 128)) * 16)
    grid[0:3], grid[24:27] = (255, 128, 128), lab
    one, nil = (1 << 16).to_bytes(4, "big"), bytes(4)
    matrix = b"".join((one, nil, nil, nil) * 2) + one
    lut = text(b"mft1", bytes((4, 3, 2, 0)) + matrix + ramp * 4 + bytes(grid) + ramp * 3)
    white = b"".join(int(v * 65536).to_bytes(4, "big") for v in (0.9642, 1.0, 0.8249))
    name = b"ink\0"
    tags = {
        b"desc": text(b"desc", len(name).to_bytes(4, "big") + name + bytes(78)),
        b"cprt": text(b"text", b"none\0"),
        b"wtpt": text(b"XYZ ", white),
        b"A2B0": lut,
    }
    table, body, place = b"", b"", 128 + 4 + 12 * len(tags)
    for tag, data in tags.items():
        data += bytes(-len(data) % 4)
        table += tag + (place + len(body)).to_bytes(4, "big") + len(data).to_bytes(4, "big")
        body += data
    head = bytes(8) + b"\x02\x20\0\0" + b"prtr" + b"CMYK" + b"Lab " + bytes(12) + b"acsp"
    head = head.ljust(68, b"\0") + white
    profile = head.ljust(128, b"\0") + len(tags).to_bytes(4, "big") + table + body
    return len(profile).to_bytes(4, "big") + profile[4:]


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_inks_become_colours_by_their_profile(tmp_path, suffix):
    inks = np.zeros((16, 32, 4), np.uint8)
    inks[:, 16:, 0] = 255
    # L* = 60, a* = 40, b* = 0: a pink that no formula makes of cyan.
    profile = ink_profile((153, 168, 128))
    options = {"quality": 100} if suffix == ".jpg" else {}
    Image.fromarray(inks, "CMYK").save(tmp_path / f"a{suffix}", icc_profile=profile, **options)
    picture = read_picture(tmp_path / f"a{suffix}")
    assert picture.notes == ("CMYK was converted to sRGB by its colour profile",)
    np.testing.assert_allclose(picture.rgb[8, 4], 1, atol=0.02)
    # CIE formulas by hand: XYZ (D50) of that Lab, Bradford, sRGB.
    np.testing.assert_allclose(picture.rgb[8, 28], [0.82, 0.45, 0.57], atol=0.03)
    assert picture.icc is not None and picture.icc[16:20] == b"RGB "
    write_picture(tmp_path / f"b{suffix}", picture.rgb, picture)
    assert read_picture(tmp_path / f"b{suffix}").icc == picture.icc


def test_inks_without_a_profile(tmp_path):
    picture = read_picture(save(tmp_path / "a.tif", mode="CMYK"))
    assert picture.icc is None and "without a colour profile" in picture.notes[0]
    np.testing.assert_allclose(picture.rgb * 255, COLOUR, atol=1)


def test_lab_becomes_srgb(tmp_path):
    # L* = 60, a* = 40, b* = 0 as bytes, of which TIFF's a* and b* are signed.
    lab = np.full((4, 5, 3), (153, 40, 0), np.uint8)
    Image.fromarray(lab, "LAB").save(tmp_path / "a.tif")
    picture = read_picture(tmp_path / "a.tif")
    np.testing.assert_allclose(picture.rgb[0, 0], [0.82, 0.45, 0.57], atol=0.03)
    assert picture.notes == ("Lab was converted to sRGB",)


@pytest.mark.parametrize("name", ["a.gif", "a.png", "a.webp", "a.tif", "a.jpg"])
def test_of_several_pictures_the_first_with_a_note(tmp_path, name):
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "green", "blue")]
    kind = {"format": "MPO"} if name == "a.jpg" else {}
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **kind)
    picture = read_picture(tmp_path / name)
    np.testing.assert_allclose(picture.rgb[4, 8], [1, 0, 0], atol=0.02)
    assert picture.notes == ("holds 3 pictures (frames or pages); only the first is restored",)
    assert read_picture(save(tmp_path / f"b{name}")).notes == ()


XMP = (
    b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:'
    b'meta/"><rdf:RDF><rdf:Description tiff:Orientation="6" dc:title="Br\xc3\xbccke"/></rdf:RDF>'
    b'</x:xmpmeta><?xpacket end="w"?>'
)


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_xmp_and_resolution_are_kept(tmp_path, suffix, deep):
    exif = Image.Exif()
    exif[0x0112] = 6
    exif.get_ifd(0x8769).update({0xA002: 48, 0xA003: 32})
    source = image_io.Picture(
        SMOOTH / np.float32(255),
        None,
        16 if deep else 8,
        ICC,
        exif.tobytes(),
        xmp=XMP,
        dpi=(300, 150),
    )
    first = tmp_path / f"a{suffix}"
    notes = write_picture(first, source.rgb, source)
    assert len(notes) == (deep and suffix in (".jpg", ".webp"))
    # Oriented, so the axes swap.
    picture = read_picture(first)
    assert picture.rgb.shape[:2] == SMOOTH.shape[1::-1]
    # Pillow itself takes it out of a TIFF that it turns.
    reset = b"" if suffix == ".tif" else b'tiff:Orientation="1"'
    assert picture.xmp == XMP.replace(b'tiff:Orientation="6"', reset)
    assert picture.bits == (16 if deep and suffix in (".png", ".tif") else 8)
    if suffix != ".webp":
        assert picture.dpi == pytest.approx((150, 300), rel=1e-3)
    second = tmp_path / f"b{suffix}"
    assert write_picture(second, picture.rgb, picture) == ()
    again = read_picture(second)
    assert (again.xmp, again.icc) == (picture.xmp, ICC)
    with Image.open(second) as image:
        image.load()
        sizes = image.getexif().get_ifd(0x8769)
        assert (sizes[0xA002], sizes[0xA003]) == image.size == (32, 48)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize(
    "exif", [None, b"Exif\0\0II*\0\x08\0\0\0\0\0\0\0\0\0"], ids=["plain", "exif"]
)
def test_deep_tiff_is_what_others_read(tmp_path, channels, exif):
    tifffile = pytest.importorskip("tifffile")
    values = RNG.integers(0, 65536, (9, 14, channels), dtype=np.uint16)
    planes = values.astype(np.float32) / 65535
    alpha = planes[..., 3] if channels == 4 else None
    source = image_io.Picture(planes[..., :3], alpha, 16, exif=exif)
    assert write_picture(tmp_path / "a.tif", source.rgb, source) == ()
    np.testing.assert_array_equal(tifffile.imread(tmp_path / "a.tif"), values)


def test_what_a_format_cannot_hold_is_said(tmp_path):
    source = image_io.Picture(COLOUR / 255, np.ones((9, 14), np.float32), 16, ICC, xmp=XMP)
    assert write_picture(tmp_path / "a.jpg", source.rgb, source) == (
        "JPEG holds no transparency",
        "JPEG holds 8 of 16 bits",
    )
    notes = write_picture(tmp_path / "a.bmp", source.rgb, source)
    assert [note.split(" holds ")[1] for note in notes] == [
        "no transparency",
        "8 of 16 bits",
        "no colour profile",
        "no XMP",
    ]
    long = image_io.Picture(source.rgb, xmp=b"x" * 70000)
    (note,) = write_picture(tmp_path / "a.jpg", source.rgb, long)
    assert "does not fit into a JPEG" in note
    assert write_picture(tmp_path / "a.png", source.rgb, long) == ()


def test_pictures_too_long_for_a_format(tmp_path):
    rgb = np.zeros((3, 16400, 3), np.float32)
    with pytest.raises(PictureError, match="WEBP holds at most 16383 pixels a side"):
        write_picture(tmp_path / "a.webp", rgb)
    for suffix in (".jpg", ".png", ".tif"):
        assert image_io.check_target(tmp_path / f"a{suffix}", 3, 16400)
        write_picture(tmp_path / f"a{suffix}", rgb)
        assert read_picture(tmp_path / f"a{suffix}").rgb.shape == rgb.shape
    with pytest.raises(PictureError, match="JPEG holds at most 65500"):
        image_io.check_target(tmp_path / "a.jpg", 70000, 1)
