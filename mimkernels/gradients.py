"""What all backward passes have in common: no autocast, and no gradients of gradients."""

from collections.abc import Callable
from functools import cached_property, wraps
from typing import Any

import torch
from torch import Tensor

from mimkernels.autocast import no_autocast

Backward = Callable[..., tuple[Tensor | None, ...]]


def kernel_backward(backward: Backward) -> Backward:
    """The backward pass of an `autograd.Function` that cannot itself be differentiated.

    `torch.autograd.function.once_differentiable` refuses only where output gradients require
    gradients. Those of a sum do not, and a gradient penalty would then be left out silently.
    """

    @wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.compiler.is_compiling():
            # Compiled graphs refuse by themselves, and are traced outside of autocast.
            return backward(ctx, *grads)
        kept = _Context(ctx)
        with torch.no_grad(), no_autocast(grads[0].device.type):
            found = backward(kept, *grads)
        if not torch.is_grad_enabled():
            return found
        outputs = [x for x in found if x is not None]
        refusing = iter(_Refusal.apply(len(outputs), *outputs, *grads, *kept.saved_tensors))
        return tuple(None if x is None else next(refusing) for x in found)

    return run


class _Context:
    """An `autograd.Function`'s, which unpacks its tensors once: checkpoints allow no more."""

    def __init__(self, ctx: Any) -> None:
        self._ctx = ctx

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ctx, name)

    @cached_property
    def saved_tensors(self) -> tuple[Tensor | None, ...]:
        return self._ctx.saved_tensors


class _Refusal(torch.autograd.Function):
    """The first `count` tensors as they are, but their gradients raise; all others connect."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError(
            "backend: expected 'torch' for gradients of gradients, got 'triton', whose kernels "
            "have none"
        )
