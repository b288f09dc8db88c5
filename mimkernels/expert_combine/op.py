"""`expert_combine`: the output projections of all picked experts, weighted and summed."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimkernels.autocast import autocast
from mimkernels.backend import runs_triton
from mimkernels.checks import check_device, check_float, check_index, check_like, check_shape
from mimkernels.expert_combine.reference import expert_combine_reference
from mimkernels.gradients import kernel_backward
from mimkernels.registry import kernel_op

Tensors = Tensor | Sequence[Tensor]


def expert_combine(
    x: Tensors,
    weight: Tensors,
    index: Tensors,
    gate: Tensors,
    *,
    bias: Tensor | Sequence[Tensor | None] | None = None,
    residual: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """y[b] = r[b] + Σ_i Σ_s gate_i[b,s]·(x_i[b,s]·W_i[index_i[b,s]]ᵀ + bias_i[index_i[b,s]]).

    One group, or sequences with one entry for each group i:

    Args:
        x: [B,S,T,K], the slots' inputs; S and K may differ between groups.
        weight: [E,N,K]; banks of several layers are one bank with expert numbers l·E + e.
        index: [B,S] int32 or int64. gate: [B,S] in the type of x.
        bias: [E,N], or None for groups without.
        residual: [B,T,N], added.
        backend: see `mimkernels.backend`.

    Returns:
        [B,T,N] in the type of x; up to four groups are summed in one float32 accumulator, more in
        parts that are rounded to the type of x between them.

    Raises:
        ValueError: shapes, types, devices or strides that do not fit; on the CPU also an index
            that is no expert's number.
    """
    x, weight, gate, bias, residual = autocast(x, weight, gate, bias, residual)
    groups = [_sequence(v) for v in (x, weight, index, gate)]
    count = len(groups[0])
    biases = [None] * count if bias is None else _sequence(bias)
    if not count:
        raise ValueError("x: expected at least one group, got none")
    for name, some in zip(("weight", "index", "gate", "bias"), (*groups[1:], biases), strict=True):
        if len(some) != count:
            raise ValueError(f"{name}: expected {count} groups as x, got {len(some)}")
    for i, group in enumerate(zip(*groups, biases, strict=True)):
        _check("" if isinstance(x, Tensor) else f"[{i}]", groups[0][0], groups[1][0], *group)
    if residual is not None:
        first = groups[0][0]
        check_shape("residual", residual, (first.shape[0], first.shape[2], groups[1][0].shape[1]))
        check_like("residual", residual, "x", first)
        check_float("residual", residual)
    if not runs_triton(backend, groups[0][0]):
        x, weight, index, gate = groups
        return expert_combine_reference(x, weight, index, gate, biases, residual)
    flat = [v for some in (*groups, biases) for v in some]
    return _ExpertCombine.apply(count, residual, *flat)


def _sequence(v: Any) -> list[Any]:
    return [v] if isinstance(v, Tensor) else list(v)


def _check(
    at: str,
    first: Tensor,
    first_weight: Tensor,
    x: Tensor,
    weight: Tensor,
    index: Tensor,
    gate: Tensor,
    bias: Tensor | None,
) -> None:
    """One group, `at` its place among several; what all have in common is the first one's."""
    if x.ndim != 4:
        raise ValueError(f"x{at}: expected [B,S,T,K], got {list(x.shape)}")
    check_float(f"x{at}", x)
    check_like(f"x{at}", x, "x[0]", first)
    check_shape(f"x{at}", x, (first.shape[0], None, first.shape[2], None))
    check_shape(f"weight{at}", weight, (None, first_weight.shape[1], x.shape[3]))
    check_like(f"weight{at}", weight, f"x{at}", x)
    check_float(f"weight{at}", weight)
    check_shape(f"index{at}", index, x.shape[:2])
    check_device(f"index{at}", index, f"x{at}", x)
    check_index(f"index{at}", index, weight.shape[0])
    check_shape(f"gate{at}", gate, x.shape[:2])
    check_like(f"gate{at}", gate, f"x{at}", x)
    check_float(f"gate{at}", gate)
    if bias is not None:
        check_shape(f"bias{at}", bias, weight.shape[:2])
        check_like(f"bias{at}", bias, f"x{at}", x)
        check_float(f"bias{at}", bias)


class _ExpertCombine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, count: int, residual: Tensor | None, *flat: Tensor | None) -> Tensor:
        x, weight, index, gate, bias = (flat[i * count : (i + 1) * count] for i in range(5))
        ctx.save_for_backward(*flat)
        ctx.count = count
        return _forward(x, weight, index, gate, bias, residual)

    @staticmethod
    @kernel_backward
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        flat, count = ctx.saved_tensors, ctx.count
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        out: list[list[Tensor | None]] = [[], [], [], [], []]
        for x, weight, index, gate, bias in zip(
            *(flat[i * count : (i + 1) * count] for i in range(5)), strict=True
        ):
            dx, dgate = _backward_input(grad, x, weight, index, gate)
            dweight = dbias = None
            if weight.requires_grad or (bias is not None and bias.requires_grad):
                dweight, dbias = _backward_weight(
                    x, grad, index, gate, weight.shape[0], bias is not None
                )
            if bias is not None:
                sums = grad.sum(1, dtype=torch.promote_types(grad.dtype, torch.float32))
                dgate = dgate + torch.einsum("bn,bsn->bs", sums, bias[index].to(sums)).to(dgate)
            for part, value in zip(out, (dx, dweight, None, dgate, dbias), strict=True):
                part.append(value)
            if bias is None:
                out[4][-1] = None
        return None, grad if ctx.needs_input_grad[1] else None, *(v for part in out for v in part)


def _launch_forward(*arguments: Any) -> Tensor:
    from mimkernels.expert_combine import kernel

    return kernel.forward(*arguments)


def _launch_backward_input(*arguments: Tensor) -> tuple[Tensor, Tensor]:
    from mimkernels.expert_combine import kernel

    return kernel.backward_input(*arguments)


def _launch_backward_weight(
    x: Tensor, grad: Tensor, index: Tensor, gate: Tensor, experts: int, with_bias: bool
) -> tuple[Tensor, Tensor]:
    from mimkernels.expert_linear import kernel

    return kernel.backward_weight(x, grad[:, None], index, experts, with_bias, gate)


_forward = kernel_op(
    "expert_combine(Tensor[] x, Tensor[] weight, Tensor[] index, Tensor[] gate, Tensor?[] bias, "
    "Tensor? residual) -> Tensor",
    _launch_forward,
    lambda x, weight, index, gate, bias, residual: x[0].new_empty(
        x[0].shape[0], x[0].shape[2], weight[0].shape[1]
    ),
)
_backward_input = kernel_op(
    "expert_combine_backward_input(Tensor grad, Tensor x, Tensor weight, Tensor index, "
    "Tensor gate) -> (Tensor, Tensor)",
    _launch_backward_input,
    lambda grad, x, weight, index, gate: (x.new_empty(x.shape), x.new_empty(index.shape)),
)
_backward_weight = kernel_op(
    "expert_combine_backward_weight(Tensor x, Tensor grad, Tensor index, Tensor gate, "
    "SymInt experts, bool with_bias) -> (Tensor, Tensor)",
    _launch_backward_weight,
    lambda x, grad, index, gate, experts, with_bias: (
        x.new_empty(experts, grad.shape[-1], x.shape[-1]),
        x.new_empty(experts if with_bias else 0, grad.shape[-1]),
    ),
)
