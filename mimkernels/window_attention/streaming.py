"""dq, and dk with dv, of windows of several tiles: one kernel streams keys, one queries.

FlashAttention-2 (arXiv 2307.08691, Alg. 2) with δ = rowsum(do⊙o), which equals rowsum(P⊙dP).
"""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false

import triton
import triton.language as tl

from mimkernels.window_attention.blocks import (
    find_head,
    find_places,
    find_program,
    load_keys,
    load_rows,
    load_table,
    multiply_scores,
    scores,
    spread_table,
    store_padding,
    store_rows,
)


@triton.jit
def query_kernel(
    qkv, table, pad, index, slots, height, width, down, across, heads, steps, shift_h, shift_w,
    stride_xb, stride_xj, stride_xh, stride_xw, stride_te, stride_tr, stride_pe,
    grad, stride_gb, stride_gj, stride_gh, stride_gw, lse, out, delta, dqkv,
    HAS_INDEX: tl.constexpr, PAD: tl.constexpr, ROLL_FIRST: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, OFFSETS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """δ = rowsum(do⊙o), and dq of a tile of queries. Grid (B·k × windows × tiles × heads)."""
    AREA: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (AREA + ROWS - 1) // ROWS
    i_h, i_q, i_w, i_s, i_p = find_program(heads, down * across, TILES)
    p_q, p_table, p_pad = find_head(
        qkv, table, pad, index, i_s, i_h, slots, stride_xb, stride_xj, stride_te, stride_pe,
        HAS_INDEX, HEAD,
    )  # fmt: skip
    channels = heads * HEAD
    b_table = load_table(p_table, stride_tr, WINDOW, OFFSETS)
    grad += (i_s // slots) * stride_gb + (i_s % slots) * stride_gj + i_h * HEAD
    out += i_s * height * width * channels + i_h * HEAD
    o_q = i_q * ROWS + tl.arange(0, ROWS)
    y, x, real, region = find_places(
        o_q, i_w, height, width, down, across, shift_h, shift_w, False, PAD, ROLL_FIRST, WINDOW
    )
    b_q = load_rows(p_q, y, x, real, stride_xh, stride_xw, HEAD, CHANNELS)
    b_g = load_rows(grad, y, x, real, stride_gh, stride_gw, HEAD, CHANNELS)
    b_o = load_rows(out, y, x, real, width * channels, channels, HEAD, CHANNELS)
    b_delta = tl.sum(b_g.to(ACCUMULATOR) * b_o.to(ACCUMULATOR), axis=1)
    row = (i_p.to(tl.int64) * heads + i_h) * AREA + o_q
    tl.store(delta + row, b_delta, mask=real)
    b_lse = tl.load(lse + row, mask=real, other=0.0)
    acc = tl.zeros([ROWS, CHANNELS], dtype=ACCUMULATOR)
    for i_k in range(0, steps):
        o_k = i_k * COLUMNS + tl.arange(0, COLUMNS)
        _, _, _, region_k, b_k, b_v = load_keys(
            p_q, p_pad, o_k, i_w, channels, height, width, down, across, shift_h, shift_w,
            stride_xh, stride_xw, PAD, ROLL_FIRST, WINDOW, HEAD, CHANNELS,
        )  # fmt: skip
        b_bias = spread_table(b_table, o_q, o_k, False, WINDOW, ROWS, COLUMNS)
        b_s = scores(b_q, b_k, b_bias, region, region_k, SCALE, PRECISION, ACCUMULATOR)
        b_p = tl.exp(b_s - b_lse[:, None])
        b_dp = tl.dot(b_g, tl.trans(b_v), input_precision=PRECISION, out_dtype=ACCUMULATOR)
        b_ds = b_p * (b_dp - b_delta[:, None])
        acc = multiply_scores(b_ds, b_k, acc, PRECISION, ACCUMULATOR)
    dqkv += i_s * height * width * 3 * channels + i_h * HEAD
    step_h, step_w = width * 3 * channels, 3 * channels
    store_rows(dqkv, acc * SCALE, y, x, real, step_h, step_w, HEAD, CHANNELS)


@triton.jit
def key_kernel(
    qkv, table, pad, index, slots, height, width, down, across, heads, steps, shift_h, shift_w,
    stride_xb, stride_xj, stride_xh, stride_xw, stride_te, stride_tr, stride_pe,
    grad, stride_gb, stride_gj, stride_gh, stride_gw, lse, delta, dqkv, pad_parts,
    HAS_INDEX: tl.constexpr, PAD: tl.constexpr, ROLL_FIRST: tl.constexpr, SCALE: tl.constexpr,
    WINDOW: tl.constexpr, OFFSETS: tl.constexpr, HEAD: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys. Grid (B·k × windows × tiles × heads).

    pad_parts [B·k, windows · tiles, 2, C].
    """
    AREA: tl.constexpr = WINDOW * WINDOW
    TILES: tl.constexpr = (AREA + ROWS - 1) // ROWS
    i_h, i_k, i_w, i_s, i_p = find_program(heads, down * across, TILES)
    p_q, p_table, p_pad = find_head(
        qkv, table, pad, index, i_s, i_h, slots, stride_xb, stride_xj, stride_te, stride_pe,
        HAS_INDEX, HEAD,
    )  # fmt: skip
    channels = heads * HEAD
    b_table = load_table(p_table, stride_tr, WINDOW, OFFSETS)
    grad += (i_s // slots) * stride_gb + (i_s % slots) * stride_gj + i_h * HEAD
    o_k = i_k * ROWS + tl.arange(0, ROWS)
    y_k, x_k, real_k, region_k, b_k, b_v = load_keys(
        p_q, p_pad, o_k, i_w, channels, height, width, down, across, shift_h, shift_w,
        stride_xh, stride_xw, PAD, ROLL_FIRST, WINDOW, HEAD, CHANNELS,
    )  # fmt: skip
    b_dk = tl.zeros([ROWS, CHANNELS], dtype=ACCUMULATOR)
    b_dv = tl.zeros([ROWS, CHANNELS], dtype=ACCUMULATOR)
    for i_q in range(0, steps):
        o_q = i_q * COLUMNS + tl.arange(0, COLUMNS)
        y, x, real, region = find_places(
            o_q, i_w, height, width, down, across, shift_h, shift_w, False, PAD, ROLL_FIRST, WINDOW
        )
        b_q = load_rows(p_q, y, x, real, stride_xh, stride_xw, HEAD, CHANNELS)
        b_g = load_rows(grad, y, x, real, stride_gh, stride_gw, HEAD, CHANNELS)
        row = (i_p.to(tl.int64) * heads + i_h) * AREA + o_q
        b_lse = tl.load(lse + row, mask=real, other=0.0)
        b_delta = tl.load(delta + row, mask=real, other=0.0)
        b_bias = spread_table(b_table, o_k, o_q, True, WINDOW, ROWS, COLUMNS)
        # Transposed, [keys, queries]: P and dS then enter products as they are.
        b_s = scores(b_k, b_q, b_bias, region_k, region, SCALE, PRECISION, ACCUMULATOR)
        b_p = tl.exp(b_s - b_lse[None, :])
        b_dp = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION, out_dtype=ACCUMULATOR)
        b_dv = multiply_scores(b_p, b_g, b_dv, PRECISION, ACCUMULATOR)
        b_ds = b_p * (b_dp - b_delta[None, :])
        b_dk = multiply_scores(b_ds, b_q, b_dk, PRECISION, ACCUMULATOR)
    b_dk *= SCALE
    dqkv += i_s * height * width * 3 * channels + i_h * HEAD
    step_h, step_w = width * 3 * channels, 3 * channels
    store_rows(dqkv + channels, b_dk, y_k, x_k, real_k, step_h, step_w, HEAD, CHANNELS)
    store_rows(dqkv + 2 * channels, b_dv, y_k, x_k, real_k, step_h, step_w, HEAD, CHANNELS)
    if PAD:
        p_parts = pad_parts + (i_p.to(tl.int64) * TILES + i_k) * 2 * channels + i_h * HEAD
        b_dk = tl.sum(tl.where(real_k[:, None], 0.0, b_dk), axis=0)
        b_dv = tl.sum(tl.where(real_k[:, None], 0.0, b_dv), axis=0)
        store_padding(p_parts, b_dk, b_dv, channels, HEAD, CHANNELS)
