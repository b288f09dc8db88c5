"""What forward and backward kernels share: places, loads, products, and their common arguments."""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from mimkernels.launch import accumulator, precision


@triton.jit
def find_program(heads, windows, TILES: tl.constexpr):
    """Head, tile, window and slot of a program of a grid (B·k × windows × tiles × heads), and the
    window's number among those of all slots.
    """
    i_h, i_p = tl.program_id(0) % heads, tl.program_id(0) // heads
    i_t, i_p = i_p % TILES, i_p // TILES
    return i_h, i_t, i_p % windows, (i_p // windows).to(tl.int64), i_p


@triton.jit
def find_head(
    qkv, table, pad, index, i_s, i_h, slots, stride_xb, stride_xj, stride_te, stride_pe,
    HAS_INDEX: tl.constexpr, HEAD: tl.constexpr,
):  # fmt: skip
    """Where a slot's head begins in qkv, in its expert's table and in its padding."""
    expert = tl.load(index + i_s).to(tl.int64) if HAS_INDEX else 0
    qkv += (i_s // slots) * stride_xb + (i_s % slots) * stride_xj + i_h * HEAD
    return qkv, table + expert * stride_te + i_h, pad + expert * stride_pe + i_h * HEAD


@triton.jit
def find_places(
    o_p, i_w, height, width, down, across, shift_h, shift_w,
    KEYS: tl.constexpr, PAD: tl.constexpr, ROLL_FIRST: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """Row, column, whether it is a token, and region, of the places o_p of window i_w.

    A query attends to the keys of its region; places that are none have regions of their own.
    """
    y = i_w // across * WINDOW + o_p // WINDOW
    x = i_w % across * WINDOW + o_p % WINDOW
    padded_h, padded_w = down * WINDOW, across * WINDOW
    # What the cyclic shift brought together from two edges stays apart.
    region = tl.where(y + shift_h >= padded_h, 2, 0) + tl.where(x + shift_w >= padded_w, 1, 0)
    inside = o_p < WINDOW * WINDOW
    if ROLL_FIRST:
        real = inside & (y < height) & (x < width)
        y, x = y + shift_h % height, x + shift_w % width
        y, x = tl.where(y < height, y, y - height), tl.where(x < width, x, x - width)
    else:
        y, x = y + shift_h, x + shift_w
        y = tl.where(y < padded_h, y, y - padded_h)
        x = tl.where(x < padded_w, x, x - padded_w)
        real = inside & (y < height) & (x < width)
    taken = inside if KEYS and PAD else real
    region = tl.where(taken, region, -1 if KEYS else -2)
    return y.to(tl.int64), x.to(tl.int64), real, region


@triton.jit
def load_rows(
    p_x, y, x, real, stride_h, stride_w, HEAD: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """A head's channels of tokens, [places, CHANNELS]; zeros where there is no token."""
    o_c = tl.arange(0, CHANNELS)
    p_x += (y * stride_h + x * stride_w)[:, None] + o_c[None, :]
    return tl.load(p_x, mask=real[:, None] & (o_c < HEAD)[None, :], other=0.0)


@triton.jit
def load_keys(
    p_q, p_pad, o_p, i_w, channels, height, width, down, across, shift_h, shift_w,
    stride_h, stride_w, PAD: tl.constexpr, ROLL_FIRST: tl.constexpr, WINDOW: tl.constexpr,
    HEAD: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """`find_places` of keys, then k and v, with the padding's values where there is no token."""
    y, x, real, region = find_places(
        o_p, i_w, height, width, down, across, shift_h, shift_w, True, PAD, ROLL_FIRST, WINDOW
    )
    b_k = load_rows(p_q + channels, y, x, real, stride_h, stride_w, HEAD, CHANNELS)
    b_v = load_rows(p_q + 2 * channels, y, x, real, stride_h, stride_w, HEAD, CHANNELS)
    if PAD:
        o_c = tl.arange(0, CHANNELS)
        p_pad += channels + o_c
        b_pad = tl.load(p_pad, mask=o_c < HEAD, other=0.0)  # [CHANNELS]
        b_k = tl.where(real[:, None], b_k, b_pad[None, :])
        b_pad = tl.load(p_pad + channels, mask=o_c < HEAD, other=0.0)
        b_v = tl.where(real[:, None], b_v, b_pad[None, :])
    return y, x, real, region, b_k, b_v


@triton.jit
def store_rows(
    p_x, b_x, y, x, real, stride_h, stride_w, HEAD: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """The counterpart of `load_rows`."""
    o_c = tl.arange(0, CHANNELS)
    p_x += (y * stride_h + x * stride_w)[:, None] + o_c[None, :]
    mask = real[:, None] & (o_c < HEAD)[None, :]
    tl.store(p_x, b_x.to(p_x.dtype.element_ty), mask=mask)


@triton.jit
def load_table(p_table, stride_tr, WINDOW: tl.constexpr, OFFSETS: tl.constexpr):
    """A head's biases, one for each offset, [OFFSETS]."""
    o_r = tl.arange(0, OFFSETS)
    mask = o_r < (2 * WINDOW - 1) * (2 * WINDOW - 1)
    return tl.load(p_table + o_r.to(tl.int64) * stride_tr, mask=mask, other=0.0)


@triton.jit
def spread_table(
    b_table, o_r, o_c, KEYS_FIRST: tl.constexpr, WINDOW: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The bias of each pair of places, [ROWS, COLUMNS]; rows are queries unless KEYS_FIRST."""
    SPAN: tl.constexpr = 2 * WINDOW - 1
    # Places beyond the window take the last one's: nobody uses them.
    o_r, o_c = tl.minimum(o_r, WINDOW * WINDOW - 1), tl.minimum(o_c, WINDOW * WINDOW - 1)
    row_r = o_r // WINDOW * SPAN + o_r % WINDOW
    row_c = o_c // WINDOW * SPAN + o_c % WINDOW
    if KEYS_FIRST:
        row = row_c[None, :] - row_r[:, None] + 2 * WINDOW * (WINDOW - 1)
    else:
        row = row_r[:, None] - row_c[None, :] + 2 * WINDOW * (WINDOW - 1)
    return tl.gather(b_table, row.reshape(ROWS * COLUMNS), 0).reshape(ROWS, COLUMNS)


@triton.jit
def scores(
    b_r, b_c, b_bias, region_r, region_c,
    SCALE: tl.constexpr, PRECISION: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """scale·q·kᵀ + B, or its transpose, [ROWS, COLUMNS]; −∞ between regions."""
    # The bias starts the product: added to it, it would make the compiler work in two layouts.
    b_s = b_bias.to(ACCUMULATOR) * (1 / SCALE)
    b_s = tl.dot(b_r, tl.trans(b_c), b_s, input_precision=PRECISION, out_dtype=ACCUMULATOR) * SCALE
    return tl.where(region_r[:, None] == region_c[None, :], b_s, float("-inf"))


@triton.jit
def multiply_scores(
    b_p, b_x, acc, PRECISION: tl.constexpr, ACCUMULATOR: tl.constexpr
):  # fmt: skip
    """acc + P·x for P or dS, [ROWS, CHANNELS]."""
    return tl.dot(b_p.to(b_x.dtype), b_x, acc, input_precision=PRECISION, out_dtype=ACCUMULATOR)


@triton.jit
def store_padding(
    p_parts, b_dk, b_dv, channels, HEAD: tl.constexpr, CHANNELS: tl.constexpr
):  # fmt: skip
    """Sums of dk and dv over padded places, a part of [.., 2, C]."""
    o_c = tl.arange(0, CHANNELS)
    tl.store(p_parts + o_c, b_dk, mask=o_c < HEAD)
    tl.store(p_parts + channels + o_c, b_dv, mask=o_c < HEAD)


@dataclass(frozen=True)
class Call:
    """What every launch of one call has in common: first arguments, constants and options."""

    arguments: tuple[Any, ...]
    options: dict[str, Any]
    windows: int
    # Tiles of ROWS places in a window, and of COLUMNS places.
    tiles: int
    steps: int


def call_of(
    qkv: Tensor,
    table: Tensor,
    index: Tensor | None,
    pad_value: Tensor | None,
    window: int,
    shift: Sequence[int],
    heads: int,
    scale: float,
    roll_first: bool,
) -> Call:
    """qkv [B,k,H,W,3C], table [E,(2M−1)²,heads], index [B,k] or [B], pad_value [3C] or [E,3C]."""
    _, slots, height, width, channels = qkv.shape
    down, across = triton.cdiv(height, window), triton.cdiv(width, window)
    head = channels // (3 * heads)
    lanes = max(16, triton.next_power_of_2(head))
    area = triton.next_power_of_2(window * window)
    wide = qkv.element_size() > 2
    rows = max(16, min(32 if wide else 64, area))
    # Square tiles of wide operands spill registers.
    columns = rows if lanes * qkv.element_size() <= 64 and area <= 64 else min(rows, 32)
    steps = triton.cdiv(window * window, columns)
    padded = (down * window, across * window) != (height, width)
    arguments = (
        qkv,
        table,
        pad_value if pad_value is not None else qkv,
        index.contiguous() if index is not None else qkv,
        slots,
        height,
        width,
        down,
        across,
        heads,
        steps,
        *shift,
        *qkv.stride()[:4],
        *table.stride()[:2],
        pad_value.stride(0) if pad_value is not None and pad_value.ndim == 2 else 0,
    )
    options = {
        "HAS_INDEX": index is not None,
        "PAD": padded and pad_value is not None,
        "ROLL_FIRST": roll_first,
        # A constant, as run-time numbers are float32.
        "SCALE": scale,
        "WINDOW": window,
        "HEAD": head,
        "OFFSETS": triton.next_power_of_2((2 * window - 1) ** 2),
        "ROWS": rows,
        "COLUMNS": columns,
        "CHANNELS": lanes,
        "PRECISION": precision(qkv.dtype),
        "ACCUMULATOR": accumulator(qkv.dtype),
        # Without tensor cores the operands sit in registers, too.
        "num_warps": rows // 16 * (2 if wide else 1),
        "num_stages": 1,
    }
    tiles = triton.cdiv(window * window, rows)
    return Call(arguments, options, down * across, tiles, steps)
