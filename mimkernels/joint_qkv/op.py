"""`joint_qkv`: several streams' queries, keys and values, side by side for one attention."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mimkernels.backend import runs_triton
from mimkernels.checks import check_device, check_float, check_like, check_shape
from mimkernels.gradients import kernel_backward
from mimkernels.joint_qkv.reference import joint_qkv_reference, stream_reference
from mimkernels.registry import kernel_op

Weights = Sequence[Tensor | None]


def joint_qkv(
    qkvs: Sequence[Tensor],
    q_norm_weights: Weights | None = None,
    k_norm_weights: Weights | None = None,
    *,
    heads: int,
    eps: float = 1e-6,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of all streams in the order given, RMS-normalised where asked for.

    Args:
        qkvs: one or more streams [B,T_i,3·h·d], q, k and v in a row and heads inside each. Streams
            [B,T_i,2·h·d], k and v, have no queries; the widest stream must have them.
        q_norm_weights, k_norm_weights: for each stream the weight [d] of its RMSNorm over the
            channels of a head, of any floating-point type, or None: no norm. None: no norms.
        heads: h.
        eps: positive, added to the mean square.
        backend: see `mimkernels.backend`.

    Returns:
        q [B,h,ΣT_i,d] over the streams with queries, k and v [B,h,ΣT_i,d] over all, dense, in the
        streams' type.

    Raises:
        ValueError: shapes, types, devices or strides that do not fit.
    """
    if not qkvs:
        raise ValueError("qkvs: expected at least one stream, got none")
    for i, qkv in enumerate(qkvs):
        check_shape(f"qkvs[{i}]", qkv, (None, None, None))
    columns = max(qkv.shape[2] for qkv in qkvs)
    if heads < 1 or columns < 3 * heads or columns % (3 * heads):
        raise ValueError(
            f"heads: expected a divisor of {columns} / 3 (the widest stream's q, k and v), "
            f"got {heads}"
        )
    width = columns // (3 * heads)
    weights = _check(qkvs, q_norm_weights, k_norm_weights, heads, width, eps)
    if runs_triton(backend, qkvs[0]):
        flat = (*qkvs, *weights[0], *weights[1])
        return _JointQKV.apply(len(qkvs), heads, width, eps, *flat)
    return joint_qkv_reference(qkvs, *weights, heads, width, eps)


def joint_qkv_(
    buffers: tuple[Tensor, Tensor, Tensor],
    qkvs: Sequence[Tensor],
    q_norm_weights: Weights | None = None,
    k_norm_weights: Weights | None = None,
    *,
    offsets: Sequence[int],
    eps: float = 1e-6,
    backend: str | None = None,
) -> None:
    """`joint_qkv` into rows of buffers, for inference; all other rows stay as they are.

    Args:
        buffers: q [B,h,T_q,d], k and v [B,h,T,d], of any strides but the last. T_q may be less than
            T: streams without queries come last.
        qkvs, q_norm_weights, k_norm_weights, eps, backend: as for `joint_qkv`; every stream may be
            without queries.
        offsets: for each stream, its first row in the buffers, the same in q as in k and v.

    Raises:
        ValueError: what does not fit, streams that overlap or leave the buffers, or tensors that
            require gradients.
    """
    q, k, v = buffers
    check_shape("k", k, (None,) * 4)
    pictures, heads, tokens, width = k.shape
    check_shape("v", v, k.shape)
    check_shape("q", q, (pictures, heads, None, width))
    weights = _check(qkvs, q_norm_weights, k_norm_weights, heads, width, eps)
    for name, buffer in (("q", q), ("k", k), ("v", v)):
        check_float(name, buffer)
        if qkvs:
            check_like(name, buffer, "qkvs[0]", qkvs[0])
    _check_places(qkvs, offsets, q.shape[2], tokens, pictures, 3 * heads * width)
    given = [x for x in (*buffers, *qkvs, *weights[0], *weights[1]) if x is not None]
    if torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise ValueError("buffers: expected no gradients (joint_qkv has them), got requires_grad")
    if not qkvs:
        return
    if runs_triton(backend, qkvs[0]):
        _write(q, k, v, qkvs, *weights, offsets, eps)
        return
    for qkv, q_weight, k_weight, start in zip(qkvs, *weights, offsets, strict=True):
        parts = stream_reference(qkv, q_weight, k_weight, heads, width, eps)
        for buffer, part in zip(buffers, parts, strict=True):
            if part is not None:
                buffer[:, :, start : start + part.shape[2]] = part


