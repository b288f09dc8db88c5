"""Matrix ops under `torch.autocast` take its type, as torch's own do."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def autocast(*arguments: Any) -> tuple[Any, ...]:
    """Tensors in the type of the autocast that is on, if any; float64, integers and None stay.

    Lists of tensors are cast one by one.
    """
    return tuple(_cast(value) for value in arguments)


def changes(x: torch.Tensor) -> bool:
    """Whether the autocast that is on, if any, takes x in another type."""
    device = x.device.type
    plain = not x.is_floating_point() or x.dtype == torch.float64
    if plain or device == "meta" or not torch.is_autocast_enabled(device):
        return False
    return x.dtype != torch.get_autocast_dtype(device)


def no_autocast(device: str) -> AbstractContextManager[Any]:
    """Inside, products on a device of this kind keep their operands' types."""
    on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _cast(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_cast(v) for v in value]
    if not isinstance(value, torch.Tensor) or not changes(value):
        return value
    return value.to(torch.get_autocast_dtype(value.device.type))
