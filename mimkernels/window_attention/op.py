"""`window_attention`: attention inside (shifted) windows, with a relative position bias."""

import math
from typing import Any

import torch
from torch import Tensor

from mimkernels.autocast import autocast
from mimkernels.backend import runs_triton
from mimkernels.checks import check_device, check_float, check_index, check_like, check_shape
from mimkernels.gradients import kernel_backward
from mimkernels.registry import kernel_op
from mimkernels.window_attention.reference import window_attention_reference

# The widest head whose tiles fit into registers, and the widest window whose table does.
MAX_HEAD, MAX_WINDOW = 64, 32


def window_attention(
    qkv: Tensor,
    table: Tensor,
    *,
    window: int,
    heads: int,
    shift: int | tuple[int, int] = 0,
    scale: float | None = None,
    index: Tensor | None = None,
    pad_value: Tensor | None = None,
    roll_first: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Window attention of Swin (arXiv 2103.14030, Eq. 4), plain or shifted.

    A grid that the window does not divide is padded below and on the right.

    Args:
        qkv: [B,H,W,3C], or [B,k,H,W,3C] for k slots of every picture; channels in the order
            (q k v, heads, head width).
        table: [(2M−1)²,heads], the bias of each offset in Swin's order; or a bank
            [E,(2M−1)²,heads].
        window: M, its side, at most 32.
        heads: of at most 64 channels each.
        shift: 0 ≤ shift < M, of rows and columns or (rows, columns). Swin takes M//2 along axes
            that hold more than one window, and 0 along others: the caller decides.
        scale: of q·kᵀ, not 0, by default (head width)^−0.5.
        index: [B] or [B,k] int32 or int64: the table of the bank that each picture or slot takes.
        pad_value: [3C], or [E,3C] with a bank: the qkv of padded tokens, which then take part as
            keys. A model that pads before its qkv layer passes that layer's bias, or zeros if it
            has none. By default padded tokens are masked.
        roll_first: the shift wraps around at H×W and padding comes after, as in timm, not around
            at the padded size, as in Swin's own code and torchvision.
        backend: see `mimkernels.backend`.

    Returns:
        [B,H,W,C] or [B,k,H,W,C] in the type of qkv.

    Raises:
        ValueError: shapes, types, devices or strides that do not fit, a shift outside the window,
            a head or window that is too wide; on the CPU also an index that is no table's number.
    """
    qkv, table, pad_value = autocast(qkv, table, pad_value)
    both = (shift, shift) if isinstance(shift, int) else tuple(shift)
    _check(qkv, table, window, both, heads, scale, index, pad_value)
    scale = 1 / math.sqrt(qkv.shape[-1] // (3 * heads)) if scale is None else float(scale)
    if not runs_triton(backend, qkv):
        return window_attention_reference(
            qkv, table, index, pad_value,
            window=window, heads=heads, shift=both, scale=scale, roll_first=roll_first,
        )  # fmt: skip
    slotted = qkv.ndim == 5
    # The logsumexp is for the backward pass alone.
    inputs = (qkv, table) if pad_value is None else (qkv, table, pad_value)
    with_lse = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    out = _WindowAttention.apply(
        qkv if slotted else qkv.unsqueeze(1),
        table if table.ndim == 3 else table.unsqueeze(0),
        index,
        pad_value,
        (window, both, heads, scale, roll_first),
        with_lse,
    )
    return out if slotted else out.squeeze(1)


def _check(
    qkv: Tensor,
    table: Tensor,
    window: int,
    shift: tuple[int, ...],
    heads: int,
    scale: float | None,
    index: Tensor | None,
    pad_value: Tensor | None,
) -> None:
    if qkv.ndim not in (4, 5):
        raise ValueError(f"qkv: expected [B,H,W,3C] or [B,k,H,W,3C], got {list(qkv.shape)}")
    check_float("qkv", qkv)
    if not 1 <= window <= MAX_WINDOW:
        raise ValueError(f"window: expected 1 to {MAX_WINDOW}, got {window}")
    if len(shift) != 2 or not all(0 <= s < window for s in shift):
        raise ValueError(f"shift: expected 0 to {window - 1} of rows and columns, got {shift}")
    width = qkv.shape[-1]
    if scale == 0:
        raise ValueError("scale: expected a number other than 0, got 0")
    if heads < 1 or width == 0 or width % (3 * heads):
        raise ValueError(f"heads: expected a divisor of {width} / 3 (qkv's last axis), got {heads}")
    if width > 3 * heads * MAX_HEAD:
        raise ValueError(f"heads: expected heads of at most {MAX_HEAD}, got {width // 3 // heads}")
    bank = () if index is None else (None,)
    check_shape("table", table, (*bank, (2 * window - 1) ** 2, heads))
    check_like("table", table, "qkv", qkv)
    check_float("table", table)
    if index is not None:
        check_shape("index", index, qkv.shape[:-3])
        check_device("index", index, "qkv", qkv)
        check_index("index", index, table.shape[0])
    if pad_value is not None:
        banked = index is not None and pad_value.ndim == 2
        check_shape("pad_value", pad_value, (table.shape[0], width) if banked else (width,))
        check_like("pad_value", pad_value, "qkv", qkv)
        check_float("pad_value", pad_value)


class _WindowAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,
        table: Tensor,
        index: Tensor | None,
        pad_value: Tensor | None,
        options: tuple[int, tuple[int, int], int, float, bool],
        with_lse: bool,
    ) -> Tensor:
        out, lse = _forward(qkv, table, index, pad_value, *options, with_lse)
        ctx.save_for_backward(qkv, table, index, pad_value, out, lse)
        ctx.options = options
        return out

    @staticmethod
    @kernel_backward
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        dqkv, dtable, dpad = _backward(grad, *ctx.saved_tensors, *ctx.options, needed[1], needed[3])
        return (
            dqkv if needed[0] else None,
            dtable if needed[1] else None,
            None,
            dpad if needed[3] else None,
            None,
            None,
        )


def _launch_forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    from mimkernels.window_attention import kernel

    return kernel.forward(*arguments)


def _launch_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from mimkernels.window_attention import kernel

    # Expanded gradients (of a sum, say) have strides of zero.
    return kernel.backward(grad if grad.stride(-1) == 1 else grad.contiguous(), *arguments)


def _fake_forward(
    qkv: Tensor, table: Tensor, index: Any, pad_value: Any, window: int, shift: Any, heads: int,
    scale: float, roll_first: bool, with_lse: bool = True,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    height, width, channels = qkv.shape[2:]
    windows = -(-height // window) * -(-width // window)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    shape = (*qkv.shape[:2], windows, heads, window * window) if with_lse else (0,)
    return (
        qkv.new_empty(*qkv.shape[:4], channels // 3),
        qkv.new_empty(shape, dtype=wide),
    )


def _fake_backward(
    grad: Tensor, qkv: Tensor, table: Tensor, index: Any, pad_value: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    with_table, with_pad = rest[-2:]
    return (
        qkv.new_empty(qkv.shape),
        qkv.new_empty(table.shape if with_table else 0),
        qkv.new_empty(pad_value.shape if with_pad and pad_value is not None else 0),
    )


_OPTIONS = "int window, int[] shift, int heads, float scale, bool roll_first"
_forward = kernel_op(
    f"window_attention(Tensor qkv, Tensor table, Tensor? index, Tensor? pad_value, {_OPTIONS}, "
    "bool with_lse=True) -> (Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_backward = kernel_op(
    "window_attention_backward(Tensor grad, Tensor qkv, Tensor table, Tensor? index, "
    f"Tensor? pad_value, Tensor out, Tensor lse, {_OPTIONS}, bool with_table, bool with_pad) "
    "-> (Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
