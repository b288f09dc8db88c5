"""Crops of files that decode little more than themselves."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimdit.image_io import PictureError
from training.datasets.reading import PictureFile


def _noisy(height: int = 150, width: int = 200) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 5, width // 5, 3), np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


SAVES: dict[str, Callable[[Image.Image, Path], object]] = {
    "a.png": lambda im, p: im.save(p),
    "palette.png": lambda im, p: im.convert("P").save(p),
    "alpha.png": lambda im, p: im.convert("RGBA").save(p),
    "444.jpg": lambda im, p: im.save(p, quality=90, subsampling="4:4:4"),
    "420.JPG": lambda im, p: im.save(p, quality=90, subsampling="4:2:0"),
    "progressive.jpeg": lambda im, p: im.save(p, quality=90, progressive=True),
    "restarts.jpg": lambda im, p: im.save(p, quality=90, restart_marker_rows=1),
    "gray.jpg": lambda im, p: im.convert("L").save(p),
    "a.webp": lambda im, p: im.save(p, lossless=True),
    "a.tif": lambda im, p: im.save(p, compression="tiff_adobe_deflate"),
    "a.bmp": lambda im, p: im.save(p),
}


@pytest.mark.parametrize("name", SAVES)
def test_crops_are_those_of_the_whole_picture(name: str, tmp_path: Path) -> None:
    SAVES[name](_noisy(), tmp_path / name)
    with Image.open(tmp_path / name) as image:
        whole = np.asarray(image.convert("RGB"))
    for top, left in ((0, 0), (37, 51), (150 - 64, 200 - 64)):
        file = PictureFile(tmp_path / name)
        assert file.size == (150, 200)
        crop = file.crop(top, left, 64, 64)
        assert crop.dtype == np.uint8
        assert np.array_equal(crop, whole[top : top + 64, left : left + 64])
    box = (20.5, 0.0, 120.5, 100.0)
    wanted = Image.fromarray(whole).resize((80, 80), Image.Resampling.BICUBIC, box=box)
    assert np.array_equal(PictureFile(tmp_path / name).resized(box, 80), np.asarray(wanted))
    with pytest.raises(ValueError, match=r"crop: expected .*got \(100, 0, 64, 64\)"):
        PictureFile(tmp_path / name).crop(100, 0, 64, 64)


def _cut_off(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _overwritten(data: bytes) -> bytes:
    half = len(data) // 2
    return data[:half] + bytes(half - 40) + data[2 * half - 40 :]


@pytest.mark.parametrize(("name", "broken"), [("420.JPG", _cut_off), ("a.png", _overwritten)])
def test_rows_below_a_crop_are_not_decoded(
    name: str, broken: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    """A file broken below the crop still gives it; one broken within it says so."""
    path = tmp_path / name
    SAVES[name](_noisy(1500, 400), path)
    upper = PictureFile(path).crop(0, 0, 64, 64)
    path.write_bytes(broken(path.read_bytes()))
    assert np.array_equal(PictureFile(path).crop(0, 0, 64, 64), upper)
    with pytest.raises(PictureError, match="damaged or truncated"):
        PictureFile(path).crop(1400, 0, 64, 64)


def test_shrunken_crops_of_jpegs_are_decoded_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _noisy(800, 1000).save(tmp_path / "a.jpg", quality=95)
    asked = []
    draft = Image.Image.draft

    with Image.open(tmp_path / "a.jpg") as image:
        monkeypatch.setattr(
            type(image), "draft", lambda self, *a: asked.append(a) or draft(self, *a), raising=False
        )
        whole = image.convert("RGB")
    box = (100.0, 0.0, 900.0, 800.0)
    wanted = np.asarray(whole.resize((100, 100), Image.Resampling.BICUBIC, box=box), float)
    found = PictureFile(tmp_path / "a.jpg").resized(box, 100)
    assert asked == [("RGB", (250, 200))]
    assert np.abs(found - wanted).mean() < 2


def test_turned_and_deep_pictures(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = _noisy(40, 60)
    picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    assert PictureFile(tmp_path / "turned.jpg").size == (60, 40)
    deep = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    crop = PictureFile(tmp_path / "deep.png").crop(10, 0, 32, 64)
    np.testing.assert_allclose(crop[..., 1], deep[10:42] / 257, atol=0.51)
