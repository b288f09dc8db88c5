"""`layernorm_modulate`: adaptive layer normalisation (AdaLN)."""

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from mimkernels.backend import runs_triton
from mimkernels.checks import check_device, check_float, check_like, check_shape
from mimkernels.gradients import kernel_backward
from mimkernels.layernorm_modulate.reference import layernorm_modulate_reference
from mimkernels.registry import kernel_op

# A row is one block in registers.
MAX_CHANNELS = 16_384


@overload
def layernorm_modulate(
    x: Tensor, shift: Tensor, scale: Tensor, *, eps: float = ..., backend: str | None = ...
) -> Tensor: ...
@overload
def layernorm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    shift2: Tensor,
    scale2: Tensor,
    *,
    eps: float = ...,
    backend: str | None = ...,
) -> tuple[Tensor, Tensor]: ...
def layernorm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    shift2: Tensor | None = None,
    scale2: Tensor | None = None,
    *,
    eps: float = 1e-6,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """h = LN(x)·(1 + scale) + shift, LN over the channels and without parameters.

    Args:
        x: [B,T,C], C at most 16,384.
        shift, scale: [B,C], or [1,C] for all of the batch; chunks of one tensor need no copy. Their
            type may differ from that of x, as under autocast.
        shift2, scale2: a second modulation of the same LN(x), for dual-attention blocks.
        eps: positive, added to the variance.
        backend: see `mimkernels.backend`.

    Returns:
        h [B,T,C] in the type of x; with a second modulation (h, h2).

    Raises:
        ValueError: shapes, types, devices or strides that do not fit, too many channels, or half of
            a second modulation.
    """
    check_rows(x, eps)
    shifts, scales = modulations(x, shift, scale, shift2, scale2)
    if runs_triton(backend, x):
        h = _LayerNormModulate.apply(x, eps, *shifts, *scales)
    else:
        h = layernorm_modulate_reference(x, shifts, scales, eps)
    return h[0] if len(h) == 1 else (h[0], h[1])


def check_rows(x: Tensor, eps: float) -> None:
    """What is to be normalised."""
    check_shape("x", x, (None, None, None))
    check_float("x", x)
    if not 1 <= x.shape[2] <= MAX_CHANNELS:
        raise ValueError(f"x: expected 1 to {MAX_CHANNELS} channels, got {x.shape[2]}")
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")


def check_both(name: str, v: Tensor | None, other_name: str, other: Tensor | None) -> None:
    """Two optional arguments that come together."""
    if (v is None) != (other is None):
        given, missing = (name, other_name) if other is None else (other_name, name)
        raise ValueError(f"{missing}: expected together with {given}, got None")


def per_picture(name: str, v: Tensor, x: Tensor) -> Tensor:
    """[B,C] from [B,C] or [1,C]."""
    check_shape(name, v, (1 if v.shape[:1] == (1,) else x.shape[0], x.shape[2]))
    check_float(name, v)
    check_device(name, v, "x", x)
    return v.expand(x.shape[0], -1)


def modulations(
    x: Tensor, shift: Tensor, scale: Tensor, shift2: Tensor | None, scale2: Tensor | None
) -> tuple[list[Tensor], list[Tensor]]:
    """Shifts and scales [B,C] of one or two modulations."""
    check_both("shift2", shift2, "scale2", scale2)
    named = {"shift": shift, "scale": scale, "shift2": shift2, "scale2": scale2}
    given = {name: v for name, v in named.items() if v is not None}
    for name, v in given.items():
        check_like(name, v, "shift", shift)
    flat = [per_picture(name, v, x) for name, v in given.items()]
    return flat[::2], flat[1::2]


def dense_rows(grads: Sequence[Tensor]) -> list[Tensor]:
    """Gradients with a last stride of 1; expanded ones (of a sum, say) have strides of zero."""
    return [g if g.stride(-1) == 1 else g.contiguous() for g in grads]


def fake_sums(x: Tensor, count: int) -> Tensor:
    """Gradients [count,B,C] of arguments [B,C], before they are rounded."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(count, x.shape[0], x.shape[2], dtype=wide)


class _LayerNormModulate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, eps: float, *flat: Tensor) -> tuple[Tensor, ...]:
        shift, scale = flat[: len(flat) // 2], flat[len(flat) // 2 :]
        ctx.save_for_backward(x, *scale)
        ctx.eps = eps
        return tuple(_forward(x, shift, scale, eps))

    @staticmethod
    @kernel_backward
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        x, *scale = ctx.saved_tensors
        with_modulation = any(ctx.needs_input_grad[2:])
        dx, sums = _backward(x, scale, grad, ctx.eps, with_modulation)
        if not with_modulation:
            return dx, None, *[None] * (2 * len(scale))
        sums = sums.to(scale[0].dtype).unbind(0)
        return dx, None, *sums[::2], *sums[1::2]


def _launch_forward(*arguments: Any) -> list[Tensor]:
    from mimkernels.layernorm_modulate import kernel

    return kernel.forward(*arguments)


def _launch_backward(
    x: Tensor, scale: Sequence[Tensor], grad: Sequence[Tensor], eps: float, with_modulation: bool
) -> tuple[Tensor, Tensor]:
    from mimkernels.layernorm_modulate import kernel

    return kernel.backward(x, scale, dense_rows(grad), eps, with_modulation)


_forward = kernel_op(
    "layernorm_modulate(Tensor x, Tensor[] shift, Tensor[] scale, float eps) -> Tensor[]",
    _launch_forward,
    lambda x, shift, scale, eps: [x.new_empty(x.shape) for _ in shift],
)
_backward = kernel_op(
    "layernorm_modulate_backward(Tensor x, Tensor[] scale, Tensor[] grad, float eps, "
    "bool with_modulation) -> (Tensor, Tensor)",
    _launch_backward,
    lambda x, scale, grad, eps, with_modulation: (
        x.new_empty(x.shape),
        fake_sums(x, 2 * len(scale) if with_modulation else 0),
    ),
)
