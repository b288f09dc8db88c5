"""Gradients of window attention: P is recomputed from the saved logsumexp.

With δ = rowsum(P⊙dP), dS = P⊙(dP − δ), dv = Pᵀ·do, dq = scale·dS·k, dk = scale·dSᵀ·q
(FlashAttention-2, arXiv 2307.08691, Alg. 2); the table's gradient sums dS over the pairs of each
offset. Sums over windows go through parts that are added in order: no atomics.
"""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false, reportGeneralTypeIssues=false

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from mimkernels.launch import accumulator, launch
from mimkernels.window_attention.blocks import (
    call_of,
    find_head,
    find_places,
    load_keys,
    load_rows,
    load_table,
    multiply_scores,
    scores,
    spread_table,
    store_padding,
    store_rows,
)
from mimkernels.window_attention.streaming import key_kernel, query_kernel


@triton.jit
def store_table(
    p_parts, b_ds, o_k, i_q, heads, offsets, WINDOW: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Sums of dS [keys, queries] over the pairs of each offset, a part of [.., (2M−1)², heads].

    At every offset a key has at most one query.
    """
    SPAN: tl.constexpr = 2 * WINDOW - 1
    for start in tl.range(0, offsets, 32, disable_licm=True):
        o_r = start + tl.arange(0, 32)
        y = (o_k // WINDOW - WINDOW + 1)[:, None] + (o_r // SPAN)[None, :]
        x = (o_k % WINDOW - WINDOW + 1)[:, None] + (o_r % SPAN)[None, :]
        o_q = y * WINDOW + x - i_q * COLUMNS
        mask = (y >= 0) & (y < WINDOW) & (x >= 0) & (x < WINDOW)
        mask = mask & (o_q >= 0) & (o_q < COLUMNS) & (o_k < WINDOW * WINDOW)[:, None]
        b_one = tl.gather(b_ds, tl.where(mask, o_q, 0), 1)  # [ROWS, offsets]
        b_sum = tl.sum(tl.where(mask, b_one, 0.0), axis=0)
        tl.store(p_parts + o_r * heads, b_sum, mask=o_r < offsets)


@triton.jit
def window_kernel(
    qkv, table, pad, index, slots, height, width, down, across, heads, steps, shift_h, shift_w,
    stride_xb, stride_xj, stride_xh, stride_xw, stride_te, stride_tr, stride_pe,
    grad, stride_gb, stride_gj, stride_gh, stride_gw, lse, delta, dqkv,
    table_parts, pad_parts, share, offsets,
    TABLE: tl.constexpr,
    HAS_INDEX: tl.constexpr, PAD: tl.constexpr, ROLL_FIRST: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, OFFSETS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """dS of one pair of tiles summed over `share` windows, for the table; where that pair is the
    whole window also dq, dk and dv.

    Grid (B·k × parts × key tiles × query tiles × heads), table_parts
    [B·k, parts · key tiles · query tiles, (2M−1)², heads], pad_parts [B·k, parts, 2, C].
    """
    AREA: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (AREA + ROWS - 1) // ROWS
    STEPS: tl.constexpr = (AREA + COLUMNS - 1) // COLUMNS
    windows = down * across
    parts = tl.cdiv(windows, share)
    i_h, i_p = tl.program_id(0) % heads, tl.program_id(0) // heads
    i_q, i_k = i_p % STEPS, i_p // STEPS % TILES
    i_c, i_s = i_p // (STEPS * TILES) % parts, (i_p // (STEPS * TILES) // parts).to(tl.int64)
    p_q, p_table, p_pad = find_head(
        qkv, table, pad, index, i_s, i_h, slots, stride_xb, stride_xj, stride_te, stride_pe,
        HAS_INDEX, HEAD,
    )  # fmt: skip
    channels = heads * HEAD
    b_table = load_table(p_table, stride_tr, WINDOW, OFFSETS)
    grad += (i_s // slots) * stride_gb + (i_s % slots) * stride_gj + i_h * HEAD
    dqkv += i_s * height * width * 3 * channels + i_h * HEAD
    o_q = i_q * COLUMNS + tl.arange(0, COLUMNS)
    o_k = i_k * ROWS + tl.arange(0, ROWS)
    acc = tl.zeros([ROWS, COLUMNS], dtype=ACCUMULATOR)
    b_zero = tl.zeros([ROWS, CHANNELS], dtype=ACCUMULATOR)
    b_pad_k = tl.zeros([CHANNELS], dtype=ACCUMULATOR)
    b_pad_v = tl.zeros([CHANNELS], dtype=ACCUMULATOR)
    # Hoisted out of the loop, the biases would take as many registers as the scores.
    for i_w in tl.range(i_c * share, tl.minimum(i_c * share + share, windows), disable_licm=True):
        b_bias = spread_table(b_table, o_k, o_q, True, WINDOW, ROWS, COLUMNS)
        y, x, real, region = find_places(
            o_q, i_w, height, width, down, across, shift_h, shift_w, False, PAD, ROLL_FIRST, WINDOW
        )
        b_q = load_rows(p_q, y, x, real, stride_xh, stride_xw, HEAD, CHANNELS)
        b_g = load_rows(grad, y, x, real, stride_gh, stride_gw, HEAD, CHANNELS)
        y_k, x_k, real_k, region_k, b_k, b_v = load_keys(
            p_q, p_pad, o_k, i_w, channels, height, width, down, across, shift_h, shift_w,
            stride_xh, stride_xw, PAD, ROLL_FIRST, WINDOW, HEAD, CHANNELS,
        )  # fmt: skip
        row = ((i_s * windows + i_w) * heads + i_h) * AREA + o_q
        b_lse = tl.load(lse + row, mask=real, other=0.0)
        # Transposed, [keys, queries]: P and dS then enter two of three products as they are.
        b_s = scores(b_k, b_q, b_bias, region_k, region, SCALE, PRECISION, ACCUMULATOR)
        b_p = tl.exp(b_s - b_lse[None, :])
        b_dp = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION, out_dtype=ACCUMULATOR)
        if STEPS == 1:
            b_delta = tl.sum(b_p * b_dp, axis=0)
        else:
            b_delta = tl.load(delta + row, mask=real, other=0.0)
        b_ds = b_p * (b_dp - b_delta[None, :])
        if TABLE:
            acc += b_ds
        if STEPS == 1:
            step_h, step_w = width * 3 * channels, 3 * channels
            b_dv = multiply_scores(b_p, b_g, b_zero, PRECISION, ACCUMULATOR)
            store_rows(dqkv + 2 * channels, b_dv, y_k, x_k, real_k, step_h, step_w, HEAD, CHANNELS)
            b_dk = multiply_scores(b_ds, b_q, b_zero, PRECISION, ACCUMULATOR) * SCALE
            store_rows(dqkv + channels, b_dk, y_k, x_k, real_k, step_h, step_w, HEAD, CHANNELS)
            b_dq = multiply_scores(tl.trans(b_ds), b_k, b_zero, PRECISION, ACCUMULATOR) * SCALE
            store_rows(dqkv, b_dq, y, x, real, step_h, step_w, HEAD, CHANNELS)
            if PAD:
                b_pad_k += tl.sum(tl.where(real_k[:, None], 0.0, b_dk), axis=0)
                b_pad_v += tl.sum(tl.where(real_k[:, None], 0.0, b_dv), axis=0)
    if TABLE:
        part = tl.program_id(0) // heads
        p_parts = table_parts + part.to(tl.int64) * (2 * WINDOW - 1) * (2 * WINDOW - 1) * heads
        store_table(p_parts + i_h, acc, o_k, i_q, heads, offsets, WINDOW, COLUMNS)
    if PAD and STEPS == 1:
        p_parts = pad_parts + (i_s * parts + i_c) * 2 * channels + i_h * HEAD
        store_padding(p_parts, b_pad_k, b_pad_v, channels, HEAD, CHANNELS)


@triton.jit
def reduce_kernel(
    parts,
    index,
    out,
    pairs,
    count,
    size,
    stride_oe,
    HAS_INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Σ of the parts of the slots that picked an expert, in order; parts [B·k, count, size].

    Grid (size tiles, E); without index all slots are of one expert.
    """
    i_e = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    o_r = tl.arange(0, ROWS).to(tl.int64)
    acc = tl.zeros([COLUMNS], dtype=ACCUMULATOR)
    for i_s in range(0, pairs):
        mine = tl.load(index + i_s) == i_e if HAS_INDEX else True
        if mine:
            for start in range(0, count, ROWS):
                row = start + o_r
                p_parts = parts + (i_s * count + row)[:, None] * size + o_n[None, :]
                mask = (row < count)[:, None] & (o_n < size)[None, :]
                acc += tl.sum(tl.load(p_parts, mask=mask, other=0.0), axis=0)
    tl.store(out + i_e * stride_oe + o_n, acc.to(out.dtype.element_ty), mask=o_n < size)


def _reduce(parts: Tensor, index: Tensor | None, out: Tensor) -> None:
    """parts [B·k, count, …] into out [E, …], by index [B·k], or all into out [1, …]."""
    size = parts[0, 0].numel()
    launch(
        reduce_kernel,
        (triton.cdiv(size, 64), out.shape[0]),
        parts,
        index.contiguous() if index is not None else parts,
        out,
        parts.shape[0],
        parts.shape[1],
        size,
        out.stride(0),
        HAS_INDEX=index is not None,
        ROWS=16,
        COLUMNS=64,
        ACCUMULATOR=accumulator(parts.dtype),
        num_warps=4,
        num_stages=2,
    )


def backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor,
    index: Tensor | None,
    pad_value: Tensor | None,
    out: Tensor,
    lse: Tensor,
    window: int,
    shift: Sequence[int],
    heads: int,
    scale: float,
    roll_first: bool,
    with_table: bool,
    with_pad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dqkv, dtable and dpad_value (empty where not wanted); arguments as `call_of`'s and out's."""
    call = call_of(qkv, table, index, pad_value, window, shift, heads, scale, roll_first)
    dqkv = qkv.new_empty(qkv.shape)
    dtable = qkv.new_empty(table.shape if with_table else 0)
    dpad = qkv.new_zeros(pad_value.shape if with_pad and pad_value is not None else 0)
    if qkv.numel() == 0:
        return dqkv, dtable.zero_(), dpad
    slots, channels = qkv.shape[0] * qkv.shape[1], out.shape[-1]
    whole = call.steps == 1
    # Pairs of tiles of all windows: few parts to add up, but enough programs to fill a GPU.
    pairs = call.tiles * call.steps
    share = max(1, min(16, call.windows, slots * call.windows * pairs * heads // 512))
    parts = triton.cdiv(call.windows, share)
    count = parts if whole else call.windows * call.tiles
    padded = call.options["PAD"]
    table_parts = lse.new_empty(slots, parts * pairs, *table.shape[1:]) if with_table else lse
    pad_parts = lse.new_empty(slots, count, 2, channels) if padded else lse
    arguments = (*call.arguments, grad, *grad.stride()[:4], lse)
    delta = lse
    if not whole:
        delta = lse.new_empty(lse.shape)
        grid = (slots * call.windows * call.tiles * heads,)
        launch(query_kernel, grid, *arguments, out, delta, dqkv, **call.options)
        launch(key_kernel, grid, *arguments, delta, dqkv, pad_parts, **call.options)
    if whole or with_table:
        grid = (slots * parts * pairs * heads,)
        some = (delta, dqkv, table_parts, pad_parts, share, table.shape[1])
        launch(window_kernel, grid, *arguments, *some, TABLE=with_table, **call.options)
    if with_table:
        _reduce(table_parts, index, dtable)
    if with_pad and padded:
        # Padded queries are cropped: their part of the gradient is zero.
        banked = dpad.ndim == 2
        _reduce(pad_parts, index if banked else None, dpad.view(-1, 3 * channels)[:, channels:])
    return dqkv, dtable, dpad
