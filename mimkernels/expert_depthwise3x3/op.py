"""`expert_depthwise3x3`: a depthwise convolution of each picture's own experts."""

from typing import Any

import torch
from torch import Tensor

from mimkernels.autocast import autocast
from mimkernels.backend import runs_triton
from mimkernels.checks import check_device, check_float, check_index, check_like, check_shape
from mimkernels.expert_depthwise3x3.reference import expert_depthwise3x3_reference
from mimkernels.gradients import kernel_backward
from mimkernels.registry import kernel_op


def expert_depthwise3x3(
    x: Tensor, weight: Tensor, index: Tensor, *, backend: str | None = None
) -> Tensor:
    """Depthwise 3×3 convolution (as in networks: correlation) with zero padding.

    Args:
        x: [B,k,H,W,C], the k slots of every picture.
        weight: [E,C,3,3].
        index: [B,k] int32 or int64, the experts that each picture picked.
        backend: see `mimkernels.backend`.

    Returns:
        [B,k,H,W,C] in the type of x.

    Raises:
        ValueError: shapes, types, devices or strides that do not fit; on the CPU also an index
            that is no expert's number.
    """
    x, weight = autocast(x, weight)
    check_shape("x", x, (None,) * 5)
    check_float("x", x)
    check_shape("weight", weight, (None, x.shape[-1], 3, 3))
    check_like("weight", weight, "x", x)
    check_float("weight", weight)
    check_shape("index", index, x.shape[:2])
    check_device("index", index, "x", x)
    check_index("index", index, weight.shape[0])
    if not runs_triton(backend, x):
        return expert_depthwise3x3_reference(x, weight, index)
    return _ExpertDepthwise.apply(x, weight, index)


class _ExpertDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, index)
        return _forward(x, weight, index, False)

    @staticmethod
    @kernel_backward
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, index = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        dx = _forward(grad, weight, index, True) if ctx.needs_input_grad[0] else None
        dweight = None
        if ctx.needs_input_grad[1]:
            dweight = _backward_weight(x, grad, index, weight.shape[0])
        return dx, dweight, None


def _launch_forward(x: Tensor, weight: Tensor, index: Tensor, flip: bool) -> Tensor:
    from mimkernels.expert_depthwise3x3 import kernel

    return kernel.forward(x, weight, index, flip)


def _launch_backward_weight(x: Tensor, grad: Tensor, index: Tensor, experts: int) -> Tensor:
    from mimkernels.expert_depthwise3x3 import kernel

    return kernel.backward_weight(x, grad, index, experts)


_forward = kernel_op(
    "expert_depthwise3x3(Tensor x, Tensor weight, Tensor index, bool flip) -> Tensor",
    _launch_forward,
    lambda x, weight, index, flip: x.new_empty(x.shape),
)
_backward_weight = kernel_op(
    "expert_depthwise3x3_backward_weight(Tensor x, Tensor grad, Tensor index, SymInt experts) "
    "-> Tensor",
    _launch_backward_weight,
    lambda x, grad, index, experts: x.new_empty(experts, x.shape[-1], 3, 3),
)
