"""All groups and slots in one accumulator: no intermediate leaves the chip, no atomics."""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.jit import multiply
from mimkernels.launch import launch, matrix_options
from mimkernels.tiles import architecture, matrix_tile

# Groups in one launch; more are added launch by launch.
GROUPS = 4


@triton.jit
def add_group(
    acc,
    x,
    weight,
    bias,
    index,
    gate,
    i_b,
    i_t,
    i_n,
    slots,
    tokens,
    columns,
    inner,
    stride_xb,
    stride_xs,
    stride_xt,
    stride_we,
    stride_wn,
    stride_be,
    HAS_BIAS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """acc + Σ over the slots of one group."""
    o_t = i_t * ROWS + tl.arange(0, ROWS)
    o_n = i_n * COLUMNS + tl.arange(0, COLUMNS)
    o_k = tl.arange(0, INNER)
    m_t, m_n = o_t < tokens, o_n < columns
    x += i_b * stride_xb
    for i_s in range(0, slots):
        expert = tl.load(index + i_b * slots + i_s).to(tl.int64)
        scale = tl.load(gate + i_b * slots + i_s).to(ACCUMULATOR)
        p_x = x + o_t.to(tl.int64)[:, None] * stride_xt + o_k[None, :]
        p_w = weight + expert * stride_we + o_n.to(tl.int64)[None, :] * stride_wn + o_k[:, None]
        part = multiply(
            p_x, p_w, m_t, m_n, inner, 1, 1, ROWS, COLUMNS, INNER, PRECISION, ACCUMULATOR
        )
        if HAS_BIAS:
            b_bias = tl.load(bias + expert * stride_be + o_n, mask=m_n, other=0.0)  # [COLUMNS]
            part += b_bias.to(ACCUMULATOR)[None, :]
        acc += scale * part
        x += stride_xs
    return acc


@triton.jit
def forward_kernel(
    residual,
    out,
    x0,
    weight0,
    bias0,
    index0,
    gate0,
    slots0,
    inner0,
    stride_xb0,
    stride_xs0,
    stride_xt0,
    stride_we0,
    stride_wn0,
    stride_be0,
    x1,
    weight1,
    bias1,
    index1,
    gate1,
    slots1,
    inner1,
    stride_xb1,
    stride_xs1,
    stride_xt1,
    stride_we1,
    stride_wn1,
    stride_be1,
    x2,
    weight2,
    bias2,
    index2,
    gate2,
    slots2,
    inner2,
    stride_xb2,
    stride_xs2,
    stride_xt2,
    stride_we2,
    stride_wn2,
    stride_be2,
    x3,
    weight3,
    bias3,
    index3,
    gate3,
    slots3,
    inner3,
    stride_xb3,
    stride_xs3,
    stride_xt3,
    stride_we3,
    stride_wn3,
    stride_be3,
    tokens,
    columns,
    stride_rb,
    stride_rt,
    HAS_RESIDUAL: tl.constexpr,
    BIAS0: tl.constexpr,
    BIAS1: tl.constexpr,
    BIAS2: tl.constexpr,
    BIAS3: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Grid (column tiles × token tiles, B); out [B,T,N] dense."""
    i_b = tl.program_id(1).to(tl.int64)
    tiles_n = tl.cdiv(columns, COLUMNS)
    i_t, i_n = tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n
    o_t = i_t * ROWS + tl.arange(0, ROWS)
    o_n = i_n * COLUMNS + tl.arange(0, COLUMNS)
    mask = (o_t < tokens)[:, None] & (o_n < columns)[None, :]
    acc = tl.zeros([ROWS, COLUMNS], dtype=ACCUMULATOR)
    if HAS_RESIDUAL:
        p_r = residual + i_b * stride_rb + o_t.to(tl.int64)[:, None] * stride_rt + o_n[None, :]
        acc += tl.load(p_r, mask=mask, other=0.0).to(ACCUMULATOR)
    acc = add_group(
        acc, x0, weight0, bias0, index0, gate0, i_b, i_t, i_n, slots0, tokens, columns, inner0,
        stride_xb0, stride_xs0, stride_xt0, stride_we0, stride_wn0, stride_be0,
        BIAS0, ROWS, COLUMNS, INNER, PRECISION, ACCUMULATOR,
    )  # fmt: skip
    if COUNT > 1:
        acc = add_group(
            acc, x1, weight1, bias1, index1, gate1, i_b, i_t, i_n, slots1, tokens, columns, inner1,
            stride_xb1, stride_xs1, stride_xt1, stride_we1, stride_wn1, stride_be1,
            BIAS1, ROWS, COLUMNS, INNER, PRECISION, ACCUMULATOR,
        )  # fmt: skip
    if COUNT > 2:
        acc = add_group(
            acc, x2, weight2, bias2, index2, gate2, i_b, i_t, i_n, slots2, tokens, columns, inner2,
            stride_xb2, stride_xs2, stride_xt2, stride_we2, stride_wn2, stride_be2,
            BIAS2, ROWS, COLUMNS, INNER, PRECISION, ACCUMULATOR,
        )  # fmt: skip
    if COUNT > 3:
        acc = add_group(
            acc, x3, weight3, bias3, index3, gate3, i_b, i_t, i_n, slots3, tokens, columns, inner3,
            stride_xb3, stride_xs3, stride_xt3, stride_we3, stride_wn3, stride_be3,
            BIAS3, ROWS, COLUMNS, INNER, PRECISION, ACCUMULATOR,
        )  # fmt: skip
    p_out = out + (i_b * tokens + o_t)[:, None] * columns + o_n[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=mask)


@triton.jit
def input_kernel(
    grad,
    x,
    weight,
    index,
    gate,
    dx,
    dgate,
    slots,
    tokens,
    columns,
    inner,
    stride_gb,
    stride_gt,
    stride_xb,
    stride_xs,
    stride_xt,
    stride_we,
    stride_wn,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """dx = gate·(grad·W), and each tile's part of dgate = ⟨grad·W, x⟩.

    Grid (K tiles × token tiles, B·S): ROWS tokens, COLUMNS of K, INNER of N at a time.
    dx [B,S,T,K] dense; dgate [B·S, tiles].
    """
    i_s = tl.program_id(1).to(tl.int64)
    i_b, i_j = i_s // slots, i_s % slots
    tiles_k = tl.cdiv(inner, COLUMNS)
    i_t, i_k = tl.program_id(0) // tiles_k, tl.program_id(0) % tiles_k
    expert = tl.load(index + i_s).to(tl.int64)
    scale = tl.load(gate + i_s).to(ACCUMULATOR)
    o_t = i_t * ROWS + tl.arange(0, ROWS)
    o_k = i_k * COLUMNS + tl.arange(0, COLUMNS)
    o_n = tl.arange(0, INNER)
    m_t, m_k = o_t < tokens, o_k < inner
    p_g = grad + i_b * stride_gb + o_t.to(tl.int64)[:, None] * stride_gt + o_n[None, :]
    p_w = weight + expert * stride_we + o_n.to(tl.int64)[:, None] * stride_wn + o_k[None, :]
    acc = multiply(
        p_g, p_w, m_t, m_k, columns, 1, stride_wn, ROWS, COLUMNS, INNER, PRECISION, ACCUMULATOR
    )
    mask = m_t[:, None] & m_k[None, :]
    p_x = x + i_b * stride_xb + i_j * stride_xs + o_t.to(tl.int64)[:, None] * stride_xt
    b_x = tl.load(p_x + o_k[None, :], mask=mask, other=0.0).to(ACCUMULATOR)
    tl.store(dgate + i_s * tl.num_programs(0) + tl.program_id(0), tl.sum(acc * b_x))
    p_dx = dx + (i_s * tokens + o_t)[:, None] * inner + o_k[None, :]
    tl.store(p_dx, (scale * acc).to(dx.dtype.element_ty), mask=mask)


def forward(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    index: Sequence[Tensor],
    gate: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    residual: Tensor | None,
) -> Tensor:
    """Shapes as in the reference; any number of groups."""
    pictures, _, tokens, _ = x[0].shape
    columns = weight[0].shape[1]
    out = x[0].new_empty(pictures, tokens, columns)
    if out.numel() == 0:
        return out
    # One accumulator for a slot's product, one for the sum.
    tile = matrix_tile(
        architecture(out.device), out.element_size(), tokens, columns, accumulators=2
    )
    grid = (triton.cdiv(tokens, tile.rows) * triton.cdiv(columns, tile.columns), pictures)
    groups = list(zip(x, weight, bias, index, gate, strict=True))
    for first in range(0, len(groups), GROUPS):
        some = groups[first : first + GROUPS]
        arguments: list[object] = []
        # Places that no group takes repeat the first, and are not read.
        for x_i, weight_i, bias_i, index_i, gate_i in some + some[:1] * (GROUPS - len(some)):
            arguments += [
                x_i,
                weight_i,
                bias_i if bias_i is not None else x_i,
                index_i.contiguous(),
                gate_i.contiguous(),
                index_i.shape[1],
                x_i.shape[3],
                *x_i.stride()[:3],
                *weight_i.stride()[:2],
                bias_i.stride(0) if bias_i is not None else 0,
            ]
        launch(
            forward_kernel,
            grid,
            residual if residual is not None else out,
            out,
            *arguments,
            tokens,
            columns,
            *(residual.stride()[:2] if residual is not None else (0, 0)),
            HAS_RESIDUAL=residual is not None,
            **{f"BIAS{i}": i < len(some) and some[i][2] is not None for i in range(GROUPS)},
            COUNT=len(some),
            **matrix_options(tile, out.dtype),
        )
        # A tile reads of the residual only what it writes.
        residual = out
    return out


def backward_input(
    grad: Tensor, x: Tensor, weight: Tensor, index: Tensor, gate: Tensor
) -> tuple[Tensor, Tensor]:
    """grad [B,T,N] → dx [B,S,T,K], and ⟨grad·W, x⟩ [B,S], the gates' gradient without bias."""
    (pictures, slots, tokens, inner), columns = x.shape, weight.shape[1]
    dx = x.new_empty(pictures, slots, tokens, inner)
    if dx.numel() == 0:
        return dx, x.new_zeros(pictures, slots)
    tile = matrix_tile(architecture(x.device), x.element_size(), tokens, inner)
    tiles = triton.cdiv(tokens, tile.rows) * triton.cdiv(inner, tile.columns)
    wide = torch.promote_types(x.dtype, torch.float32)
    dgate = x.new_empty(pictures * slots, tiles, dtype=wide)
    launch(
        input_kernel,
        (tiles, pictures * slots),
        grad,
        x,
        weight,
        index.contiguous(),
        gate.contiguous(),
        dx,
        dgate,
        slots,
        tokens,
        columns,
        inner,
        *grad.stride()[:2],
        *x.stride()[:3],
        *weight.stride()[:2],
        **matrix_options(tile, x.dtype),
    )
    return dx, dgate.sum(1).view(pictures, slots).to(x.dtype)


def typical_launches(dtype: torch.dtype) -> None:
    """Every kernel of this file once, on tensors without data, at the sizes of one SD3.5 block."""
    x, index = torch.empty(1, 2, 1024, 384, dtype=dtype, device="meta"), torch.empty(1, 2).int()
    weight, bias, gate = x.new_empty(4, 384, 384), x.new_empty(4, 384), x.new_empty(1, 2)
    many = [[v] * GROUPS for v in (x, weight, index, gate, bias)]
    out = forward(*many, residual=x[:, 0])
    backward_input(out, x, weight, index, gate)
