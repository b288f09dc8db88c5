"""One program for each window, head and tile of queries; shift, partition, padding, mask and bias
are index arithmetic.

Key tiles are streamed with the online softmax of FlashAttention (arXiv 2205.14135, Alg. 1).
"""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.launch import launch
from mimkernels.window_attention.backward import backward
from mimkernels.window_attention.blocks import (
    call_of,
    find_head,
    find_places,
    find_program,
    load_keys,
    load_rows,
    load_table,
    scores,
    spread_table,
    store_rows,
)


@triton.jit
def forward_kernel(
    qkv, table, pad, index, slots, height, width, down, across, heads, steps, shift_h, shift_w,
    stride_xb, stride_xj, stride_xh, stride_xw, stride_te, stride_tr, stride_pe,
    out, lse,
    LSE: tl.constexpr,
    HAS_INDEX: tl.constexpr, PAD: tl.constexpr, ROLL_FIRST: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, OFFSETS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Grid (B·k × windows × query tiles × heads), heads together: they share cache lines.

    out [B,k,H,W,C] dense; LSE: lse [B,k,windows,heads,M²], 0 at places that are no token.
    """
    AREA: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (AREA + ROWS - 1) // ROWS
    i_h, i_q, i_w, i_s, i_p = find_program(heads, down * across, TILES)
    p_q, p_table, p_pad = find_head(
        qkv, table, pad, index, i_s, i_h, slots, stride_xb, stride_xj, stride_te, stride_pe,
        HAS_INDEX, HEAD,
    )  # fmt: skip
    channels = heads * HEAD
    b_table = load_table(p_table, stride_tr, WINDOW, OFFSETS)
    o_q = i_q * ROWS + tl.arange(0, ROWS)
    y, x, real, region = find_places(
        o_q, i_w, height, width, down, across, shift_h, shift_w, False, PAD, ROLL_FIRST, WINDOW
    )
    b_q = load_rows(p_q, y, x, real, stride_xh, stride_xw, HEAD, CHANNELS)
    b_max = tl.full([ROWS], float("-inf"), dtype=ACCUMULATOR)
    b_sum = tl.zeros([ROWS], dtype=ACCUMULATOR)
    acc = tl.zeros([ROWS, CHANNELS], dtype=ACCUMULATOR)
    for i_k in range(0, steps):
        o_k = i_k * COLUMNS + tl.arange(0, COLUMNS)
        _, _, _, region_k, b_k, b_v = load_keys(
            p_q, p_pad, o_k, i_w, channels, height, width, down, across, shift_h, shift_w,
            stride_xh, stride_xw, PAD, ROLL_FIRST, WINDOW, HEAD, CHANNELS,
        )  # fmt: skip
        b_bias = spread_table(b_table, o_q, o_k, False, WINDOW, ROWS, COLUMNS)
        b_s = scores(b_q, b_k, b_bias, region, region_k, SCALE, PRECISION, ACCUMULATOR)
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        # A tile may hold no key of a query's region.
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p = tl.exp(b_s - b_base[:, None])
        b_old = tl.exp(b_max - b_base)
        b_sum = b_sum * b_old + tl.sum(b_p, axis=1)
        acc = tl.dot(
            b_p.to(b_v.dtype), b_v, acc * b_old[:, None],
            input_precision=PRECISION, out_dtype=ACCUMULATOR,
        )  # fmt: skip
        b_max = b_new
    b_sum = tl.where(real, b_sum, 1.0)
    p_out = out + i_s * height * width * channels + i_h * HEAD
    store_rows(p_out, acc / b_sum[:, None], y, x, real, width * channels, channels, HEAD, CHANNELS)
    if LSE:
        p_lse = lse + (i_p.to(tl.int64) * heads + i_h) * AREA + o_q
        tl.store(p_lse, tl.where(real, b_max + tl.log(b_sum), 0.0), mask=o_q < AREA)


def forward(
    qkv: Tensor,
    table: Tensor,
    index: Tensor | None,
    pad_value: Tensor | None,
    window: int,
    shift: Sequence[int],
    heads: int,
    scale: float,
    roll_first: bool,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor]:
    """out [B,k,H,W,C] and logsumexp [B,k,windows,heads,M²] (else empty); others as `call_of`'s."""
    call = call_of(qkv, table, index, pad_value, window, shift, heads, scale, roll_first)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    out = qkv.new_empty(*qkv.shape[:4], qkv.shape[4] // 3)
    shape = (*qkv.shape[:2], call.windows, heads, window * window) if with_lse else (0,)
    lse = qkv.new_empty(shape, dtype=wide)
    if out.numel():
        grid = (qkv.shape[0] * qkv.shape[1] * call.windows * call.tiles * heads,)
        launch(forward_kernel, grid, *call.arguments, out, lse, LSE=with_lse, **call.options)
    return out, lse


def typical_launches(dtype: torch.dtype) -> None:
    """Every kernel once, on tensors without data: a window of one tile, and one of several."""
    qkv = torch.empty(1, 2, 64, 64, 1152, dtype=dtype, device="meta")
    index = torch.empty(1, 2).int()
    for window in (8, 16):
        table = qkv.new_empty(4, (2 * window - 1) ** 2, 12)
        options = (window, (window // 2, window // 2), 12, 32**-0.5, False)
        out, lse = forward(qkv, table, index, None, *options)
        backward(out, qkv, table, index, None, out, lse, *options, True, False)
