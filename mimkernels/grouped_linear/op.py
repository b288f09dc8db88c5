"""`grouped_linear`: one linear layer of each token's own experts, for any mixture-of-experts."""

from typing import Any

import torch
from torch import Tensor

from mimkernels.autocast import autocast
from mimkernels.backend import runs_triton
from mimkernels.checks import (
    check_device,
    check_float,
    check_like,
    check_places,
    check_shape,
)
from mimkernels.gradients import kernel_backward
from mimkernels.grouped_linear.reference import grouped_linear_reference
from mimkernels.registry import kernel_op
from mimkernels.topk_route import Route


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    route: Route,
    bias: Tensor | None = None,
    *,
    gather: bool = True,
    combine: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Multiply each row by the weight of its expert.

    The two layers of a mixture's MLP are `h = grouped_linear(x, w1, route)` and
    `y = grouped_linear(act(h), w2, route, gather=False, combine=True)`.

    Args:
        x: tokens [N,K], or with `gather=False` rows sorted by expert [N·k,K].
        weight: [E,M,K]. bias: [E,M].
        route: of `topk_route`.
        combine: add up each token's rows, weighted by `route.weights`; otherwise rows stay sorted.
        backend: see `mimkernels.backend`. The torch reference multiplies every row by every
            expert's weight: right everywhere, but E times the work.

    Returns:
        [N·k,M] sorted by expert, or [N,M], in the type of x.

    Raises:
        ValueError: shapes, types, devices or strides that do not fit.
    """
    x, weight, bias = autocast(x, weight, bias)
    _check(x, weight, route, bias, gather)
    if not runs_triton(backend, x):
        return grouped_linear_reference(x, weight, route, bias, gather=gather, combine=combine)
    routed = (route.weights, route.experts, route.offsets, route.permutation)
    return _GroupedLinear.apply(x, weight, bias, *routed, gather, combine)


def _check(x: Tensor, weight: Tensor, route: Route, bias: Tensor | None, gather: bool) -> None:
    check_shape("route.experts", route.experts, (None, None))
    tokens, k = route.experts.shape
    check_shape("x", x, (tokens if gather else tokens * k, None))
    check_float("x", x)
    check_shape("weight", weight, (len(route.counts), None, x.shape[1]))
    check_like("weight", weight, "x", x)
    check_float("weight", weight)
    experts, slots = (len(weight),), (tokens * k,)
    shapes = ((tokens, k), (tokens, k), experts, experts, slots, slots)
    for field, value, shape in zip(route._fields, route, shapes, strict=True):
        check_shape(f"route.{field}", value, shape)
        (check_float if field == "weights" else check_places)(f"route.{field}", value)
        check_device(f"route.{field}", value, "x", x)
    if bias is not None:
        check_shape("bias", bias, weight.shape[:2])
        check_like("bias", bias, "x", x)
        check_float("bias", bias)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        gate: Tensor,
        index: Tensor,
        offsets: Tensor,
        permutation: Tensor,
        gather: bool,
        combine: bool,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, gate, index, offsets, permutation)
        ctx.gather, ctx.combine = gather, combine
        scale = gate if combine else None
        slots = index.shape[1]
        out = _forward(x, weight, bias, scale, offsets, permutation, slots, gather, combine)
        return _sum_slots(out, slots) if combine else out

    @staticmethod
    @kernel_backward
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, weight, bias, gate, index, offsets, permutation = ctx.saved_tensors
        scale, slots = gate if ctx.combine else None, index.shape[1]
        routed = (offsets, permutation, slots, ctx.gather, ctx.combine)
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        dx = dweight = dbias = dgate = None
        if ctx.needs_input_grad[0] or (ctx.combine and ctx.needs_input_grad[3]):
            dx, dgate = _backward_input(grad, x, weight, scale, *routed)
            dx = _sum_slots(dx, slots) if ctx.gather else dx
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dweight, dbias = _backward_weight(x, grad, scale, *routed, bias is not None)
        if ctx.combine and ctx.needs_input_grad[3]:
            assert dgate is not None
            dgate = dgate.view(gate.shape)
            if bias is not None:
                dgate = dgate + torch.einsum("nm,nkm->nk", grad.to(gate), bias[index].to(gate))
        else:
            dgate = None
        return dx, dweight, dbias if bias is not None else None, dgate, *[None] * 5


def _sum_slots(rows: Tensor, slots: int) -> Tensor:
    """Rows by slot [N·k,M] added up to tokens [N,M], in order and in float32."""
    return rows.unflatten(0, (-1, slots)).sum(1) if slots > 1 else rows


def _launch_forward(*arguments: Any) -> Tensor:
    from mimkernels.grouped_linear import kernel

    return kernel.forward(*arguments)


def _launch_backward_input(*arguments: Any) -> tuple[Tensor, Tensor]:
    from mimkernels.grouped_linear import kernel

    return kernel.backward_input(*arguments)


def _launch_backward_weight(*arguments: Any) -> tuple[Tensor, Tensor]:
    from mimkernels.grouped_linear import kernel

    return kernel.backward_weight(*arguments)


_forward = kernel_op(
    "grouped_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? gate, Tensor offsets, "
    "Tensor permutation, int slots, bool gather, bool scatter) -> Tensor",
    _launch_forward,
    lambda x, weight, bias, gate, offsets, permutation, slots, gather, scatter: x.new_empty(
        permutation.shape[0], weight.shape[1]
    ),
)
_backward_input = kernel_op(
    "grouped_linear_backward_input(Tensor grad, Tensor x, Tensor weight, Tensor? gate, "
    "Tensor offsets, Tensor permutation, int slots, bool gather, bool combine) "
    "-> (Tensor, Tensor)",
    _launch_backward_input,
    lambda grad, x, weight, gate, offsets, permutation, slots, gather, combine: (
        x.new_empty(permutation.shape[0], x.shape[1]),
        gate.new_empty(permutation.shape[0]) if gate is not None else x.new_empty(0),
    ),
)
_backward_weight = kernel_op(
    "grouped_linear_backward_weight(Tensor x, Tensor grad, Tensor? gate, Tensor offsets, "
    "Tensor permutation, int slots, bool gather, bool combine, bool with_bias) "
    "-> (Tensor, Tensor)",
    _launch_backward_weight,
    lambda x, grad, gate, offsets, permutation, slots, gather, combine, with_bias: (
        x.new_empty(offsets.shape[0], grad.shape[1], x.shape[1]),
        x.new_empty(offsets.shape[0] if with_bias else 0, grad.shape[1]),
    ),
)
