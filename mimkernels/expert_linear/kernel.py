"""One launch for all slots: a tile reads its expert's number on the device, nothing is gathered."""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.jit import multiply
from mimkernels.launch import launch, matrix_options
from mimkernels.tiles import Tile, architecture, matrix_tile


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    index,
    out,
    slots,
    tokens,
    columns,
    inner,
    stride_xb,
    stride_xj,
    stride_xt,
    stride_xk,
    stride_we,
    stride_wn,
    stride_wk,
    stride_be,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Grid (column tiles × token tiles, B·k); out [B,k,T,N] dense."""
    i_s = tl.program_id(1).to(tl.int64)
    tiles_n = tl.cdiv(columns, COLUMNS)
    i_t, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    expert = tl.load(index + i_s).to(tl.int64)
    o_t = i_t * ROWS + tl.arange(0, ROWS)
    o_n = i_n * COLUMNS + tl.arange(0, COLUMNS)
    o_k = tl.arange(0, INNER)
    m_t, m_n = o_t < tokens, o_n < columns
    x += (i_s // slots) * stride_xb + (i_s % slots) * stride_xj
    weight += expert * stride_we
    p_x = x + o_t.to(tl.int64)[:, None] * stride_xt + o_k[None, :] * stride_xk
    p_w = weight + o_n.to(tl.int64)[None, :] * stride_wn + o_k.to(tl.int64)[:, None] * stride_wk
    acc = multiply(
        p_x,
        p_w,
        m_t,
        m_n,
        inner,
        stride_xk,
        stride_wk,
        ROWS,
        COLUMNS,
        INNER,
        PRECISION,
        ACCUMULATOR,
    )
    if HAS_BIAS:
        b_bias = tl.load(bias + expert * stride_be + o_n, mask=m_n, other=0.0)  # [COLUMNS]
        acc += b_bias.to(ACCUMULATOR)[None, :]
    p_out = out + (i_s * tokens + o_t)[:, None] * columns + o_n[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=m_t[:, None] & m_n[None, :])


@triton.jit
def weight_kernel(
    x,
    grad,
    index,
    gate,
    dweight,
    dbias,
    pairs,
    slots,
    tokens,
    columns,
    inner,
    stride_xb,
    stride_xj,
    stride_xt,
    stride_gb,
    stride_gj,
    stride_gt,
    HAS_GATE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """dW[e] = Σ over the slots that picked e of gate·gradᵀ·x, and so of grad for the bias.

    Grid (K tiles, N tiles, E). Every program goes through all B·k slots in order: no atomics, so
    the same bits every time. ROWS of N, COLUMNS of K, INNER tokens at a time.
    """
    i_k, i_n = tl.program_id(0), tl.program_id(1)
    i_e = tl.program_id(2).to(tl.int64)
    o_n = i_n * ROWS + tl.arange(0, ROWS)
    o_k = i_k * COLUMNS + tl.arange(0, COLUMNS)
    o_t = tl.arange(0, INNER)
    m_n, m_k = o_n < columns, o_k < inner
    acc = tl.zeros([ROWS, COLUMNS], dtype=ACCUMULATOR)
    acc_bias = tl.zeros([ROWS], dtype=ACCUMULATOR)
    for i_s in range(0, pairs):
        if tl.load(index + i_s) == i_e:
            i_b = (i_s // slots).to(tl.int64)
            i_j = (i_s % slots).to(tl.int64)
            scale = tl.load(gate + i_s).to(ACCUMULATOR) if HAS_GATE else 1.0
            part = tl.zeros([ROWS, COLUMNS], dtype=ACCUMULATOR)
            for start in range(0, tokens, INNER):
                i_t = (start + o_t).to(tl.int64)
                m_t = i_t < tokens
                p_g = grad + i_b * stride_gb + i_j * stride_gj + i_t[None, :] * stride_gt
                p_x = x + i_b * stride_xb + i_j * stride_xj + i_t[:, None] * stride_xt
                b_g = tl.load(
                    p_g + o_n[:, None], mask=m_n[:, None] & m_t[None, :], other=0.0
                )  # [ROWS, INNER]
                b_x = tl.load(
                    p_x + o_k[None, :], mask=m_t[:, None] & m_k[None, :], other=0.0
                )  # [INNER, COLUMNS]
                if HAS_GATE:
                    part = tl.dot(b_g, b_x, part, input_precision=PRECISION, out_dtype=ACCUMULATOR)
                else:
                    acc = tl.dot(b_g, b_x, acc, input_precision=PRECISION, out_dtype=ACCUMULATOR)
                if HAS_BIAS:
                    acc_bias += scale * tl.sum(b_g.to(ACCUMULATOR), axis=1)
            if HAS_GATE:
                acc += scale * part
    p_w = dweight + (i_e * columns + o_n)[:, None] * inner + o_k[None, :]
    tl.store(p_w, acc.to(dweight.dtype.element_ty), mask=m_n[:, None] & m_k[None, :])
    # Two conditions: the compiler drops the first, the second is the program's own.
    if HAS_BIAS:  # noqa: SIM102
        if i_k == 0:
            tl.store(dbias + i_e * columns + o_n, acc_bias.to(dbias.dtype.element_ty), mask=m_n)


def tile_of(x: Tensor, rows: int, columns: int) -> Tile:
    return matrix_tile(architecture(x.device), x.element_size(), rows, columns)


def forward(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None) -> Tensor:
    """x [B,1,T,K] or [B,k,T,K], weight [E,N,K] of any strides, index [B,k] → [B,k,T,N]."""
    (pictures, _, tokens, inner), (_, columns, _) = x.shape, weight.shape
    slots = index.shape[1]
    out = x.new_empty(pictures, slots, tokens, columns)
    if out.numel() == 0:
        return out
    tile = tile_of(x, tokens, columns)
    grid = (triton.cdiv(tokens, tile.rows) * triton.cdiv(columns, tile.columns), pictures * slots)
    launch(
        forward_kernel,
        grid,
        x,
        weight,
        bias if bias is not None else x,
        index.contiguous(),
        out,
        slots,
        tokens,
        columns,
        inner,
        x.stride(0),
        x.stride(1) if x.shape[1] > 1 else 0,
        x.stride(2),
        x.stride(3),
        *weight.stride(),
        bias.stride(0) if bias is not None else 0,
        HAS_BIAS=bias is not None,
        **matrix_options(tile, x.dtype),
    )
    return out


def backward_weight(
    x: Tensor,
    grad: Tensor,
    index: Tensor,
    experts: int,
    with_bias: bool,
    gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """dW [E,N,K] and db [E,N] (empty without bias) of y = gate·(x·Wᵀ + b).

    x [B,1,T,K] or [B,k,T,K], grad [B,1,T,N] or [B,k,T,N], index and gate [B,k].
    """
    tokens, columns = grad.shape[2:]
    slots, inner = index.shape[1], x.shape[-1]
    dweight = x.new_empty(experts, columns, inner)
    dbias = x.new_empty(experts if with_bias else 0, columns)
    if dweight.numel() + dbias.numel() == 0:
        return dweight, dbias
    tile = tile_of(x, columns, inner)
    # Inputs without channels leave the biases.
    tiles = max(1, triton.cdiv(inner, tile.columns))
    grid = (tiles, triton.cdiv(columns, tile.rows), experts)
    launch(
        weight_kernel,
        grid,
        x,
        grad,
        index.contiguous(),
        gate.contiguous() if gate is not None else x,
        dweight,
        dbias,
        index.numel(),
        slots,
        tokens,
        columns,
        inner,
        x.stride(0),
        x.stride(1) if x.shape[1] > 1 else 0,
        x.stride(2),
        grad.stride(0),
        grad.stride(1) if grad.shape[1] > 1 else 0,
        grad.stride(2),
        HAS_GATE=gate is not None,
        HAS_BIAS=with_bias,
        **matrix_options(tile, x.dtype),
    )
    return dweight, dbias


def typical_launches(dtype: torch.dtype) -> None:
    """Every kernel of this file once, on tensors without data, at the sizes of one SD3.5 block."""
    x, index = torch.empty(1, 1, 1024, 384, dtype=dtype, device="meta"), torch.empty(1, 2).int()
    weight, bias = x.new_empty(4, 1152, 384), x.new_empty(4, 1152)
    out = forward(x, weight, index, bias)
    forward(out, weight.transpose(1, 2), index, None)
    backward_weight(x, out, index, 4, with_bias=True)
