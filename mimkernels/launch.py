"""How kernels are launched, or recorded instead of launched."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, its run-time arguments in order, and its constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


_recorded: list[Launch] | None = None


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Run `kernel` on its grid, or note it down inside `record`."""
    if _recorded is not None:
        _recorded.append(Launch(kernel, tuple(grid), arguments, options))
        return
    # Explicit, as the default changes between versions of Triton.
    kernel[tuple(grid)](*arguments, **options, enable_fp_fusion=True)


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect launches without running them; tensors need no data (device "meta")."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Sums are float32; float64 (the interpreter's tests) stays."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def precision(dtype: torch.dtype) -> str:
    """`tl.dot` on float32 follows torch's own switch for float32 products."""
    relaxed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if relaxed else "ieee"
