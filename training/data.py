"""Clean pictures for training, and pairs of a clean and a damaged crop.

The photographs are those inside the scikit-image and scikit-learn wheels; nothing is downloaded.
Four of them are held out for tests and measurements and are never returned for training.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import IterableDataset, get_worker_info

from training.datasets.pairs import EXTENSIONS, pictures
from training.datasets.reading import Box, PictureFile, resampled
from training.degrade import Label, degrade, sample_kinds
from training.scenes import procedural, with_sky

HELD_OUT = {
    "coffee": ("skimage", "data/coffee.png"),
    "motorcycle_left": ("skimage", "data/motorcycle_left.png"),
    "motorcycle_right": ("skimage", "data/motorcycle_right.png"),
    "china": ("sklearn", "datasets/images/china.jpg"),
}

# name -> (package, file in it, sampling weight): colour photographs carry most of the weight
PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png", 1.0),
    "chelsea": ("skimage", "data/chelsea.png", 1.0),
    "flower": ("sklearn", "datasets/images/flower.jpg", 1.0),
    "rocket": ("skimage", "data/rocket.jpg", 0.8),
    "hubble_deep_field": ("skimage", "data/hubble_deep_field.jpg", 0.05),
    "ihc": ("skimage", "data/ihc.png", 0.2),
    "retina": ("skimage", "data/retina.jpg", 0.05),
    "camera": ("skimage", "data/camera.png", 0.25),
    "coins": ("skimage", "data/coins.png", 0.1),
    "brick": ("skimage", "data/brick.png", 0.1),
    "grass": ("skimage", "data/grass.png", 0.1),
    "gravel": ("skimage", "data/gravel.png", 0.1),
    "page": ("skimage", "data/page.png", 0.05),
    "text": ("skimage", "data/text.png", 0.05),
    "moon": ("skimage", "data/moon.png", 0.03),
}


# Crops that get a drawn sky, and hazy pictures that are a part of a larger one.
SKY_SHARE, PART_SHARE = 0.25, 0.4
# Haze in a dull light darkens what is white, and takes more examples to learn.
DULL, DULL_SHARE = (0.55, 0.75), 0.35


def _read(path: Path) -> np.ndarray:
    """[H, W, 3] uint8; gray pictures are repeated, transparency is dropped."""
    with Image.open(path) as picture:
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))


def _inside(package: str, file: str) -> Path | None:
    """The file in an installed package, or None; the package is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / file
    return path if path.is_file() else None


def weighted_photographs() -> tuple[list[np.ndarray], np.ndarray]:
    """The training photographs, [H, W, 3] uint8, and their sampling weights [N], sum 1."""
    pictures, weights = [], []
    for package, file, weight in PHOTOGRAPHS.values():
        path = _inside(package, file)
        if path is not None:
            pictures.append(_read(path))
            weights.append(weight)
    return pictures, np.array(weights) / max(sum(weights), 1e-12)


def photographs() -> list[np.ndarray]:
    """The training photographs found on this computer, each [H, W, 3] uint8."""
    return weighted_photographs()[0]


def held_out() -> dict[str, np.ndarray]:
    """The photographs kept for tests, by name, [H, W, 3] uint8; missing files are left out."""
    paths = {name: _inside(package, file) for name, (package, file) in HELD_OUT.items()}
    return {name: _read(path) for name, path in paths.items() if path is not None}


def folder(path: str | Path) -> list[Path]:
    """The picture files under a folder, at any depth, sorted; ValueError where there is none."""
    files = pictures(Path(path)) if Path(path).is_dir() else []
    if not files:
        raise ValueError(f"folder: expected pictures {sorted(EXTENSIONS)} under {path}, got none")
    return files


class CleanCrops(Iterator[np.ndarray]):
    """Endless clean crops, float32 [size, size, 3] in [0, 1].

    `procedural_share` of them are drawn scenes; the rest come from the user's folder, where one
    is given, in `folder_share` of the draws, and from the packaged photographs otherwise.
    """

    def __init__(
        self,
        size: int,
        rng: np.random.Generator,
        procedural_share: float = 0.45,
        path: str | Path | None = None,
        folder_share: float = 0.8,
    ) -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1, got {size}")
        self.size = size
        self.rng = rng
        self.procedural_share = procedural_share
        self.folder_share = folder_share
        self.files = folder(path) if path is not None else []
        photographs, self.weights = weighted_photographs()
        self.pictures = [Image.fromarray(picture) for picture in photographs]

    def __next__(self) -> np.ndarray:
        crop = self._crop()
        return with_sky(crop, self.rng) if self.rng.random() < SKY_SHARE else crop

    def _crop(self) -> np.ndarray:
        rng = self.rng
        if rng.random() < self.procedural_share:
            return procedural(self.size, rng)
        if self.files and (rng.random() < self.folder_share or not self.pictures):
            return clean_crop(
                PictureFile(self.files[int(rng.integers(len(self.files)))]), self.size, rng
            )
        if not self.pictures:
            return procedural(self.size, rng)
        picture = self.pictures[int(rng.choice(len(self.pictures), p=self.weights))]
        return clean_crop(picture, self.size, rng)


