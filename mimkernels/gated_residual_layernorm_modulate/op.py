"""`gated_residual_layernorm_modulate`: the end of one sub-block and the start of the next."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimkernels.backend import runs_triton
from mimkernels.checks import check_device, check_float, check_shape
from mimkernels.gated_residual_layernorm_modulate.reference import (
    gated_residual_layernorm_modulate_reference,
)
from mimkernels.gradients import kernel_backward
from mimkernels.layernorm_modulate.op import (
    check_both,
    check_rows,
    dense_rows,
    fake_sums,
    modulations,
    per_picture,
)
from mimkernels.registry import kernel_op


def gated_residual_layernorm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    shift: Tensor,
    scale: Tensor,
    *,
    y2: Tensor | None = None,
    gate2: Tensor | None = None,
    shift2: Tensor | None = None,
    scale2: Tensor | None = None,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, ...]:
    """x' = x + gate·y (+ gate2·y2) and h = LN(x')·(1 + scale) + shift.

    Args:
        x: [B,T,C], the residual stream, C at most 16,384.
        y: [B,T,C], what the sub-block returned. gate: [B,C].
        shift, scale: [B,C]. Gates, shifts and scales may also be [1,C], and chunks of one tensor
            need no copy. All types may differ from that of x, as under autocast.
        y2, gate2: a second branch, the other attention of dual-attention blocks.
        shift2, scale2: a second modulation of the same LN(x'), in front of a dual-attention block.
        eps: positive, added to the variance.
        backend: see `mimkernels.backend`.

    Returns:
        (x', h), with a second modulation (x', h, h2), [B,T,C] in the type of x. LN reads x' as it
        is returned, rounded to that type, as step-by-step code does.

    Raises:
        ValueError: shapes, types, devices or strides that do not fit, too many channels, or half of
            a second branch or modulation.
    """
    check_rows(x, eps)
    ys, gates = _branches(x, y, gate, y2, gate2)
    shifts, scales = modulations(x, shift, scale, shift2, scale2)
    if not runs_triton(backend, x):
        return gated_residual_layernorm_modulate_reference(x, ys, gates, shifts, scales, eps)
    return _GatedResidual.apply(x, eps, len(ys), *ys, *gates, *shifts, *scales)


def _branches(
    x: Tensor, y: Tensor, gate: Tensor, y2: Tensor | None, gate2: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    check_both("y2", y2, "gate2", gate2)
    ys = {name: v for name, v in {"y": y, "y2": y2}.items() if v is not None}
    gates = {name: v for name, v in {"gate": gate, "gate2": gate2}.items() if v is not None}
    for name, v in ys.items():
        check_shape(name, v, x.shape)
        check_float(name, v)
        check_device(name, v, "x", x)
    return list(ys.values()), [per_picture(name, v, x) for name, v in gates.items()]


class _GatedResidual(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, eps: float, branches: int, *flat: Tensor
    ) -> tuple[Tensor, ...]:
        y, gate, rest = flat[:branches], flat[branches : 2 * branches], flat[2 * branches :]
        shift, scale = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        out = tuple(_forward(x, y, gate, shift, scale, eps))
        ctx.save_for_backward(out[0], *y, *gate, *scale)
        ctx.eps, ctx.branches = eps, branches
        return out

    @staticmethod
    @kernel_backward
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        (out, *flat), n = ctx.saved_tensors, ctx.branches
        y, gate, scale = flat[:n], flat[n : 2 * n], flat[2 * n :]
        with_parameters = any(ctx.needs_input_grad[3 + n :])
        dx, dy, sums = _backward(out, y, gate, scale, grad, ctx.eps, with_parameters)
        if not with_parameters:
            return dx, None, None, *dy, *[None] * (n + 2 * len(scale))
        dgate = (s.to(g.dtype) for s, g in zip(sums[:n].unbind(0), gate, strict=True))
        rest = sums[n:].to(scale[0].dtype).unbind(0)
        return dx, None, None, *dy, *dgate, *rest[::2], *rest[1::2]


def _launch_forward(*arguments: Any) -> list[Tensor]:
    from mimkernels.gated_residual_layernorm_modulate import kernel

    return kernel.forward(*arguments)


def _launch_backward(
    out: Tensor,
    y: Sequence[Tensor],
    gate: Sequence[Tensor],
    scale: Sequence[Tensor],
    grad: Sequence[Tensor],
    eps: float,
    with_parameters: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    from mimkernels.gated_residual_layernorm_modulate import kernel

    return kernel.backward(out, y, gate, scale, dense_rows(grad), eps, with_parameters)


def _fake_backward(
    out: Tensor,
    y: Sequence[Tensor],
    gate: Sequence[Tensor],
    scale: Sequence[Tensor],
    grad: Sequence[Tensor],
    eps: float,
    with_parameters: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    sums = fake_sums(out, len(gate) + 2 * len(scale) if with_parameters else 0)
    return out.new_empty(out.shape), [v.new_empty(v.shape) for v in y], sums


_forward = kernel_op(
    "gated_residual_layernorm_modulate(Tensor x, Tensor[] y, Tensor[] gate, Tensor[] shift, "
    "Tensor[] scale, float eps) -> Tensor[]",
    _launch_forward,
    lambda x, y, gate, shift, scale, eps: [x.new_empty(x.shape) for _ in (x, *shift)],
)
_backward = kernel_op(
    "gated_residual_layernorm_modulate_backward(Tensor out, Tensor[] y, Tensor[] gate, "
    "Tensor[] scale, Tensor[] grad, float eps, bool with_parameters) -> "
    "(Tensor, Tensor[], Tensor)",
    _launch_backward,
    _fake_backward,
)
