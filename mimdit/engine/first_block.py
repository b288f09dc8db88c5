"""First-block cache: what all blocks but the first add is taken from an earlier step.

Approximate. Where the first block changes the tokens nearly as it did when the others last ran,
these are left out (the rule of diffusers' `FirstBlockCacheConfig`, from ParaAttention).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mimdit.engine.workspace import Shape
from mimdit.memory import free_memory

# Of the memory that would be free without it, so much may a cache take.
_SHARE = 0.25
# Calls of a step that are followed where nobody says when a run ends: pictures times branches.
_LOOSE = 8


@dataclass
class Kept:
    """Of one picture and one branch of guidance: what the first block and the others added.

    first, rest: [B,N,D], of the step in which all blocks ran last. skipped: steps since the start
    that took `rest` from here.
    """

    first: Tensor | None = None
    rest: Tensor | None = None
    skipped: int = 0


@dataclass(eq=False)
class _Entry:
    """seen: what the network was given besides x. times: of the last step, one a picture."""

    shape: Shape
    seen: tuple[Tensor, ...]
    times: list[float]
    kept: Kept
    bytes: int


class Cache:
    """What a thread's steps leave for later ones.

    Pictures, tiles and branches of guidance are told apart by the values of what the network is
    given besides x: conditions may be computed anew in every step, and texts cast. Of calls that
    are given the same at the same time, each follows its own.
    """

    def __init__(self) -> None:
        self._entries: list[_Entry] = []
        self._skipped = 0
        self._inside = False

    @property
    def skipped(self) -> int:
        """Steps since a run began that left out all blocks but the first."""
        return self._skipped + sum(entry.kept.skipped for entry in self._entries)

    @property
    def bytes(self) -> int:
        """Of all that is kept."""
        return sum(entry.bytes for entry in self._entries)

    @contextmanager
    def run(self) -> Iterator[None]:
        """Around the steps of a run, after which nothing is kept but the count.

        Elsewhere only the last few calls are followed.
        """
        self.forget()
        self._skipped, self._inside = 0, True
        try:
            yield
        finally:
            self.forget()
            self._inside = False

    def forget(self) -> None:
        """Give back the memory."""
        self._drop(lambda _: True)

    def _drop(self, which: Callable[[_Entry], bool]) -> None:
        gone = [entry for entry in self._entries if which(entry)]
        self._skipped += sum(entry.kept.skipped for entry in gone)
        self._entries = [entry for entry in self._entries if not which(entry)]

    def find(self, shape: Shape, x: Tensor, timestep: Tensor, seen: Sequence[Tensor]) -> Kept:
        """What an earlier step of this run kept for such a call, or room for it.

        x: image tokens [B,N,D]; seen: the other inputs, of which the first may live on only here.
        Times fall in a run, so what was kept at a lower one than timestep [B] belongs to an earlier
        run and goes. Where there is no memory for more, what is returned is not kept.
        """
        now: list[float] = timestep.tolist()
        self._drop(lambda entry: any(a < b for a, b in zip(entry.times, now, strict=False)))
        for entry in self._entries:
            if entry.times != now and entry.shape == shape and _same(entry.seen, seen):
                entry.times = now
                return entry.kept
        made = _Entry(shape, tuple(seen), now, Kept(), 2 * x.nbytes + seen[0].nbytes)
        if not self._inside:
            recent = self._entries[1 - _LOOSE :]
            self._drop(lambda entry: entry not in recent)
        free = free_memory(x.device)
        if free is None or self.bytes + made.bytes <= _SHARE * (free + self.bytes):
            self._entries.append(made)
        return made.kept


def _same(some: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    """Whether shapes, types and values are equal."""
    return len(some) == len(others) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
        for a, b in zip(some, others, strict=True)
    )


@dataclass
class Parts:
    """A step in three: head(x, flat, text) → (x, text) behind the first block, tail(x, flat, text)
    → x behind the last, out(x, flat) → output tokens.
    """

    head: Callable[..., Any]
    tail: Callable[..., Any]
    out: Callable[..., Any]
    threshold: float

    def __call__(self, x: Tensor, flat: Tensor, text: Tensor, kept: Kept) -> Tensor:
        """Output tokens of image tokens x [B,N,D], modulation [B,total] and text [B,T,D]."""
        opened, words = self.head(x, flat, text)
        first = opened - x
        # The decorator hides the signature.
        if (
            kept.first is None or kept.rest is None or _changed(first, kept.first, self.threshold)  # pyright: ignore[reportCallIssue]
        ):
            kept.first, kept.rest = first, self.tail(opened, flat, words) - opened
        else:
            kept.skipped += 1
        return self.out(opened + kept.rest, flat)


@torch.compiler.disable
def _changed(now: Tensor, then: Tensor, threshold: float) -> bool:
    """Mean |now − then| of more than `threshold` times mean |then|; waits for the device."""
    return bool((now - then).abs().mean() > threshold * then.abs().mean())


def threshold_of(given: Any) -> float:
    """A number, or diffusers' `FirstBlockCacheConfig`, as the threshold; ValueError otherwise."""
    value = getattr(given, "threshold", given)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"first_block_cache: expected a threshold of at least 0, got {given!r}")
    return float(value)
