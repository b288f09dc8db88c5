"""Everything of one shape: joint buffers, and how a step runs over them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mimdit.condition import Condition
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
    """A condition as the blocks use it: normalised keys and values [B,heads,K,d] of each."""

    keys: tuple[Tensor, ...] = ()
    values: tuple[Tensor, ...] = ()


@dataclass
class Workspace:
    """Buffers of one shape; `run` is a step over them, or the parts of one."""

    shape: Shape
    joint: list[Joint]
    run: Callable[..., Any]
    # Whose conditioning rows the buffers hold.
    _held: KeyValueCondition | None = field(default=None, init=False)

    def load(self, condition: KeyValueCondition | None) -> None:
        """Fill the conditioning rows, unless they are this condition's already."""
        if condition is self._held or condition is None:
            return
        start = self.shape.image + self.shape.text
        for (_, k, v), key, value in zip(self.joint, condition.keys, condition.values, strict=True):
            k[:, :, start:].copy_(key)
            v[:, :, start:].copy_(value)
        self._held = condition

    @property
    def bytes(self) -> int:
        """Of the joint buffers; blocks share one buffer of queries."""
        tensors = {t.data_ptr(): t for joint in self.joint for t in joint}
        return sum(t.numel() * t.element_size() for t in tensors.values())


def make_joint(shape: Shape, blocks: int, heads: int, width: int) -> list[Joint]:
    """Buffers q [B,heads,N+T,d], shared by all blocks, and k, v [B,heads,N+T+K,d] of each."""
    options = {"dtype": shape.dtype, "device": shape.device}
    own = shape.image + shape.text
    q = torch.empty(shape.pictures, heads, own, width, **options)
    rows = own + shape.condition
    kv = torch.empty(blocks, 2, shape.pictures, heads, rows, width, **options)
    return [(q, k, v) for k, v in (pair.unbind() for pair in kv)]
