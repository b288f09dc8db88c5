"""Torch data sets of pairs: random aligned crops for training, whole pictures for evaluation.

Every item is a dictionary of `clean` and `damaged`, float32 [3, H, W] in [0, 1], `kinds` (names of
`training.degrade.KINDS` joined by "+"; where they are unknown, the group of the pair) and `name`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Dataset

from mimdit.image_io import read_picture
from training.data import clean_crop, stored, tensor, turn
from training.datasets.layouts import prefer
from training.datasets.pairs import PackedPairs, Pair
from training.datasets.reading import PictureFile
from training.degrade import degrade, kinds_of, sample_kinds

Item = dict[str, torch.Tensor | str]


class CropPairs(Dataset[Item]):
    """A random crop of each pair, at the same place of both pictures, flipped alike.

    `dataset[i]` is a crop of pair i; `dataset.pair(i, draw)` another one for each `draw`. Both are
    the same whenever (seed, i, draw) are. Pictures smaller than the crop are mirrored outwards.

    Args:
        pairs: such as `read("foundir", path).pairs`. size: of the crops, in pixels.
        seed: any number. flip: False keeps crops as they lie in the picture.

    Raises ValueError without pairs, for pairs without an original, and, at an item, for pictures of
    different sizes; PictureError for one that cannot be read.
    """

    def __init__(self, pairs: Sequence[Pair], size: int, seed: int = 0, flip: bool = True) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        if not pairs:
            raise ValueError("pairs: expected at least one, got none")
        if alone := next((pair for pair in pairs if pair.clean is None), None):
            raise ValueError(f"pairs: expected originals, got none for {alone.damaged}")
        self.pairs, self.size, self.seed, self.flip = PackedPairs(pairs), size, seed, flip

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        return self.pair(index, 0)

    def pair(self, index: int, draw: int) -> Item:
        """The crop of pair `index` that belongs to the number `draw`."""
        pair = self.pairs[index]
        assert pair.clean is not None
        rng = np.random.default_rng([self.seed, index, draw])
        files = PictureFile(pair.clean), PictureFile(pair.damaged)
        _same_size(pair, files[0].size, files[1].size)
        height, width = files[0].size
        tall, wide = min(height, self.size), min(width, self.size)
        top, left = (int(rng.integers(n - m + 1)) for n, m in ((height, tall), (width, wide)))
        # [h, w, 6]
        both = np.concatenate([file.crop(top, left, tall, wide) for file in files], axis=2)
        if both.shape[:2] != (self.size, self.size):
            margins = ((0, self.size - tall), (0, self.size - wide), (0, 0))
            both = np.pad(both, margins, mode="symmetric")
        if self.flip:
            both = turn(both, rng)
        scaled = both.astype(np.float32) / np.float32(255)
        return {
            "clean": tensor(scaled[..., :3]),
            "damaged": tensor(scaled[..., 3:]),
            "kinds": "+".join(pair.kinds) or pair.group,
            "name": pair.name,
        }


class DegradedCrops(Dataset[Item]):
    """A crop of each clean file, damaged on the fly and rounded to 8 bits as a stored picture is.

    Indices and draws as in `CropPairs`. Crops are as wide as the picture or less, at most at native
    scale (`training.data.clean_crop`).

    Args:
        files: clean pictures. types: what to draw from, evenly: FoundIR's names ("05Noise") or
            kinds joined by "+"; by default single kinds and, in `mixtures` of the draws, FoundIR's
            mixtures.
    """

    def __init__(
        self,
        files: Sequence[Path],
        size: int,
        seed: int = 0,
        mixtures: float = 0.3,
        types: Sequence[str] | None = None,
    ) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        if not files:
            raise ValueError("files: expected at least one clean picture, got none")
        self.files, self.size, self.seed, self.mixtures = tuple(files), size, seed, mixtures
        self.types = None if types is None else [kinds_of(name) for name in types]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < len(self):
            raise IndexError(f"index: expected 0 to {len(self) - 1}, got {index}")
        return self.pair(index, 0)

    def pair(self, index: int, draw: int) -> Item:
        """The crop of file `index` and its damage that belong to the number `draw`."""
        rng = np.random.default_rng([self.seed, index, draw])
        clean = clean_crop(PictureFile(self.files[index]), self.size, rng)
        if self.types:
            kinds = self.types[int(rng.integers(len(self.types)))]
        else:
            kinds = sample_kinds(rng, self.mixtures)
        damaged, label = degrade(clean, kinds, rng)
        return {
            "clean": tensor(clean),
            "damaged": tensor(stored(damaged)),
            "kinds": "+".join(label.kinds),
            "name": self.files[index].stem,
        }


class WholePairs(Dataset[Item]):
    """Whole pictures in order, for evaluation; items without an original have no `clean`.

    Sizes differ, so batches of more than one need a collate function of their own.
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = tuple(pairs)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Item:
        pair = self.pairs[index]
        item: Item = {"kinds": "+".join(pair.kinds) or pair.group, "name": pair.name}
        damaged = read_picture(pair.damaged).rgb
        if pair.clean is not None:
            clean = read_picture(pair.clean).rgb
            _same_size(pair, clean.shape[:2], damaged.shape[:2])
            item["clean"] = tensor(clean)
        return item | {"damaged": tensor(damaged)}


def training_set(
    name: str,
    path: str | Path,
    size: int,
    seed: int = 0,
    split: str | None = None,
    mixtures: float = 0.3,
    types: Sequence[str] | None = None,
) -> CropPairs | DegradedCrops:
    """Random crops of the data set at `path`: one of `training.datasets.layouts.LAYOUTS`, where
    "clean" is any folder of clean pictures, degraded on the fly.

    types: only damages of these names (FoundIR's, or kinds joined by "+"). Where the data set has a
    training split and none is named, that is taken. Raises ValueError where nothing fits.
    """
    listing = prefer(name, path, "train", split)
    if name == "clean":
        return DegradedCrops(listing.singles, size, seed, mixtures, types)
    pairs = listing.pairs
    if types is not None:
        wanted = {kinds_of(each) for each in types}
        pairs = tuple(pair for pair in pairs if pair.kinds in wanted)
        if not pairs:
            raise ValueError(f"types: expected some that {path} has, got {', '.join(types)}")
    return CropPairs(pairs, size, seed)


def evaluation_set(name: str, path: str | Path, split: str | None = None) -> WholePairs:
    """Whole pictures of the data set at `path`, of its test split where it has one."""
    return WholePairs(prefer(name, path, "test", split).pairs)


def _same_size(pair: Pair, clean: tuple[int, ...], damaged: tuple[int, ...]) -> None:
    if tuple(clean) != tuple(damaged):
        a, b = (f"{size[1]}×{size[0]}" for size in (clean, damaged))
        raise ValueError(
            f"{pair.damaged}: expected {a} pixels, as {pair.clean} has, got {b}; "
            "mimdit-data doctor lists all such pairs"
        )
