"""Which implementation an op runs: its Triton kernel or its torch reference.

The first that is set decides: the op's `backend` argument, `use_backend`, the environment variable
MIMKERNELS_BACKEND (read at import), else "auto".
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

BACKENDS = ("auto", "triton", "torch")
# The oldest GPUs with bfloat16 matrix instructions.
_MINIMUM = (8, 0)
_default = os.environ.get("MIMKERNELS_BACKEND", "auto")


class _Choice:
    def __init__(self, name: str) -> None:
        self.name = name


# Of all `use_backend` that are open, the last one entered decides.
_choices: list[_Choice] = []


class _Noting(threading.local):
    """While a thread only notes launches down, tensors without data will do."""

    on = False


_noting = _Noting()


@contextmanager
def noting_launches() -> Iterator[None]:
    """Inside, every op of this thread goes the way to its kernel, whatever its tensors' device.

    Not for compiled functions.
    """
    before, _noting.on = _noting.on, True
    try:
        yield
    finally:
        _noting.on = before


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ops called inside, without a `backend` argument, take this one.

    In all threads, as gradients that recompute run in torch's own; threads may leave in any order.
    """
    _check("backend", name)
    choice = _Choice(name)
    _choices.append(choice)
    try:
        yield
    finally:
        # Not the last one, which may be another thread's.
        _choices.remove(choice)


def runs_triton(backend: str | None, x: Tensor, lack: str | None = None) -> bool:
    """Whether an op on tensors like `x` launches its kernel.

    "auto" falls back to torch; "triton" raises ValueError with the reason where it cannot run.
    lack: why the op has no kernel for this call, whatever the device, or None.
    """
    # A copy: other threads may leave meanwhile.
    last = _choices[-1:]
    chosen = backend if backend is not None else last[0].name if last else _default
    # Of defaults only the environment's is unchecked.
    _check("MIMKERNELS_BACKEND" if backend is None else "backend", chosen)
    if chosen == "torch":
        return False
    # Compilers follow no values of threads.
    if not torch.compiler.is_compiling() and _noting.on and lack is None:
        return True
    reason = lack or _obstacle(x.device.type, x.device.index or 0, x.dtype)
    if chosen == "triton" and reason:
        raise ValueError(f"backend: 'triton' cannot run here, {reason}")
    # The interpreter is for tests: never a silent choice.
    return reason is None and (chosen == "triton" or x.device.type == "cuda")


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


# A compiler takes the answer as a constant: it cannot look into devices and packages.
@torch.compiler.assume_constant_result
def _obstacle(device: str, index: int, dtype: torch.dtype) -> str | None:
    """Why no kernel can run on tensors of this device and type, or None."""
    if not _triton_installed():
        return "triton is not installed"
    if device == "cpu" and not interpreting():
        return "the tensors are on the CPU"
    if device == "cpu":
        # It would not raise, but return garbage.
        return "Triton's interpreter has no bfloat16" if dtype == torch.bfloat16 else None
    if device != "cuda":
        return f"there are no kernels for {device}"
    if dtype == torch.float64:
        return "there are no float64 kernels for GPUs"
    found = _capability(index)
    if found is None:
        # Tensors without data, as of FakeTensorMode.
        return "there is no GPU"
    if torch.version.hip is None and found < _MINIMUM:
        return f"compute capability 8.0 is needed, this GPU has {found[0]}.{found[1]}"
    return None


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _capability(device: int) -> tuple[int, int] | None:
    return torch.cuda.get_device_capability(device) if torch.cuda.is_available() else None


def _check(source: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
