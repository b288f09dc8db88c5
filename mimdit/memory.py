"""How much memory is free, and going on with less where it runs out."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")
# What is said by those that raise no error of their own: torch on a CPU and on Apple's GPUs, CUDA's
# driver, and the libraries on it.
_SHORT = (
    "DefaultCPUAllocator",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def shrinking(
    run: Callable[[int, int], T], tile: int, batch: int, smallest: int, release: Callable[[], None]
) -> T:
    """`run(tile, batch)`, again with fewer tiles a pass, then smaller ones, while memory runs out.

    tile: pixels, as is `smallest`, the least that is tried. release: gives back what is kept for
    later. Each retry is announced by a warning. Raises the last error where nothing is left to
    shrink.
    """
    while True:
        try:
            return run(tile, batch)
        except (RuntimeError, MemoryError) as error:
            if not ran_out(error):
                raise
            if batch > 1:
                batch //= 2
            elif tile // 2 >= smallest:
                tile //= 2
            else:
                raise
            reason = str(error).splitlines()[0] if str(error) else "out of memory"
        # Outside the handler, which keeps the tensors of the failed call alive.
        release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"{reason}; trying again with {batch} tiles of {tile} pixels in a forward pass",
            stacklevel=2,
        )


def ran_out(error: Exception) -> bool:
    """Whether memory is what was missing: only CUDA's allocator has a class of its own for it."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SHORT)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be had on a device; None where nothing tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        entries = dict(line.split(":", 1) for line in lines)
        room = int(entries["MemAvailable"].split()[0]) * 1024
    # Other systems than Linux have no such file.
    except (OSError, KeyError, ValueError, IndexError):
        return None
    held = _container_room(Path("/sys/fs/cgroup"))
    return room if held is None else min(room, held)


def _container_room(group: Path) -> int | None:
    """Bytes left under a control group's limit (version 2); None where there is none."""
    try:
        most, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # Files that are only cached make room when asked.
        return max(most - used + int(stat["inactive_file"]), 0)
    except (OSError, KeyError, ValueError):
        return None
