"""Small folders in the layouts of the published data sets."""

from pathlib import Path

import numpy as np
from PIL import Image

from training.degrade import FOUNDIR_TYPES


def save(path: Path, seed: int, size: tuple[int, int] = (24, 32)) -> Path:
    """A picture of random blocks, height and width given; equal seeds give equal pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC).save(path)
    return path


def pair(clean: Path, damaged: Path, seed: int, size: tuple[int, int] = (24, 32)) -> None:
    save(clean, seed, size)
    save(damaged, 1000 + seed, size)


def foundir(root: Path, count: int = 2) -> Path:
    for t, name in enumerate(FOUNDIR_TYPES):
        for i in range(1, count + 1):
            folder = root / name
            pair(folder / f"GT/{i:04}.png", folder / f"LQ/{i:04}.png", 100 * t + i)
    return root


def uhdll(root: Path, count: int = 2) -> Path:
    for i in range(count):
        for n, part in enumerate(("training_set", "testing_set")):
            folder = root / part
            pair(folder / f"gt/{i}_UHD_LL.JPG", folder / f"input/{i}_UHD_LL.JPG", 10 * n + i)
    return root


def realrain(root: Path, count: int = 2) -> Path:
    for n, half in enumerate(f"RealRain-1k-{d}/{part}" for d in "LH" for part in ("train", "test")):
        for i in range(count):
            folder = root / half
            pair(folder / f"target/{i}.png", folder / f"input/{i}.png", 10 * n + i)
    return root


def hazerd(root: Path, scenes: int = 2, ranges: int = 5) -> Path:
    for i in range(scenes):
        save(root / f"data/img/IMG_{i}_RGB.jpg", i)
        for j in range(ranges):
            save(root / f"data/simu/IMG_{i}_{50 * (j + 1)}_A.jpg", 100 + 10 * i + j)
    (root / "data/img/IMG_0_depth.mat").write_bytes(b"depth")
    return root


def fourkrd(root: Path, count: int = 2) -> Path:
    for n, (a, b) in enumerate((("blur", "sharp"), ("Blurry", "GT"), ("input", "target"))):
        for i in range(count):
            folder = root / f"seq{n}"
            pair(folder / f"{b}/{i:05}.png", folder / f"{a}/{i:05}.jpg", 10 * n + i)
    return root


def folders(root: Path, count: int = 3) -> Path:
    for i in range(count):
        pair(root / f"GT/{i}.PNG", root / f"LQ/{i}.jpg", i)
    return root
