"""Everything of one shape: joint buffers and, on a GPU, the graph of a step over them."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mimdit.condition import Condition
from mimdit.engine.step import Joint

# Calls before a capture: they load kernels and choose algorithms.
_WARMUP = 2


@dataclass(frozen=True)
class Shape:
    """B pictures of N image, T text and K conditioning tokens, and whether there is a graph."""

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
    """Buffers of one shape. `step(x, flat, text, joint)` → output tokens; all static in a graph."""

    shape: Shape
    step: Callable[..., Tensor]
    joint: list[Joint]
    graphed: bool
    # Whose conditioning rows the buffers hold.
    _held: KeyValueCondition | None = field(default=None, init=False)
    _graph: torch.cuda.CUDAGraph | None = field(default=None, init=False)
    _inputs: tuple[Tensor, ...] = field(default=(), init=False)
    _output: Tensor | None = field(default=None, init=False)

    def load(self, condition: KeyValueCondition | None) -> None:
        """Fill the conditioning rows, unless they are this condition's already."""
        if condition is self._held or condition is None:
            return
        start = self.shape.image + self.shape.text
        for (_, k, v), key, value in zip(self.joint, condition.keys, condition.values, strict=True):
            k[:, :, start:].copy_(key)
            v[:, :, start:].copy_(value)
        self._held = condition

    def __call__(self, x: Tensor, flat: Tensor, text: Tensor) -> Tensor:
        """Output tokens of image tokens x [B,N,D], modulation [B,total] and text [B,T,D]."""
        if not self.graphed:
            return self.step(x, flat, text, self.joint)
        if self._graph is None:
            try:
                self._capture(x, flat, text)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                warnings.warn(
                    f"no CUDA graph, so steps are launched one by one: {reason}", stacklevel=2
                )
                self.graphed = False
                return self.step(x, flat, text, self.joint)
        assert self._graph is not None and self._output is not None
        for static, given in zip(self._inputs, (x, flat, text), strict=True):
            static.copy_(given)
        self._graph.replay()
        # The next replay overwrites it.
        return self._output.clone()

    def _capture(self, *given: Tensor) -> None:
        self._inputs = tuple(v.clone() for v in given)
        stream = torch.cuda.Stream(self.shape.device)
        stream.wait_stream(torch.cuda.current_stream(self.shape.device))
        with torch.cuda.stream(stream):
            for _ in range(_WARMUP):
                self.step(*self._inputs, self.joint)
        torch.cuda.current_stream(self.shape.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._output = self.step(*self._inputs, self.joint)
        self._graph = graph

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
