"""Matrix ops under `torch.autocast` take its type, as torch's own do."""

from typing import Any

import torch


def autocast(*arguments: Any) -> tuple[Any, ...]:
    """Tensors in the type of the autocast that is on, if any; float64, integers and None stay.

    Lists of tensors are cast one by one.
    """
    return tuple(_cast(value) for value in arguments)


def _cast(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_cast(v) for v in value]
    if not isinstance(value, torch.Tensor):
        return value
    device = value.device.type
    plain = not value.is_floating_point() or value.dtype == torch.float64
    if plain or device == "meta" or not torch.is_autocast_enabled(device):
        return value
    return value.to(torch.get_autocast_dtype(device))