def _check(
    qkvs: Sequence[Tensor],
    q_norm_weights: Weights | None,
    k_norm_weights: Weights | None,
    heads: int,
    width: int,
    eps: float,
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The weights of each stream."""
    if not eps > 0:
        raise ValueError(f"eps: expected a positive number, got {eps}")
    for i, qkv in enumerate(qkvs):
        name, inner = f"qkvs[{i}]", heads * width
        check_shape(name, qkv, (qkvs[0].shape[0], None, None))
        if qkv.shape[2] not in (3 * inner, 2 * inner):
            raise ValueError(
                f"{name}: expected {3 * inner} channels (q, k, v) or {2 * inner} (k, v), "
                f"got {qkv.shape[2]}"
            )
        check_float(name, qkv)
        check_like(name, qkv, "qkvs[0]", qkvs[0])
    found: list[list[Tensor | None]] = []
    for name, weights in (("q_norm_weights", q_norm_weights), ("k_norm_weights", k_norm_weights)):
        some: list[Tensor | None] = [None] * len(qkvs) if weights is None else list(weights)
        if len(some) != len(qkvs):
            raise ValueError(f"{name}: expected {len(qkvs)} as qkvs, got {len(some)}")
        for i, weight in enumerate(some):
            if weight is not None:
                check_shape(f"{name}[{i}]", weight, (width,))
                check_float(f"{name}[{i}]", weight)
                check_device(f"{name}[{i}]", weight, "qkvs[0]", qkvs[0])
        found.append(some)
    return found[0], found[1]


def _check_places(
    qkvs: Sequence[Tensor],
    offsets: Sequence[int],
    q_tokens: int,
    tokens: int,
    pictures: int,
    with_queries: int,
) -> None:
    if len(offsets) != len(qkvs):
        raise ValueError(f"offsets: expected {len(qkvs)} as qkvs, got {len(offsets)}")
    end = 0
    for start, i in sorted(zip(offsets, range(len(qkvs)), strict=True)):
        check_shape(f"qkvs[{i}]", qkvs[i], (pictures, None, None))
        if start < end:
            raise ValueError(f"offsets[{i}]: expected {end} or more, got {start}")
        end = start + qkvs[i].shape[1]
        room = min(q_tokens, tokens) if qkvs[i].shape[2] == with_queries else tokens
        if end > room:
            raise ValueError(f"qkvs[{i}]: expected to end at row {room} or before, got {end}")


class _JointQKV(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, count: int, heads: int, width: int, eps: float, *flat: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(*flat)
        ctx.count, ctx.eps = count, eps
        streams = (flat[i * count : (i + 1) * count] for i in range(3))
        return _forward(*streams, heads, width, eps)

    @staticmethod
    @kernel_backward
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor
    ) -> tuple[Tensor | None, ...]:
        flat, n = ctx.saved_tensors, ctx.count
        streams = (flat[i * n : (i + 1) * n] for i in range(3))
        with_weights = any(ctx.needs_input_grad[4 + n :])
        dqkvs, sums = _backward(dq, dk, dv, *streams, ctx.eps, with_weights)
        dweights: list[Tensor | None] = [None] * (2 * n)
        if with_weights:
            # [N,2,d] → the streams' weights of q, then those of k.
            grads = sums.transpose(0, 1).flatten(0, 1).unbind(0)
            dweights = [
                g.to(w.dtype) if w is not None else None
                for g, w in zip(grads, flat[n:], strict=True)
            ]
        return None, None, None, None, *dqkvs, *dweights


def _launch_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from mimkernels.joint_qkv import kernel

    return kernel.forward(*arguments)


def _launch_backward(
    dq: Tensor, dk: Tensor, dv: Tensor, *arguments: Any
) -> tuple[list[Tensor], Tensor]:
    from mimkernels.joint_qkv import kernel

    # Expanded gradients (of a sum, say) have strides of zero.
    dq, dk, dv = (g if g.stride(-1) == 1 else g.contiguous() for g in (dq, dk, dv))
    return kernel.backward(dq, dk, dv, *arguments)


def _launch_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    qkvs: Sequence[Tensor],
    q_norm: Weights,
    k_norm: Weights,
    offsets: Sequence[int],
    eps: float,
) -> None:
    from mimkernels.joint_qkv import kernel

    kernel.write(q, k, v, qkvs, q_norm, k_norm, offsets, offsets, eps)


def _fake_forward(
    qkvs: Sequence[Tensor], q_norm: Weights, k_norm: Weights, heads: int, width: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    x, inner = qkvs[0], heads * width
    q_tokens = sum(qkv.shape[1] for qkv in qkvs if qkv.shape[2] == 3 * inner)
    tokens = sum(qkv.shape[1] for qkv in qkvs)
    q, k, v = (x.new_empty(x.shape[0], heads, n, width) for n in (q_tokens, tokens, tokens))
    return q, k, v


_WEIGHTS = "Tensor[] qkvs, Tensor?[] q_norm_weights, Tensor?[] k_norm_weights"
_forward = kernel_op(
    f"joint_qkv({_WEIGHTS}, SymInt heads, SymInt width, float eps) -> (Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_backward = kernel_op(
    f"joint_qkv_backward(Tensor dq, Tensor dk, Tensor dv, {_WEIGHTS}, float eps, "
    "bool with_weights) -> (Tensor[], Tensor)",
    _launch_backward,
    lambda dq, dk, dv, qkvs, q_norm, k_norm, eps, with_weights: (
        [qkv.new_empty(qkv.shape) for qkv in qkvs],
        dk.new_empty(
            len(qkvs) if with_weights else 0,
            2,
            dk.shape[3],
            dtype=torch.promote_types(dk.dtype, torch.float32),
        ),
    ),
)
_write = kernel_op(
    f"joint_qkv_(Tensor(a!) q, Tensor(b!) k, Tensor(c!) v, {_WEIGHTS}, SymInt[] offsets, "
    "float eps) -> ()",
    _launch_write,
    lambda *_: None,
)