def drawn_pair(crops: CleanCrops, mixtures: float) -> tuple[np.ndarray, np.ndarray, Label]:
    """The next clean crop, damaged: clean, damaged (rounded to 8 bits, as a stored picture is), and
    what was done. The draws come from `crops.rng`.

    A hazy crop may be a part of a larger picture, as the tiles of a restoration are: its haze then
    is a part of the whole one's.
    """
    rng, size = crops.rng, crops.size
    kinds = sample_kinds(rng, mixtures)
    part = "haze" in kinds and rng.random() < PART_SHARE
    crops.size = whole = size * 3 // 2 if part else size
    try:
        clean = next(crops)
    finally:
        crops.size = size
    fixed = {}
    if "haze" in kinds and rng.random() < DULL_SHARE:
        fixed["haze"] = {"airlight": float(rng.uniform(*DULL))}
    damaged, label = degrade(clean, kinds, rng, **fixed)
    top, left = rng.integers(0, whole - size + 1, 2) if part else (0, 0)
    inner = (slice(top, top + size), slice(left, left + size))
    return clean[inner], stored(damaged[inner]), label


def clean_crop(
    picture: Image.Image | PictureFile, size: int, rng: np.random.Generator
) -> np.ndarray:
    """One crop of a clean picture, float32 [size, size, 3] in [0, 1]: at a random scale and place,
    flipped, with mild changes of exposure and colour."""
    if isinstance(picture, PictureFile):
        crop = picture.resized(_box(*picture.size, size, rng), size)
    else:
        crop = resampled(picture, _box(picture.height, picture.width, size, rng), size)
    return _jitter(turn(crop, rng), rng)


def _box(height: int, width: int, size: int, rng: np.random.Generator) -> Box:
    """A square of the picture: in 0.4 of the draws as wide as that, else at a log-uniform scale
    from there to native. Tone and haze show only in whole pictures."""
    # Pixels of the picture per pixel of the crop; below 1 only where the picture is too small.
    widest = min(height, width) / size
    share = 1.0 if rng.random() < 0.4 else rng.random()
    step = widest**share if widest > 1 else widest
    side = min(size * step, height, width)
    top, left = rng.uniform(0, height - side), rng.uniform(0, width - side)
    if step == 1.0:
        top, left = int(top), int(left)
    return left, top, left + side, top + side


def turn(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """[size, size, C], flipped left to right in half of the draws, upside down or by a quarter turn
    in a twentieth."""
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    if rng.random() < 0.05:
        crop = crop[::-1]
    if rng.random() < 0.05:
        crop = np.rot90(crop)
    return crop


def _jitter(crop: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """float32 in [0, 1] with mild changes of exposure and colour, which must stay guessable."""
    gain, gamma = rng.uniform(0.92, 1.05), math.exp(rng.normal(0.0, 0.07))
    cast = np.exp(rng.normal(0.0, 0.05, 3)).astype(np.float32)
    clean = np.power(crop.astype(np.float32) / np.float32(255), np.float32(gamma))
    return np.clip(np.float32(gain) * cast * clean, 0.0, 1.0)


class PairDataset(IterableDataset[dict[str, torch.Tensor | str]]):
    """Endless pairs: `clean` and `damaged`, float32 [3, size, size] in [0, 1], and `kinds`.

    `kinds` are the names joined by "+", in the order applied. Seeded by (seed, worker): the same
    seed and number of workers give the same pairs. The damaged crop is rounded to 8 bits, as a
    stored picture is. For another size, make a new one.
    """

    def __init__(
        self,
        size: int,
        seed: int = 0,
        mixtures: float = 0.3,
        procedural_share: float = 0.45,
        path: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.size = size
        self.seed = seed
        self.mixtures = mixtures
        self.procedural_share = procedural_share
        self.path = path

    def __iter__(self) -> Iterator[dict[str, torch.Tensor | str]]:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, worker.id if worker is not None else 0])
        crops = CleanCrops(self.size, rng, self.procedural_share, self.path)
        while True:
            clean, damaged, label = drawn_pair(crops, self.mixtures)
            yield {
                "clean": tensor(clean),
                "damaged": tensor(damaged),
                "kinds": "+".join(label.kinds),
            }


def stored(image: np.ndarray) -> np.ndarray:
    """A picture in [0, 1] as a file of 8 bits would hold it."""
    return np.round(image * 255) / np.float32(255)


def tensor(image: np.ndarray) -> torch.Tensor:
    """[H, W, 3] to float32 [3, H, W]."""
    return torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1), dtype=np.float32))
