"""A function of tensors as one CUDA graph."""

import threading
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mimdit.engine.modes import kept, without_cached_casts

# Of a process, only one capture may be underway.
_CAPTURE = threading.Lock()
# Calls before a capture: they load kernels and choose algorithms.
_WARMUP = 2


class Graphed:
    """`function(*tensors)` → one tensor or a tuple of them, captured at its first call.

    All later calls have tensors of the same shapes, which are copied into the graph's own. Where a
    capture fails, kernels are launched one by one and a warning says why.
    """

    def __init__(self, function: Callable[..., Any], device: torch.device) -> None:
        self.function, self.device = function, device
        self._graph: Any = None
        self._failed = False
        self._inputs: tuple[Tensor, ...] = ()
        self._output: Any = None

    def __call__(self, *given: Tensor) -> Any:
        if self._graph is None and not self._failed:
            try:
                self._capture(given)
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                warnings.warn(
                    f"no CUDA graph, so steps are launched one by one: {reason}", stacklevel=2
                )
                self._failed = True
        if self._failed:
            return self.function(*given)
        for static, tensor in zip(self._inputs, given, strict=True):
            static.copy_(tensor)
        assert self._graph is not None
        self._graph.replay()
        # The next replay overwrites it.
        if isinstance(self._output, tuple):
            return tuple(x.clone() for x in self._output)
        return self._output.clone()

    def _capture(self, given: tuple[Tensor, ...]) -> None:
        with _CAPTURE, torch.cuda.device(self.device), without_cached_casts():
            with kept():
                self._inputs = tuple(v.clone() for v in given)
            # One of this GPU: what torch captures on by itself belongs to the first that did.
            stream = torch.cuda.Stream(self.device)
            stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(stream):
                for _ in range(_WARMUP):
                    self.function(*self._inputs)
            torch.cuda.current_stream(self.device).wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads may go on with work of their own, such as the next picture's.
            with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
                self._output = self.function(*self._inputs)
            self._graph = graph
