"""Everything of one shape: joint buffers, and how a step runs over them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mimdit.condition import Condition
from mimdit.engine.modes import kept
from mimdit.engine.step import Joint


@dataclass(frozen=True)
class Shape:
    """B pictures of N image, T text and K conditioning tokens."""

    pictures: int
    grid: tuple[int, int]
    text: int
    condition: int
    dtype: torch.dtype
    device: torch.device

    @property
    def image(self) -> int:
        """N."""
        return self.grid[0] * self.grid[1]


@dataclass(frozen=True, eq=False)
class KeyValueCondition(Condition):
    """A condition as the blocks use it: [2,l,B,heads,K,d], normalised keys and values of l blocks,
    for all blocks one after the other.
    """

    pairs: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Buffers:
    """Queries q [B,heads,N+T,d], which all blocks share, and of each keys and values
    kv [2,L,B,heads,N+T+K,d].
    """

    q: Tensor
    kv: Tensor

    @property
    def joint(self) -> list[Joint]:
        """q, k and v of every block."""
        return [(self.q, k, v) for k, v in zip(*self.kv.unbind(), strict=True)]

    @property
    def bytes(self) -> int:
        """Of both."""
        return self.q.nbytes + self.kv.nbytes


@dataclass
class Workspace:
    """Buffers of one shape; `run` is a step over them, or the parts of one."""

    shape: Shape
    buffers: Buffers
    run: Callable[..., Any]
    # Whose conditioning rows the buffers hold.
    _held: KeyValueCondition | None = field(default=None, init=False)

    def load(self, condition: KeyValueCondition | None) -> None:
        """Fill the conditioning rows, unless they are this condition's already."""
        if condition is self._held or condition is None:
            return
        start, first = self.shape.image + self.shape.text, 0
        for pair in condition.pairs:
            blocks = slice(first, first + pair.shape[1])
            self.buffers.kv[:, blocks, :, :, start:].copy_(pair)
            first = blocks.stop
        self._held = condition


class Turns:
    """Orders what several CUDA streams, of threads say, do with buffers that they share."""

    def __init__(self) -> None:
        self._last: Any = None

    @contextmanager
    def of(self, device: torch.device) -> Iterator[None]:
        """Behind all that was launched in turns before; the host does not wait."""
        # Inside of someone's own capture, events of outside are not allowed.
        if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
            yield
            return
        if self._last is not None:
            torch.cuda.current_stream(device).wait_event(self._last)
        try:
            yield
        finally:
            self._last = torch.cuda.current_stream(device).record_event()


@kept()
def make_buffers(shape: Shape, blocks: int, heads: int, width: int) -> Buffers:
    """Not filled; heads of `width` channels."""
    options = {"dtype": shape.dtype, "device": shape.device}
    own = shape.image + shape.text
    return Buffers(
        torch.empty(shape.pictures, heads, own, width, **options),
        torch.empty(2, blocks, shape.pictures, heads, own + shape.condition, width, **options),
    )
