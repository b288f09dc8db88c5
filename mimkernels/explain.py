"""What one call of an op launches on a GPU that need not be there, and the least it can take."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from mimkernels import backend
from mimkernels.costs import Cost, cost, name_of
from mimkernels.devices import Device, find_device, resident_blocks
from mimkernels.tiles import tiles_for


@dataclass(frozen=True)
class Kernel:
    """One launch as the compiler made it.

    tile: the kernel's constants, ROWS, COLUMNS and INNER of matrix kernels. registers: of a thread;
    stack: bytes, which spilled registers take; both None where unknown. shared: bytes. blocks:
    that fit on a multiprocessor at once (an upper bound where registers are unknown), limited by
    `limit`. waves: the grid over what fits on the whole device. fault: why it must not ship, or "".
    """

    name: str
    grid: tuple[int, ...]
    tile: dict[str, int]
    warps: int
    stages: int
    registers: int | None
    stack: int | None
    shared: int
    matrix: str
    blocks: int
    limit: str
    waves: float
    fault: str


@dataclass(frozen=True)
class Explanation:
    """The launches of one call, its cost, and the peak of the device for its type in FLOP/s.

    allocated: bytes of all tensors that the call makes, results among them; its memory beyond that
    of its inputs never exceeds this.
    """

    op: str
    dtype: str
    device: Device
    cost: Cost
    allocated: int
    peak: float
    kernels: tuple[Kernel, ...]

    @property
    def floor(self) -> float:
        """Seconds that the call takes at least."""
        return self.cost.floor(self.peak, self.device.bandwidth)

    def __str__(self) -> str:
        products, memory = self.cost.flops / self.peak, self.cost.bytes / self.device.bandwidth
        head = f"{self.op}, {self.dtype}, on {self.device.name} ({self.device.architecture}): "
        head += f"{self.cost.flops / 1e9:.3g} GFLOP, {self.cost.bytes / 1e6:.3g} MB, at least "
        head += f"{_micro(self.floor)} (products {_micro(products)}, memory {_micro(memory)}), "
        head += f"allocates {self.allocated / 1e6:.3g} MB"
        columns = ["kernel", "grid", "tile", "warps", "stages", "registers", "stack", "shared"]
        table = [[*columns, "matrix", "blocks", "limit", "waves", ""]]
        for kernel in self.kernels:
            grid = "×".join(str(n) for n in kernel.grid)
            tile = " ".join(f"{name}={value}" for name, value in kernel.tile.items())
            unknown = ("-" if n is None else n for n in (kernel.registers, kernel.stack))
            cells = (kernel.name, grid, tile, kernel.warps, kernel.stages, *unknown, kernel.shared)
            rest = (kernel.matrix, kernel.blocks, kernel.limit, f"{kernel.waves:.2f}", kernel.fault)
            table.append([str(cell) for cell in (*cells, *rest)])
        widths = [max(len(cell) for cell in column) for column in zip(*table, strict=True)]
        lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) for row in table]
        return "\n".join([head, *(line.rstrip() for line in lines)])


def explain(
    op: Callable[..., Any], *arguments: Any, device: str = "H200", **options: Any
) -> Explanation:
    """What `op(*arguments, **options)` launches on a device, compiled here, without a GPU.

    Nothing is computed, and of the tensors only shapes, strides and types are read: they may be on
    any device, "meta" too. Gradients are not part of it.

    Args:
        op: a function of this package, as `mimkernels.expert_linear`.
        device: a name in `mimkernels.devices.DEVICES`; its published figures give the floor.

    Raises:
        ValueError: an unknown op or device, a type without kernels, or what the op itself refuses.
        RuntimeError: Triton's interpreter is on (TRITON_INTERPRET=1), which cannot compile.
    """
    if backend.interpreting():
        raise RuntimeError("Triton's interpreter is on; unset TRITON_INTERPRET to compile")
    from mimkernels.aot import DTYPES, compile_launch
    from mimkernels.launch import precision

    target, name = find_device(device), name_of(op)
    arguments, options = tree_map_only(Tensor, without_data, (arguments, options))
    leaves = tree_leaves((arguments, options))
    dtype = next(x.dtype for x in leaves if isinstance(x, Tensor) and x.is_floating_point())
    names = {known: name for name, known in DTYPES.items()}
    if dtype not in names:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype}")
    with allocations() as allocated, recorded(target.architecture) as launches, torch.no_grad():
        op(*arguments, **{**options, "backend": "triton"})
    least = cost(op, *arguments, **options).forward
    kernels = []
    for launch in launches:
        made = compile_launch(name, names[dtype], target.architecture, launch)
        blocks, limit = resident_blocks(
            target.architecture, made.warps, made.registers, made.shared
        )
        at_once = blocks * target.multiprocessors
        kernels.append(
            Kernel(
                made.kernel,
                launch.grid,
                {k: v for k, v in launch.options.items() if k.isupper() and type(v) is int},
                made.warps,
                launch.options["num_stages"],
                made.registers,
                made.stack,
                made.shared,
                made.matrix,
                blocks,
                limit,
                prod(launch.grid) / at_once if at_once else float("inf"),
                made.fault,
            )
        )
    peak = target.peak(dtype, precision(dtype) == "tf32")
    return Explanation(name, names[dtype], target, least, sum(allocated), peak, tuple(kernels))


@contextmanager
def recorded(architecture: str) -> Iterator[list[Any]]:
    """The launches of ops called inside, on tensors without data, with an architecture's tiles."""
    from mimkernels.launch import record

    with backend.noting_launches(), tiles_for(architecture), record() as launches, _Launching():
        yield launches


@contextmanager
def allocations() -> Iterator[list[int]]:
    """The bytes of each tensor made inside, in order; `recorded`, if used, comes inside of it."""
    mode = _Allocating()
    with mode:
        yield mode.made


def without_data(x: Tensor) -> Tensor:
    """Shape, strides and type alone."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


class _Launching(TorchDispatchMode):
    """Operators of this package run the code that launches, on tensors of any device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace != "mimkernels":
            return func(*args, **(kwargs or {}))
        # Registered for CUDA and the CPU alike; "meta" has only shapes.
        launching = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
        return func.redispatch(launching, *args, **(kwargs or {}))


class _Allocating(TorchDispatchMode):
    """Notes storages that no argument had."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {_storage(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        new = {_storage(x): x for x in tree_leaves(out) if isinstance(x, Tensor)}
        self.made += [x.untyped_storage().nbytes() for at, x in new.items() if at not in given]
        return out


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _micro(seconds: float) -> str:
    return f"{seconds * 1e6:.3g} µs"
