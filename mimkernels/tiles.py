"""Tile configurations of the matrix kernels, by architecture.

Heuristics; measured entries for single devices can replace them. An architecture is "sm_90" and the
like, or "gfx942".
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

import torch

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
# Shared memory of one block, in bytes.
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}


@dataclass(frozen=True)
class Tile:
    """A matrix kernel's block [rows, columns] and its step along the inner axis."""

    rows: int
    columns: int
    inner: int
    warps: int
    stages: int


def matrix_tile(
    architecture: str, itemsize: int, rows: int, columns: int, accumulators: int = 1
) -> Tile:
    """The tile for an output of `rows`×`columns` whose operands have `itemsize` bytes."""
    if architecture not in SHARED_MEMORY:
        known = ", ".join(ARCHITECTURES)
        raise ValueError(f"architecture: expected one of {known}, got {architecture!r}")
    large = SHARED_MEMORY[architecture] > 150_000
    side = 128 if itemsize == 2 else 64
    # No tile much larger than the output; 16 is the least that matrix instructions take.
    m, n = (max(16, min(side, 1 << (size - 1).bit_length())) for size in (rows, columns))
    # Only wgmma and tcgen05 read both operands from shared memory, not from registers.
    inner = 64 if architecture in ("sm_90", "sm_100") else 32
    stages = 2 if architecture == "gfx942" else 4 if large and itemsize == 2 else 3
    if itemsize >= 4:
        # Without tensor cores the operands sit in registers, too: more of them spills.
        m, inner, stages = min(m, 32), 16, 2
        if accumulators > 1:
            m, n = 16, min(n, 32)
    elif accumulators > 1 and architecture not in ("sm_90", "gfx942"):
        # A second accumulator of 128×128 leaves mma.sync, and tcgen05 outside its tensor memory,
        # no registers for operands.
        m = min(m, 64)
    warps = 8 if m * n * accumulators > 64 * 128 else 4
    return Tile(m, n, inner, warps, stages)


class _Target(threading.local):
    """The architecture that a thread asks for, or None: that of its tensors."""

    name: str | None = None


_target = _Target()


@contextmanager
def tiles_for(name: str) -> Iterator[None]:
    """Inside, this thread's tiles are those of one architecture, whatever the tensors' device."""
    before, _target.name = _target.name, name
    try:
        yield
    finally:
        _target.name = before


def architecture(device: torch.device) -> str:
    """Of a device's GPU; in the interpreter, on the CPU, that of a common one."""
    if _target.name is not None:
        return _target.name
    return "sm_80" if device.type == "cpu" else _of_gpu(device.index or 0)


@cache
def _of_gpu(device: int) -> str:
    if torch.version.hip is not None:
        found = torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
        return found if found in SHARED_MEMORY else "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    # A newer member of a family runs the tiles of its eldest, a stranger the smallest.
    for found in (f"sm_{major}{minor}", f"sm_{major}0" if major >= 10 else ""):
        if found in SHARED_MEMORY:
            return found
    return "sm_86"
