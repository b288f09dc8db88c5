"""How kernels are launched, or recorded instead of launched."""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl

from mimkernels.tiles import Tile


@dataclass(frozen=True)
class Launch:
    """A kernel with its grid, its run-time arguments in order, and its constants and options."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]


class _Recording(threading.local):
    """Each thread's own: other threads' kernels run on."""

    launches: list[Launch] | None = None


_recording = _Recording()
# Programs along the second and the third axis of a grid: CUDA takes no more.
_MOST = 65_535


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, **options: Any) -> None:
    """Run `kernel` on its grid, or note it down inside `record`.

    Raises:
        ValueError: a batch (pictures, times slots or layers) that no grid can hold.
    """
    if max(grid[1:], default=0) > _MOST:
        raise ValueError(
            f"batch: expected at most {_MOST} pictures (times slots or layers) in one call, "
            f"got a grid of {list(grid)}"
        )
    if _recording.launches is not None:
        _recording.launches.append(Launch(kernel, tuple(grid), arguments, options))
        return
    device = next(x.device for x in arguments if isinstance(x, torch.Tensor))
    # Triton launches on the current GPU, whichever holds the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        # Explicit, as the default changes between versions of Triton.
        kernel[tuple(grid)](*arguments, **options, enable_fp_fusion=True)


@contextmanager
def record() -> Iterator[list[Launch]]:
    """Collect this thread's launches without running them; tensors need no data ("meta")."""
    made: list[Launch] = []
    before, _recording.launches = _recording.launches, made
    try:
        yield made
    finally:
        _recording.launches = before


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """Sums are float32; float64 (the interpreter's tests) stays."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def matrix_options(tile: Tile, dtype: torch.dtype) -> dict[str, Any]:
    """Constants and options of a matrix kernel with this tile on operands of this type."""
    return {
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "INNER": tile.inner,
        "PRECISION": precision(dtype),
        "ACCUMULATOR": accumulator(dtype),
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


def precision(dtype: torch.dtype) -> str:
    """`tl.dot` on float32 follows torch's own switch for float32 products."""
    relaxed = torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if relaxed and dtype == torch.float32 else "ieee"
