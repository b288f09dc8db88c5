import os

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

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
    assert np.abs(read_picture(tmp_path / "b.tif").rgb - rgb).max() < 0.51 / 255


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


def test_damaged_exif_does_not_lose_the_picture(tmp_path):
    path = save(tmp_path / "a.jpg", SMOOTH, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\0")
    assert read_picture(path).rgb.shape == SMOOTH.shape


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
