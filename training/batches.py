"""Batches by number: picture n of a run, its noise and its time depend on (seed, n) alone.

How many processes and workers share the work, and where a run was interrupted, changes none of it.
"""

import signal
from collections.abc import Generator, Iterable, Iterator, Sequence, Sized
from dataclasses import dataclass
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
_PAIR, _NOISE, _PLACE, _ORDER, _CUTS = range(5)
# Tokens along the smallest tile that crops are cut into.
_TILE = 16
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
        if settings.types:
            raise ValueError(
                "--types: expected --dataset beside it (clean: your own pictures, damaged on the "
                f"fly), got none for {', '.join(settings.types)}"
            )
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
    keys = _Numbers(schedule, step, rank)
    loader = DataLoader(
        source,
        batch_sampler=keys,
        num_workers=workers,
        worker_init_fn=_leave_signals_to_parent if workers else None,
        pin_memory=torch.cuda.is_available(),
    )
    for batch, numbers in zip(plainly(loader), keys, strict=True):
        yield batch | {"numbers": numbers}


@dataclass(frozen=True)
class _Numbers:
    """Pictures' numbers pass by pass, made when asked for: a long run has millions of them."""

    schedule: Schedule
    step: int
    rank: int

    def __iter__(self) -> Iterator[list[int]]:
        crop = self.schedule.at(self.step).crop
        for at in range(self.step, self.schedule.end_of_stage(self.step)):
            if self.schedule.at(at).crop == crop:
                for i in range(self.schedule.at(at).passes):
                    yield self.schedule.pictures(at, i, self.rank)


def plainly(loader: Iterable[Pair]) -> Iterator[Pair]:
    """What a loader gives; an error of a worker is raised as its own sentence, without the trace
    that torch puts before it. However it ends, the workers are gone then."""
    stream = iter(loader)
    try:
        yield from stream
    except (ValueError, OSError) as error:
        said = str(error).strip().splitlines()
        if len(said) < 2 or "in DataLoader worker process" not in said[0]:
            raise
        # The last line of a trace: the error's class, and what it says.
        raise ValueError(said[-1].partition(": ")[2] or said[-1]) from error
    finally:
        # The trace of an error keeps the iterator, and it the workers: an interpreter that ends
        # would wait for them for ever, since they ignore its signal.
        shut_down = getattr(stream, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()


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


def draw_cuts(step: int, grid: Sequence[int], settings: Settings) -> int:
    """Into how many tiles each side of a step's crops is cut; 1 where they stay whole."""
    rng = np.random.default_rng([settings.seed, _CUTS, step])
    fitting = [n for n in (2, 3) if all(side % n == 0 and side // n >= _TILE for side in grid)]
    if not fitting or rng.random() >= settings.tiled:
        return 1
    return int(rng.choice(fitting))


def _seed(*parts: int) -> int:
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))
