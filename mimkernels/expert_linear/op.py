"""`expert_linear`: one linear layer of each picture's own experts."""

from typing import Any

import torch
from torch import Tensor

from mimkernels.autocast import autocast
from mimkernels.backend import runs_triton
from mimkernels.checks import check_device, check_float, check_index, check_like, check_shape
from mimkernels.expert_linear.reference import expert_linear_reference
from mimkernels.gradients import kernel_backward
from mimkernels.registry import kernel_op


def expert_linear(
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """y[b,j] = x[b,(j)]·W[index[b,j]]ᵀ + bias[index[b,j]].

    Args:
        x: [B,T,K], shared by the slots, or [B,k,T,K].
        weight: [E,N,K]; banks of several layers are one bank with expert numbers l·E + e.
        index: [B,k] int32 or int64, the experts that each picture picked.
        bias: [E,N].
        backend: see `mimkernels.backend`.

    Returns:
        [B,k,T,N] in the type of x.

    Raises:
        ValueError: shapes, types, devices or strides that do not fit; on the CPU also an index
            that is no expert's number.
    """
    x, weight, bias = autocast(x, weight, bias)
    _check(x, weight, index, bias)
    if not runs_triton(backend, x):
        return expert_linear_reference(x, weight, index, bias)
    return _ExpertLinear.apply(x if x.ndim == 4 else x.unsqueeze(1), weight, index, bias)


def _check(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None) -> None:
    if x.ndim not in (3, 4):
        raise ValueError(f"x: expected [B,T,K] or [B,k,T,K], got {list(x.shape)}")
    check_float("x", x)
    check_shape("weight", weight, (None, None, x.shape[-1]))
    check_like("weight", weight, "x", x)
    check_float("weight", weight)
    check_shape("index", index, (x.shape[0], x.shape[1] if x.ndim == 4 else None))
    check_device("index", index, "x", x)
    check_index("index", index, weight.shape[0])
    if bias is not None:
        check_shape("bias", bias, weight.shape[:2])
        check_like("bias", bias, "x", x)
        check_float("bias", bias)


class _ExpertLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, index)
        ctx.with_bias = bias is not None
        return _forward(x, weight, index, bias)

    @staticmethod
    @kernel_backward
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, index = ctx.saved_tensors
        dx = dweight = dbias = None
        if ctx.needs_input_grad[0]:
            # dx[b,j] = dy[b,j]·W: the same product with the weight's axes exchanged.
            dx = _forward(grad, weight.transpose(1, 2), index, None)
            if x.shape[1] == 1:
                dx = dx.sum(1, keepdim=True)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            dweight, dbias = _backward_weight(x, grad, index, weight.shape[0], ctx.with_bias)
        return dx, dweight, None, dbias if ctx.with_bias else None


def _launch_forward(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    from mimkernels.expert_linear import kernel

    return kernel.forward(x, weight, index, bias)


def _launch_backward_weight(
    x: Tensor, grad: Tensor, index: Tensor, experts: int, with_bias: bool
) -> tuple[Tensor, Tensor]:
    from mimkernels.expert_linear import kernel

    # Expanded gradients (of a sum, say) have strides of zero.
    dense = grad if grad.stride(-1) == 1 else grad.contiguous()
    return kernel.backward_weight(x, dense, index, experts, with_bias)


_forward = kernel_op(
    "expert_linear(Tensor x, Tensor weight, Tensor index, Tensor? bias) -> Tensor",
    _launch_forward,
    lambda x, weight, index, bias: x.new_empty(*index.shape, x.shape[2], weight.shape[1]),
)
_backward_weight = kernel_op(
    "expert_linear_backward_weight(Tensor x, Tensor grad, Tensor index, SymInt experts, "
    "bool with_bias) -> (Tensor, Tensor)",
    _launch_backward_weight,
    lambda x, grad, index, experts, with_bias: (
        x.new_empty(experts, grad.shape[-1], x.shape[-1]),
        x.new_empty(experts if with_bias else 0, grad.shape[-1]),
    ),
)
