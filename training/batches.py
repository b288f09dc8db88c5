"""Batches by number: picture n of a run, its noise and its time depend on (seed, n) alone.

How many processes and workers share the work, and where a run was interrupted, changes none of it.
"""

import signal
from collections.abc import Generator, Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from training.config import Settings
from training.data import CleanCrops, drawn_pair, tensor
from training.datasets.crops import training_set
from training.schedule import Schedule

# What a number is drawn for; each purpose has a stream of its own.
_PAIR, _NOISE, _PLACE, _ORDER = range(4)
Pair = dict[str, Any]


class DrawnPairs(Dataset[Pair]):
    """Pairs damaged on the fly (`data.drawn_pair`), without end: `clean` and `damaged`
    [3,size,size] in [0,1], `kinds` (joined by "+") and `name`."""

    def __init__(
        self, size: int, seed: int = 0, mixtures: float = 0.25, path: str | Path | None = None
    ) -> None:
        self.seed, self.mixtures = seed, mixtures
        # Its generator is set for each picture.
        self.crops = CleanCrops(size, np.random.default_rng(0), path=path)

    def __getitem__(self, index: int) -> Pair:
        self.crops.rng = np.random.default_rng([self.seed, _PAIR, index])
        clean, damaged, label = drawn_pair(self.crops, self.mixtures)
        return {
            "clean": tensor(clean),
            "damaged": tensor(damaged),
            "kinds": "+".join(label.kinds),
            "name": f"drawn-{index}",
        }


class Epochs(Dataset[Pair]):
    """A data set of N pairs without end: shuffled anew every N pictures.

    A data set with `pair(index, draw)` gets the number of the picture as `draw`, for a crop that
    differs from epoch to epoch; of others `dataset[index]` is taken.
    """

    def __init__(self, dataset: Dataset[Pair], seed: int = 0) -> None:
        if not isinstance(dataset, Sized) or len(dataset) == 0:
            raise ValueError("data: expected a data set with at least one pair, got none")
        self.dataset, self.seed, self.count = dataset, seed, len(dataset)
        self._epoch, self._order = -1, np.arange(0)

    def __getitem__(self, index: int) -> Pair:
        epoch, place = divmod(index, self.count)
        if epoch != self._epoch:
            rng = np.random.default_rng([self.seed, _ORDER, epoch])
            self._epoch, self._order = epoch, rng.permutation(self.count)
        chosen = int(self._order[place])
        draw = getattr(self.dataset, "pair", None)
        return self.dataset[chosen] if draw is None else draw(chosen, index)


def pairs(settings: Settings, crop: int) -> Dataset[Pair]:
    """The run's source of pairs, by number of the picture.

    Raises ValueError where the data set cannot be read, or has a name but no place.
    """
    if settings.dataset is None:
        return DrawnPairs(crop, settings.seed, settings.mixtures, settings.data)
    if settings.data is None:
        raise ValueError(f"--data: expected the folder of data set {settings.dataset}, got none")
    found = training_set(
        settings.dataset,
        settings.data,
        crop,
        settings.seed,
        mixtures=settings.mixtures,
        types=settings.types,
    )
    return Epochs(found, settings.seed)


def batches(
    source: Dataset[Pair], schedule: Schedule, step: int, rank: int, workers: int
) -> Generator[Pair]:
    """Batches of one process of the steps with the crop of `step`, from it to the end of its
    stage, pass by pass."""
    crop = schedule.at(step).crop
    keys = [
        schedule.pictures(at, i, rank)
        for at in range(step, schedule.end_of_stage(step))
        if schedule.at(at).crop == crop
        for i in range(schedule.at(at).passes)
    ]
    loader = DataLoader(
        source,
        batch_sampler=keys,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_parent if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    for batch, numbers in zip(loader, keys, strict=True):
        yield batch | {"numbers": numbers}


def _leave_signals_to_parent(worker: int) -> None:
    # A scheduler signals the whole group; the parent still needs this worker to end its step.
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, signal.SIG_IGN)


def sample_times(batch: int, settings: Settings, generator: torch.Generator) -> Tensor:
    """t [B] in (0, 1]: logit-normal (arXiv 2403.03206, Eq. 19), with t = 1 for some draws."""
    normal = torch.randn(batch, generator=generator) * settings.t_std + settings.t_mean
    pure = torch.rand(batch, generator=generator) < settings.pure_noise
    return torch.where(pure, 1.0, normal.sigmoid().clamp(1e-3, 1.0))


def draw_noise(
    numbers: Sequence[int], shape: Sequence[int], settings: Settings
) -> tuple[Tensor, Tensor]:
    """Times [B] and noise [B,*shape] of the pictures of these numbers."""
    times, noise = [], []
    for number in numbers:
        generator = torch.Generator().manual_seed(_seed(settings.seed, _NOISE, number))
        times.append(sample_times(1, settings, generator))
        noise.append(torch.randn(shape, generator=generator))
    return torch.cat(times), torch.stack(noise)


def draw_place(step: int, grid: Sequence[int], table: int, settings: Settings) -> tuple[int, int]:
    """Where in the position table [table,table] the grid of a step's crops lies."""
    rng = np.random.default_rng([settings.seed, _PLACE, step])
    top, left = (int(rng.integers(table - n + 1)) for n in grid)
    return top, left


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
