"""Which implementation an op runs: its Triton kernel or its torch reference.

The first that is set decides: the op's `backend` argument, `use_backend`, the environment variable
MIMKERNELS_BACKEND (read at import), else "auto".
"""

import os
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
# While launches are only noted down, tensors without data will do.
_noting = False


@contextmanager
def noting_launches() -> Iterator[None]:
    """Inside, every op goes the way to its kernel, whatever the device of its tensors."""
    global _noting
    before, _noting = _noting, True
    try:
        yield
    finally:
        _noting = before


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Ops called inside, without a `backend` argument, take this one."""
    global _default
    _check("backend", name)
    before, _default = _default, name
    try:
        yield
    finally:
        _default = before


def runs_triton(backend: str | None, x: Tensor, lack: str | None = None) -> bool:
    """Whether an op on tensors like `x` launches its kernel.

    "auto" falls back to torch; "triton" raises ValueError with the reason where it cannot run.
    lack: why the op has no kernel for this call, whatever the device, or None.
    """
    chosen = _default if backend is None else backend
    # Of defaults only the environment's is unchecked.
    _check("MIMKERNELS_BACKEND" if backend is None else "backend", chosen)
    if chosen == "torch":
        return False
    if _noting and lack is None:
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
    if device == "cpu":
        return None if interpreting() else "the tensors are on the CPU"
    if device != "cuda":
        return f"there are no kernels for {device}"
    if dtype == torch.float64:
        return "there are no float64 kernels for GPUs"
    found = _capability(index)
    if torch.version.hip is None and found < _MINIMUM:
        return f"compute capability 8.0 is needed, this GPU has {found[0]}.{found[1]}"
    return None


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _check(source: str, name: str) -> None:
    if name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
