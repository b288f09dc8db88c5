"""The two passes over tokens: xᵀ·y of every head in parts, and tokens times a small matrix."""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.jit import multiply
from mimkernels.launch import launch, matrix_options
from mimkernels.tiles import Tile, architecture, matrix_tile

# Enough programs to fill a GPU, and few enough parts to add up.
PROGRAMS = 256


@triton.jit
def gram_kernel(
    x, y, parts, squares, slots, tokens, heads, share,
    stride_xb, stride_xs, stride_xt, stride_yb, stride_ys, stride_yt,
    SQUARES: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """xᵀ·y of a head over `share` tokens, a multiple of INNER; SQUARES: and Σx², Σy².

    Grid (parts × heads, B·S), heads together: they share cache lines. parts [B·S,heads,parts,c,c],
    squares [B·S,heads,parts,2,c].
    """
    i_n = tl.program_id(1).to(tl.int64)
    i_h, i_p = tl.program_id(0) % heads, tl.program_id(0) // heads
    o_r, o_c, o_t = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, INNER)
    m_r, m_c = o_r < HEAD, o_c < HEAD
    x += (i_n // slots) * stride_xb + (i_n % slots) * stride_xs + i_h * HEAD
    y += (i_n // slots) * stride_yb + (i_n % slots) * stride_ys + i_h * HEAD
    acc = tl.zeros([ROWS, COLUMNS], dtype=ACCUMULATOR)
    x_squares = tl.zeros([ROWS], dtype=ACCUMULATOR)
    y_squares = tl.zeros([COLUMNS], dtype=ACCUMULATOR)
    for start in range(0, share, INNER):
        i_t = (i_p * share + start + o_t).to(tl.int64)
        m_t = i_t < tokens
        p_x = x + i_t[None, :] * stride_xt + o_r[:, None]
        p_y = y + i_t[:, None] * stride_yt + o_c[None, :]
        b_x = tl.load(p_x, mask=m_r[:, None] & m_t[None, :], other=0.0)  # [ROWS, INNER]
        b_y = tl.load(p_y, mask=m_t[:, None] & m_c[None, :], other=0.0)  # [INNER, COLUMNS]
        acc = tl.dot(b_x, b_y, acc, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        if SQUARES:
            x_squares += tl.sum(b_x.to(ACCUMULATOR) * b_x.to(ACCUMULATOR), axis=1)
            y_squares += tl.sum(b_y.to(ACCUMULATOR) * b_y.to(ACCUMULATOR), axis=0)
    part = (i_n * heads + i_h) * (tl.num_programs(0) // heads) + i_p
    p_out = parts + part * HEAD * HEAD + o_r[:, None] * HEAD + o_c[None, :]
    tl.store(p_out, acc, mask=m_r[:, None] & m_c[None, :])
    if SQUARES:
        tl.store(squares + part * 2 * HEAD + o_r, x_squares, mask=m_r)
        tl.store(squares + part * 2 * HEAD + HEAD + o_c, y_squares, mask=m_c)


@triton.jit
def apply_kernel(
    x, matrix, index, out, slots, tokens, groups, columns, inner,
    stride_xb, stride_xs, stride_xt, stride_mn, stride_mg, stride_mo, stride_mi,
    HAS_INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """out[n,t,g·columns + o] = Σ_i x[n,t,g·inner + i]·M[n,g,o,i].

    Grid (token tiles × column tiles × groups, B·S); out dense. HAS_INDEX: x is a bank.
    """
    i_n = tl.program_id(1).to(tl.int64)
    i_g, i_p = tl.program_id(0) % groups, tl.program_id(0) // groups
    tiles = tl.cdiv(columns, COLUMNS)
    o_t = i_p // tiles * ROWS + tl.arange(0, ROWS)
    o_o = i_p % tiles * COLUMNS + tl.arange(0, COLUMNS)
    o_i = tl.arange(0, INNER)
    m_t, m_o = o_t < tokens, o_o < columns
    if HAS_INDEX:
        x += tl.load(index + i_n).to(tl.int64) * stride_xb
    else:
        x += (i_n // slots) * stride_xb + (i_n % slots) * stride_xs
    matrix += i_n * stride_mn + i_g.to(tl.int64) * stride_mg
    acc = multiply(
        x + i_g * inner + o_t.to(tl.int64)[:, None] * stride_xt + o_i[None, :],
        matrix + o_o[None, :] * stride_mo + o_i[:, None] * stride_mi,
        m_t,
        m_o,
        inner,
        1,
        stride_mi,
        ROWS,
        COLUMNS,
        INNER,
        PRECISION,
        ACCUMULATOR,
    )
    p_out = out + (i_n * tokens + o_t)[:, None] * (groups * columns) + i_g * columns + o_o[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=m_t[:, None] & m_o[None, :])


def gram(x: Tensor, y: Tensor, heads: int, squares: bool) -> tuple[Tensor, Tensor]:
    """x, y [B,S,T,C] → parts [B,S,heads,parts,c,c] of xᵀ·y, and [B,S,heads,parts,2,c] of Σx², Σy².

    The second is empty unless `squares`.
    """
    pictures, slots, tokens, channels = x.shape
    head = channels // heads
    side = max(16, triton.next_power_of_2(head))
    if x.element_size() == 2:
        # Tiles of a head are small: deep steps keep more loads under way.
        tile = Tile(side, side, inner=64, warps=4, stages=3)
    else:
        # Without tensor cores the operands sit in registers, too.
        tile = Tile(side, side, inner=16, warps=8 if side == 64 else 4, stages=2)
    steps = triton.cdiv(tokens, tile.inner)
    count = min(steps, triton.cdiv(PROGRAMS, pictures * slots * heads))
    share = triton.cdiv(steps, count) * tile.inner
    count = triton.cdiv(tokens, share)
    wide = torch.promote_types(x.dtype, torch.float32)
    front = (pictures, slots, heads, count)
    parts = x.new_empty(*front, head, head, dtype=wide)
    sums = x.new_empty(*front, 2, head, dtype=wide) if squares else x.new_empty(0, dtype=wide)
    launch(
        gram_kernel,
        (count * heads, pictures * slots),
        x,
        y,
        parts,
        sums,
        slots,
        tokens,
        heads,
        share,
        *x.stride()[:3],
        *y.stride()[:3],
        SQUARES=squares,
        HEAD=head,
        **matrix_options(tile, x.dtype),
    )
    return parts, sums


def apply(x: Tensor, matrix: Tensor, index: Tensor | None = None) -> Tensor:
    """x [B,S,T,g·i], matrix [B,S,g,o,i] → [B,S,T,g·o]; the matrix dense in either order of o and i.

    An x of three axes is a bank [E,T,g·i], of which index [B,S] picks; without index all take its
    first.
    """
    pictures, slots, groups, columns, inner = matrix.shape
    tokens = x.shape[-2]
    out = x.new_empty(pictures, slots, tokens, groups * columns)
    tile = matrix_tile(architecture(x.device), x.element_size(), tokens, columns)
    tiles = triton.cdiv(tokens, tile.rows) * triton.cdiv(columns, tile.columns)
    if x.ndim == 4:
        strides = x.stride()[:3]
    else:
        strides = (x.stride(0) if index is not None else 0, 0, x.stride(1))
    launch(
        apply_kernel,
        (tiles * groups, pictures * slots),
        x,
        matrix,
        index.contiguous() if index is not None else x,
        out,
        slots,
        tokens,
        groups,
        columns,
        inner,
        *strides,
        groups * columns * inner,
        columns * inner,
        *matrix.stride()[3:],
        HAS_INDEX=index is not None,
        **matrix_options(tile, x.dtype),
    )
    return out
