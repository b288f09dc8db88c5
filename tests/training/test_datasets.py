"""Readers of data sets, and torch data sets of crops of them."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from tests.training import data_folders
from training.datasets import crops, layouts
from training.datasets.layouts import LAYOUTS, detect, read
from training.datasets.pairs import PackedPairs, Pair
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
    deep = [data_folders.save(root / f"06JPEG/{half}/a/1.png", 1) for half in ("GT", "LQ")]
    (root / "meta.txt").write_text(", ".join(str(path.relative_to(root)) for path in deep) + "\n.")
    listing = read("foundir", root / "meta.txt")
    # As in the folders themselves: not 06JPEG/1.
    assert [pair.name for pair in listing.pairs] == ["06JPEG/a/1"] and len(listing.faults) == 1
    (root / "meta.txt").write_bytes(b"\x89PNG")
    with pytest.raises(ValueError, match=r"got meta.txt; .*: expected lines of UTF-8 text$"):
        read("foundir", root / "meta.txt")
    with pytest.raises(ValueError, match=r"; got meta.txt$"):
        detect(root / "meta.txt")
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


def test_linked_folders_are_read(tmp_path: Path) -> None:
    """Large sets often lie elsewhere; a link that leads back ends there."""
    for i in range(2):
        data_folders.pair(tmp_path / f"store/c/{i}.png", tmp_path / f"store/d/{i}.png", i)
    (tmp_path / "set/GT").mkdir(parents=True)
    (tmp_path / "set/LQ").mkdir()
    (tmp_path / "set/GT/part").symlink_to(tmp_path / "store/c")
    (tmp_path / "set/LQ/part").symlink_to(tmp_path / "store/d")
    (tmp_path / "store/d/back").symlink_to(tmp_path / "store/d")
    listing = read("folder", tmp_path / "set")
    assert [pair.name for pair in listing.pairs] == ["part/0", "part/1"] and not listing.faults


def test_rows_of_a_paired_folder(tmp_path: Path) -> None:
    for i, row in enumerate(("05Noise", "mine")):
        data_folders.pair(tmp_path / f"c/{row}/1.png", tmp_path / f"d/{row}/1.png", i)
    listing = layouts.paired(tmp_path / "d", tmp_path / "c")
    assert [(p.group, p.kinds) for p in listing.pairs] == [("05Noise", ("noise",)), ("mine", ())]
    with pytest.raises(ValueError, match="clean: expected a folder"):
        layouts.paired(tmp_path / "d", tmp_path / "no")
    alone = read("folder", tmp_path / "d").pairs
    assert [pair.clean for pair in alone] == [None, None]


def test_crops_of_pairs_are_aligned_and_seeded(tmp_path: Path) -> None:
    for i in range(3):
        data_folders.pair(tmp_path / f"GT/{i}.png", tmp_path / f"LQ/{i}.png", i, (70, 90))
        with Image.open(tmp_path / f"GT/{i}.png") as clean:
            Image.fromarray(255 - np.asarray(clean)).save(tmp_path / f"LQ/{i}.png")
    dataset = crops.training_set("folder", tmp_path, 32, seed=5)
    items = list(dataset)
    assert len(items) == len(dataset) == 3
    for item in items:
        clean, damaged = item["clean"], item["damaged"]
        assert isinstance(clean, torch.Tensor) and isinstance(damaged, torch.Tensor)
        assert clean.shape == (3, 32, 32) and clean.dtype == torch.float32
        torch.testing.assert_close(damaged, 1 - clean)
        # What damaged them is not known; routing is reported by the folder then.
        assert item["kinds"] == "all"
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
    assert torch.equal(_clean(first), _clean(second))
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
