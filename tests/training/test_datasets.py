"""Readers of data sets, crops of their files, and torch data sets of them."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from mimdit.image_io import PictureError
from tests.training import data_folders
from training.datasets import crops, layouts
from training.datasets.layouts import LAYOUTS, detect, read
from training.datasets.pairs import PackedPairs, Pair
from training.datasets.reading import PictureFile
from training.degrade import FOUNDIR_TYPES, kinds_of

# Layout: its fixture, pairs of all of it, of its test split, and their kinds.
LAYOUT_CASES = {
    "foundir": (data_folders.foundir, 40, 40, None),
    "uhdll": (data_folders.uhdll, 4, 2, ("low_light",)),
    "realrain": (data_folders.realrain, 8, 4, ("rain",)),
    "hazerd": (data_folders.hazerd, 10, 10, ("haze",)),
    "4krd": (data_folders.fourkrd, 6, 6, ("blur",)),
    "folder": (data_folders.folders, 3, 3, ()),
}


@pytest.mark.parametrize("name", LAYOUT_CASES)
def test_layout(name: str, tmp_path: Path) -> None:
    make, whole, test, kinds = LAYOUT_CASES[name]
    root = make(tmp_path / "data set")
    listing = read(name, root)
    assert detect(root) == name
    assert len(listing.pairs) == whole and not listing.faults
    assert len(read(name, root, "test").pairs) == test
    assert len({pair.name for pair in listing.pairs}) == whole
    for pair in listing.pairs:
        assert pair.clean is not None and pair.clean.is_file() and pair.damaged.is_file()
        assert pair.clean != pair.damaged
        assert pair.kinds == (FOUNDIR_TYPES[pair.group] if kinds is None else kinds)


def test_published_counts_add_up() -> None:
    assert sum(layouts.FOUNDIR_TEST.values()) == 1500
    assert list(layouts.FOUNDIR_TEST) == list(FOUNDIR_TYPES)
    assert layouts.FOUNDIR_TEST["08Haze"] == 200 and layouts.FOUNDIR_TEST["02Blur_Noise"] == 50
    assert sum(layouts.REALRAIN.values()) == 1120
    assert layouts.UHDLL == {"train": ("training_set", 2000), "test": ("testing_set", 150)}


def test_metadata_lines(tmp_path: Path) -> None:
    root = data_folders.foundir(tmp_path)
    lines = [
        "01Blur/GT/0001.png, 01Blur/LQ/0001.png",
        "",
        "05Noise/GT/0002.png,05Noise/LQ/0002.png",
    ]
    (root / "meta.txt").write_text("\n".join(lines))
    assert [p.name for p in read("foundir", root / "meta.txt").pairs] == [
        "01Blur/0001",
        "05Noise/0002",
    ]
    assert not read("foundir", root).faults
    (root / "meta.txt").write_text(
        "\n".join([*lines, "01Blur/GT/9.png, 01Blur/LQ/9.png", "nonsense"])
    )
    faults = read("foundir", root).faults
    assert [fault.kind for fault in faults] == ["metadata", "metadata"]
    assert faults[0].path.endswith("meta.txt:4") and "01Blur/GT/9.png" in faults[0].message
    assert "'nonsense'" in faults[1].message


def test_foundir_below_the_names_of_splits(tmp_path: Path) -> None:
    root = data_folders.foundir(tmp_path / "train")
    data_folders.foundir(tmp_path / "test", count=1)
    assert len(read("foundir", tmp_path, "train").pairs) == 40
    assert len(layouts.prefer("foundir", tmp_path, "test").pairs) == 20
    # Where there are no splits, all is taken.
    assert len(layouts.prefer("foundir", root, "train").pairs) == 40


def test_foundir_training_set_is_not_counted_as_the_test_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = data_folders.foundir(tmp_path)
    monkeypatch.setattr(layouts, "_FOUNDIR_TEST_AT_MOST", 39)
    assert read("foundir", root).published == {}
    assert read("foundir", root, "test").published == layouts.FOUNDIR_TEST
    monkeypatch.setattr(layouts, "_FOUNDIR_TEST_AT_MOST", 40)
    assert read("foundir", root).published == layouts.FOUNDIR_TEST


def test_packed_pairs_are_the_same_pairs() -> None:
    pairs = [
        Pair("a/1", Path("/x/ä b.png"), Path("/y/1.jpg"), "a", ("blur",)),
        Pair("b/2", Path("z/2.png"), None, "b"),
        Pair("a/3", Path("/x/3\udcff.png"), Path("/y/3.jpg"), "a", ("blur",)),
    ]
    packed = PackedPairs(iter(pairs))
    assert list(packed) == pairs and len(packed) == 3
    assert packed[-1] == pairs[2] and packed[:2] == pairs[:2]
    with pytest.raises(IndexError):
        packed[3]
    assert not list(PackedPairs([]))


def test_hazerd_originals(tmp_path: Path) -> None:
    root = data_folders.hazerd(tmp_path)
    by_name = {pair.name: pair for pair in read("hazerd", root / "data").pairs}
    assert by_name["IMG_1_250_A"].clean == root / "data/img/IMG_1_RGB.jpg"


@pytest.mark.parametrize("name", LAYOUTS)
def test_wrong_layout_is_one_sentence(name: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "readme.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"expected .* in .*, got photos, readme.md$") as error:
        read(name, tmp_path)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="which does not exist"):
        read(name, tmp_path / "nowhere")


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dataset: expected one of foundir.*'rain100'"):
        read("rain100", tmp_path)
    with pytest.raises(ValueError, match=r"split: expected one of train, val, test, got 'dev'"):
        read("folder", tmp_path, "dev")
    with pytest.raises(ValueError, match=r"type: expected one of 01Blur.*got '21Snow'"):
        kinds_of("21Snow")
    assert kinds_of("16lowlight_noise") == kinds_of("noise+low_light") == ("low_light", "noise")


def test_pairs_without_partner_are_left_out(tmp_path: Path) -> None:
    root = data_folders.folders(tmp_path)
    data_folders.save(root / "LQ/9.png", 9)
    data_folders.save(root / "GT/._0.png", 9)
    listing = read("folder", root)
    assert [pair.name for pair in listing.pairs] == ["0", "1", "2"]
    assert [(f.kind, Path(f.path).name) for f in listing.faults] == [("unmatched", "9.png")]


def test_rows_of_a_paired_folder(tmp_path: Path) -> None:
    for i, row in enumerate(("05Noise", "mine")):
        data_folders.pair(tmp_path / f"c/{row}/1.png", tmp_path / f"d/{row}/1.png", i)
    listing = layouts.paired(tmp_path / "d", tmp_path / "c")
    assert [(p.group, p.kinds) for p in listing.pairs] == [("05Noise", ("noise",)), ("mine", ())]
    with pytest.raises(ValueError, match="clean: expected a folder"):
        layouts.paired(tmp_path / "d", tmp_path / "no")
    alone = read("folder", tmp_path / "d").pairs
    assert [pair.clean for pair in alone] == [None, None]


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


def test_crops_of_pairs_are_aligned_and_seeded(tmp_path: Path) -> None:
    for i in range(3):
        data_folders.pair(tmp_path / f"GT/{i}.png", tmp_path / f"LQ/{i}.png", i, (70, 90))
        with Image.open(tmp_path / f"GT/{i}.png") as clean:
            Image.fromarray(255 - np.asarray(clean)).save(tmp_path / f"LQ/{i}.png")
    dataset = crops.training_set("folder", tmp_path, 32, seed=5)
    assert len(dataset) == 3
    for item in dataset:
        clean, damaged = item["clean"], item["damaged"]
        assert isinstance(clean, torch.Tensor) and isinstance(damaged, torch.Tensor)
        assert clean.shape == (3, 32, 32) and clean.dtype == torch.float32
        torch.testing.assert_close(damaged, 1 - clean)
    again = crops.training_set("folder", tmp_path, 32, seed=5)
    other = crops.training_set("folder", tmp_path, 32, seed=6)
    assert torch.equal(_clean(dataset.pair(1, 7)), _clean(again.pair(1, 7)))
    assert not torch.equal(_clean(dataset.pair(1, 7)), _clean(dataset.pair(1, 8)))
    assert not torch.equal(_clean(dataset.pair(1, 7)), _clean(other.pair(1, 7)))
    batch = next(iter(DataLoader(dataset, 3)))
    assert batch["clean"].shape == (3, 3, 32, 32) and batch["name"] == ["0", "1", "2"]


def _clean(item: crops.Item) -> torch.Tensor:
    return torch.as_tensor(item["clean"])


def test_small_pictures_are_mirrored_and_odd_sizes_refused(tmp_path: Path) -> None:
    data_folders.pair(tmp_path / "GT/a.png", tmp_path / "LQ/a.png", 1, (10, 40))
    plain = crops.CropPairs(read("folder", tmp_path).pairs, 32, flip=False)
    clean = _clean(plain[0])
    assert clean.shape == (3, 32, 32)
    assert torch.equal(clean[:, :10], clean[:, 10:20].flip(1))
    data_folders.save(tmp_path / "LQ/a.png", 1, (11, 40))
    with pytest.raises(ValueError, match=r"a\.png: expected 40×10 pixels, as .* has, got 40×11"):
        plain[0]
    with pytest.raises(IndexError):
        plain[1]


def test_damaged_on_the_fly(tmp_path: Path) -> None:
    for i in range(4):
        data_folders.save(tmp_path / f"deep/{i}.JPG", i, (100, 120))
    dataset = crops.training_set("clean", tmp_path, 48, types=list(FOUNDIR_TYPES))
    assert len(dataset) == 4
    kinds = Counter(str(dataset.pair(0, draw)["kinds"]) for draw in range(200))
    assert set(kinds) == {"+".join(each) for each in FOUNDIR_TYPES.values()}
    first, second = dataset.pair(2, 9), dataset.pair(2, 9)
    assert all(torch.equal(_clean(x), _clean(first)) for x in (second,))
    damaged = torch.as_tensor(first["damaged"])
    torch.testing.assert_close((damaged * 255).round() / 255, damaged)
    assert first["name"] == "2"
    only = crops.training_set("clean", tmp_path, 48, types=["haze"])
    assert {str(only.pair(0, n)["kinds"]) for n in range(5)} == {"haze"}


def test_training_set_takes_its_split_and_types(tmp_path: Path) -> None:
    data = crops.training_set("uhdll", data_folders.uhdll(tmp_path / "u", 3), 16)
    assert [pair.group for pair in data.pairs] == ["training_set"] * 3
    root = data_folders.foundir(tmp_path / "f")
    some = crops.training_set("foundir", root, 16, types=["05Noise", "low_light+haze"])
    assert {pair.group for pair in some.pairs} == {"05Noise", "09Lowlight_Haze"}
    whole = crops.evaluation_set("uhdll", tmp_path / "u")
    assert len(whole) == 3 and _clean(whole[0]).shape == (3, 24, 32)
    assert whole[0]["kinds"] == "low_light"
