"""Ragged grouped products: each tile of rows finds its expert in the row counts, on the device.

The grid is as long as the rows could need: N·k/ROWS tiles and one more for each expert.
"""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.jit import multiply
from mimkernels.launch import launch, matrix_options
from mimkernels.tiles import architecture, matrix_tile


@triton.jit
def tile_of_rows(offsets, i_tile, experts, EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """Expert, first row and end of its rows; beyond the last tile the expert is `experts`."""
    o_e = tl.arange(0, EXPERTS)
    m_e = o_e < experts
    end = tl.load(offsets + o_e, mask=m_e, other=0)
    begin = tl.load(offsets + o_e - 1, mask=m_e & (o_e > 0), other=0)
    tiles = tl.where(m_e, tl.cdiv(end - begin, ROWS), 0)
    last = tl.cumsum(tiles, axis=0)
    expert = tl.sum(tl.where(m_e & (last <= i_tile), 1, 0), axis=0)
    own = o_e == expert
    first = tl.sum(tl.where(own, begin + (i_tile - last + tiles) * ROWS, 0), axis=0)
    return expert, first, tl.sum(tl.where(own, end, 0), axis=0)


@triton.jit
def forward_kernel(
    x,
    weight,
    bias,
    gate,
    offsets,
    permutation,
    out,
    other,
    dot,
    slots,
    rows,
    columns,
    inner,
    experts,
    stride_x,
    stride_we,
    stride_wn,
    stride_wk,
    stride_b,
    stride_o,
    GATHER: tl.constexpr,
    SCATTER: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_DOT: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """out = gate·(x·Wᵀ + b), [N·k,N] dense. Grid (column tiles × row tiles).

    GATHER: row r of x is its token's, else r. SCATTER: results go to their slots, else to r.
    HAS_DOT: also ⟨x·Wᵀ, other⟩ of each slot, [column tiles, N·k]; other has a row for each token
    where results are scattered, else for each r.
    """
    tiles_n = tl.cdiv(columns, COLUMNS)
    i_n = tl.program_id(0) % tiles_n
    expert, first, end = tile_of_rows(offsets, tl.program_id(0) // tiles_n, experts, EXPERTS, ROWS)
    if expert < experts:
        o_r = first + tl.arange(0, ROWS)
        o_n = i_n * COLUMNS + tl.arange(0, COLUMNS)
        o_k = tl.arange(0, INNER)
        m_r, m_n = o_r < end, o_n < columns
        slot = tl.load(permutation + o_r, mask=m_r, other=0).to(tl.int64)  # [ROWS]
        row = slot // slots if GATHER else o_r.to(tl.int64)
        p_x = x + row[:, None] * stride_x + o_k[None, :]
        p_w = weight + expert.to(tl.int64) * stride_we
        p_w += o_n.to(tl.int64)[None, :] * stride_wn + o_k.to(tl.int64)[:, None] * stride_wk
        acc = multiply(
            p_x, p_w, m_r, m_n, inner, 1, stride_wk, ROWS, COLUMNS, INNER, PRECISION, ACCUMULATOR
        )
        mask = m_r[:, None] & m_n[None, :]
        if HAS_DOT:
            kept = slot // slots if SCATTER else o_r.to(tl.int64)
            b_o = tl.load(other + kept[:, None] * stride_o + o_n[None, :], mask=mask, other=0.0)
            part = tl.sum(acc * b_o.to(ACCUMULATOR), axis=1)  # [ROWS]
            tl.store(dot + i_n.to(tl.int64) * rows + slot, part, mask=m_r)
        if HAS_BIAS:
            b_bias = tl.load(bias + expert.to(tl.int64) * stride_b + o_n, mask=m_n, other=0.0)
            acc += b_bias.to(ACCUMULATOR)[None, :]
        if HAS_GATE:
            acc *= tl.load(gate + slot, mask=m_r, other=0.0).to(ACCUMULATOR)[:, None]
        place = slot if SCATTER else o_r.to(tl.int64)
        p_out = out + place[:, None] * columns + o_n[None, :]
        tl.store(p_out, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def weight_kernel(
    x,
    grad,
    gate,
    offsets,
    permutation,
    dweight,
    dbias,
    slots,
    columns,
    inner,
    stride_x,
    stride_g,
    GATHER: tl.constexpr,
    COMBINE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """dW[e] = Σ over its rows of gate·gradᵀ·x, in order. Grid (K tiles, M tiles, E).

    ROWS of M, COLUMNS of K, INNER rows at a time. COMBINE: grad has a row for each token, and the
    gate counts; else grad is sorted.
    """
    i_k, i_n = tl.program_id(0), tl.program_id(1)
    i_e = tl.program_id(2).to(tl.int64)
    o_n = i_n * ROWS + tl.arange(0, ROWS)
    o_k = i_k * COLUMNS + tl.arange(0, COLUMNS)
    o_r = tl.arange(0, INNER)
    m_n, m_k = o_n < columns, o_k < inner
    begin = tl.load(offsets + i_e - 1, mask=i_e > 0, other=0)
    end = tl.load(offsets + i_e)
    acc = tl.zeros([ROWS, COLUMNS], dtype=ACCUMULATOR)
    acc_bias = tl.zeros([ROWS], dtype=ACCUMULATOR)
    for start in range(begin, end, INNER):
        i_r = start + o_r
        m_r = i_r < end
        slot = tl.load(permutation + i_r, mask=m_r, other=0).to(tl.int64)
        token = slot // slots
        row_x = token if GATHER else i_r.to(tl.int64)
        row_g = token if COMBINE else i_r.to(tl.int64)
        p_g = grad + row_g[None, :] * stride_g + o_n[:, None]
        b_g = tl.load(p_g, mask=m_n[:, None] & m_r[None, :], other=0.0)  # [ROWS, INNER]
        if COMBINE:
            scale = tl.load(gate + slot, mask=m_r, other=0.0).to(ACCUMULATOR)
            b_g = (b_g.to(ACCUMULATOR) * scale[None, :]).to(grad.dtype.element_ty)
        p_x = x + row_x[:, None] * stride_x + o_k[None, :]
        b_x = tl.load(p_x, mask=m_r[:, None] & m_k[None, :], other=0.0)  # [INNER, COLUMNS]
        acc = tl.dot(b_g, b_x, acc, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        if HAS_BIAS:
            acc_bias += tl.sum(b_g.to(ACCUMULATOR), axis=1)
    p_w = dweight + (i_e * columns + o_n)[:, None] * inner + o_k[None, :]
    tl.store(p_w, acc.to(dweight.dtype.element_ty), mask=m_n[:, None] & m_k[None, :])
    # Two conditions: the compiler drops the first, the second is the program's own.
    if HAS_BIAS:  # noqa: SIM102
        if i_k == 0:
            tl.store(dbias + i_e * columns + o_n, acc_bias.to(dbias.dtype.element_ty), mask=m_n)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    offsets: Tensor,
    permutation: Tensor,
    slots: int,
    gather: bool,
    scatter: bool,
) -> Tensor:
    """[N·k,M], sorted or by slot; weight [E,M,K] of any strides, gate [N,k]."""
    return _product(x, weight, bias, gate, None, offsets, permutation, slots, gather, scatter)[0]


def backward_input(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    gate: Tensor | None,
    offsets: Tensor,
    permutation: Tensor,
    slots: int,
    gather: bool,
    combine: bool,
) -> tuple[Tensor, Tensor]:
    """dx = gate·(grad·W), by slot if `gather`, else sorted; and ⟨grad·W, x⟩ of each slot."""
    back, other = weight.transpose(1, 2), x if combine else None
    return _product(grad, back, None, gate, other, offsets, permutation, slots, combine, gather)


def _product(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    other: Tensor | None,
    offsets: Tensor,
    permutation: Tensor,
    slots: int,
    gather: bool,
    scatter: bool,
) -> tuple[Tensor, Tensor]:
    (experts, columns, inner), rows = weight.shape, len(permutation)
    out = x.new_empty(rows, columns)
    # Few rows an expert: the tile is no taller than their mean.
    tile = matrix_tile(
        architecture(x.device), x.element_size(), triton.cdiv(max(rows, 1), experts), columns
    )
    tiles_n = triton.cdiv(columns, tile.columns)
    if gate is None or other is None:
        dot = x.new_empty(0) if gate is None else gate.new_empty(0)
    else:
        dot = gate.new_empty(tiles_n, rows)
    if out.numel() == 0:
        return out, (gate.new_zeros(rows) if dot.ndim == 2 else dot)  # pyright: ignore
    launch(
        forward_kernel,
        ((triton.cdiv(rows, tile.rows) + experts) * tiles_n,),
        x,
        weight,
        bias if bias is not None else x,
        gate.contiguous() if gate is not None else x,
        offsets,
        permutation,
        out,
        other if other is not None else x,
        dot,
        slots,
        rows,
        columns,
        inner,
        experts,
        x.stride(0),
        *weight.stride(),
        bias.stride(0) if bias is not None else 0,
        other.stride(0) if other is not None else 0,
        GATHER=gather,
        SCATTER=scatter,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        HAS_DOT=dot.ndim == 2,
        EXPERTS=triton.next_power_of_2(experts),
        **matrix_options(tile, x.dtype),
    )
    return out, dot.sum(0) if dot.ndim == 2 else dot


def backward_weight(
    x: Tensor,
    grad: Tensor,
    gate: Tensor | None,
    offsets: Tensor,
    permutation: Tensor,
    slots: int,
    gather: bool,
    combine: bool,
    with_bias: bool,
) -> tuple[Tensor, Tensor]:
    """dW [E,M,K] and db [E,M] (empty without bias)."""
    experts, columns, inner = len(offsets), grad.shape[1], x.shape[1]
    dweight = x.new_empty(experts, columns, inner)
    dbias = x.new_empty(experts if with_bias else 0, columns)
    if dweight.numel() + dbias.numel() == 0:
        return dweight, dbias
    tile = matrix_tile(architecture(x.device), x.element_size(), columns, inner)
    # Inputs without channels leave the biases.
    tiles = max(1, triton.cdiv(inner, tile.columns))
    launch(
        weight_kernel,
        (tiles, triton.cdiv(columns, tile.rows), experts),
        x,
        grad,
        gate.contiguous() if gate is not None else x,
        offsets,
        permutation,
        dweight,
        dbias,
        slots,
        columns,
        inner,
        x.stride(0),
        grad.stride(0),
        GATHER=gather,
        COMBINE=combine,
        HAS_BIAS=with_bias,
        **matrix_options(tile, x.dtype),
    )
    return dweight, dbias


def typical_launches(dtype: torch.dtype) -> None:
    """Every kernel of this file once, on tensors without data: an MLP's two layers, 8 experts."""
    x = torch.empty(4096, 1024, dtype=dtype, device="meta")
    up, down = x.new_empty(8, 2048, 1024), x.new_empty(8, 1024, 2048)
    gate = torch.empty(4096, 2, device="meta")
    offsets, permutation = torch.empty(8).int(), torch.empty(8192).int()
    routed = (offsets, permutation, 2)
    hidden = forward(x, up, None, None, *routed, gather=True, scatter=False)
    forward(hidden, down, None, gate, *routed, gather=False, scatter=True)
    backward_input(x, hidden, down, gate, *routed, gather=False, combine=True)
    backward_input(hidden, x, up, None, *routed, gather=True, combine=False)
    backward_weight(hidden, x, gate, *routed, gather=False, combine=True, with_bias=False)
    backward_weight(x, hidden, None, *routed, gather=True, combine=False, with_bias=True)
