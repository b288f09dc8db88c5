"""Arguments of ops: every error names the argument, what was expected and what came."""

from collections.abc import Sequence

import torch
from torch import Tensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_float(name: str, x: Tensor) -> None:
    """A floating-point tensor whose last axis is dense."""
    if x.dtype not in FLOATS:
        raise ValueError(f"{name}: expected a floating-point type, got {x.dtype}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: expected a last stride of 1, got {x.stride(-1)}")


def check_shape(name: str, x: Tensor, shape: Sequence[int | None]) -> None:
    """The given sizes; None stands for any."""
    fits = x.ndim == len(shape) and all(w in (None, n) for n, w in zip(x.shape, shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name}: expected shape [{wanted}], got {list(x.shape)}")


def check_like(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """The type and device of another argument."""
    if x.dtype != other.dtype:
        raise ValueError(f"{name}: expected {other.dtype} as {other_name}, got {x.dtype}")
    check_device(name, x, other_name, other)


def check_device(name: str, x: Tensor, other_name: str, other: Tensor) -> None:
    """The device of another argument."""
    if x.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as {other_name}, got {x.device}")


def check_places(name: str, x: Tensor) -> None:
    """int32 with a dense last axis, as of a `Route`."""
    if x.dtype != torch.int32:
        raise ValueError(f"{name}: expected torch.int32, got {x.dtype}")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"{name}: expected a last stride of 1, got {x.stride(-1)}")


def check_index(name: str, index: Tensor, experts: int) -> None:
    """Integers; on the CPU also that each is an expert's number (a GPU would have to wait)."""
    if index.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}: expected int32 or int64, got {index.dtype}")
    real = index.device.type == "cpu" and not torch.compiler.is_compiling()
    if real and not isinstance(index, torch._subclasses.FakeTensor) and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= experts:
            raise ValueError(f"{name}: expected 0 to {experts - 1}, got {low} to {high}")
