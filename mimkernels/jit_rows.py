"""Kernels over rows of [B,T,C]: gated branches, LayerNorm, modulation, and their gradients.

`gated_residual_layernorm_modulate` runs them with one or two branches, `layernorm_modulate` with
none.
"""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.launch import accumulator, launch

# Enough programs to fill a GPU, and few enough partial sums to add up.
PROGRAMS = 512
# Elements of a block, at least; wider rows are blocks of their own.
_BLOCK = 2048
# Shared memory for rows that are loaded ahead, in bytes; every architecture has it.
_AHEAD = 49_152

Pairs = Sequence[tuple[Tensor, Tensor]]


@triton.jit
def load(p_x, mask, ACCUMULATOR: tl.constexpr):
    """A block in the accumulator's type, zeros where the mask is not."""
    return tl.load(p_x, mask=mask, other=0.0).to(ACCUMULATOR)


@triton.jit
def normalize(b_x, m_c, channels, eps):
    """x̂ [ROWS, CHANNELS], zero outside the channels, and 1/σ [ROWS, 1]."""
    mean = tl.sum(b_x, axis=1) / channels
    b_x = tl.where(m_c, b_x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / channels + eps)[:, None]
    return b_x * rstd, rstd


@triton.jit
def forward_kernel(
    x, out, h0, h1,
    y0, gate0, stride_yb0, stride_yt0, stride_gb0,
    y1, gate1, stride_yb1, stride_yt1, stride_gb1,
    shift0, scale0, stride_ab0, stride_sb0,
    shift1, scale1, stride_ab1, stride_sb1,
    tokens, channels, stride_xb, stride_xt, eps,
    BRANCHES: tl.constexpr,
    MODULATIONS: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Grid (row tiles, B); h0, h1 and, with branches, out (x') [B,T,C] dense."""
    i_b = tl.program_id(1).to(tl.int64)
    i_t = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = tl.arange(0, CHANNELS)[None, :]
    m_c = o_c < channels
    mask = (i_t < tokens) & m_c
    o_row = (i_b * tokens + i_t) * channels
    b_x = load(x + i_b * stride_xb + i_t * stride_xt + o_c, mask, ACCUMULATOR)  # [ROWS, CHANNELS]
    if BRANCHES > 0:
        b_gate = load(gate0 + i_b * stride_gb0 + o_c, m_c, ACCUMULATOR)  # [1, CHANNELS]
        b_y = load(y0 + i_b * stride_yb0 + i_t * stride_yt0 + o_c, mask, ACCUMULATOR)
        b_x += b_gate * b_y
    if BRANCHES > 1:
        b_gate = load(gate1 + i_b * stride_gb1 + o_c, m_c, ACCUMULATOR)
        b_y = load(y1 + i_b * stride_yb1 + i_t * stride_yt1 + o_c, mask, ACCUMULATOR)
        b_x += b_gate * b_y
    if BRANCHES > 0:
        b_out = b_x.to(out.dtype.element_ty)
        tl.store(out + o_row + o_c, b_out, mask=mask)
        # Normalised is what was stored: backward reads nothing else.
        b_x = b_out.to(ACCUMULATOR)
    b_norm, _ = normalize(b_x, m_c, channels, eps)
    b_scale = load(scale0 + i_b * stride_sb0 + o_c, m_c, ACCUMULATOR)
    b_shift = load(shift0 + i_b * stride_ab0 + o_c, m_c, ACCUMULATOR)
    b_h = b_norm * (1.0 + b_scale) + b_shift
    tl.store(h0 + o_row + o_c, b_h.to(h0.dtype.element_ty), mask=mask)
    if MODULATIONS > 1:
        b_scale = load(scale1 + i_b * stride_sb1 + o_c, m_c, ACCUMULATOR)
        b_shift = load(shift1 + i_b * stride_ab1 + o_c, m_c, ACCUMULATOR)
        b_h = b_norm * (1.0 + b_scale) + b_shift
        tl.store(h1 + o_row + o_c, b_h.to(h1.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x, dout, dx, parts,
    y0, gate0, dy0, stride_yb0, stride_yt0, stride_gb0,
    y1, gate1, dy1, stride_yb1, stride_yt1, stride_gb1,
    dh0, scale0, stride_db0, stride_dt0, stride_sb0,
    dh1, scale1, stride_db1, stride_dt1, stride_sb1,
    tokens, channels, share, stride_xb, stride_xt, stride_ob, stride_ot, eps,
    BRANCHES: tl.constexpr,
    MODULATIONS: tl.constexpr,
    SUMS: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Gradients of `share` tokens, a multiple of ROWS, and their sums for gates and modulations.

    Grid (shares, B); x is what was normalised, dout the gradient of x'. dx, dy0, dy1 [B,T,C] dense;
    parts [SUMS, B, shares, C]: dgate of each branch, then dshift and dscale of each modulation.
    """
    i_b = tl.program_id(1).to(tl.int64)
    i_p = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, CHANNELS)[None, :]
    m_c = o_c < channels
    b_scale0 = 1.0 + load(scale0 + i_b * stride_sb0 + o_c, m_c, ACCUMULATOR)  # [1, CHANNELS]
    if MODULATIONS > 1:
        b_scale1 = 1.0 + load(scale1 + i_b * stride_sb1 + o_c, m_c, ACCUMULATOR)
    if BRANCHES > 0:
        b_gate0 = load(gate0 + i_b * stride_gb0 + o_c, m_c, ACCUMULATOR)
    if BRANCHES > 1:
        b_gate1 = load(gate1 + i_b * stride_gb1 + o_c, m_c, ACCUMULATOR)
    zero = tl.zeros([ROWS, CHANNELS], dtype=ACCUMULATOR)
    dgate0, dgate1, dshift0, dscale0, dshift1, dscale1 = zero, zero, zero, zero, zero, zero
    for start in tl.range(0, share, ROWS, num_stages=STAGES):
        i_t = i_p * share + start + tl.arange(0, ROWS)[:, None]
        mask = (i_t < tokens) & m_c
        o_row = (i_b * tokens + i_t) * channels
        b_x = load(x + i_b * stride_xb + i_t * stride_xt + o_c, mask, ACCUMULATOR)
        b_norm, rstd = normalize(b_x, m_c, channels, eps)
        b_dh0 = load(dh0 + i_b * stride_db0 + i_t * stride_dt0 + o_c, mask, ACCUMULATOR)
        b_dnorm = b_dh0 * b_scale0
        if MODULATIONS > 1:
            b_dh1 = load(dh1 + i_b * stride_db1 + i_t * stride_dt1 + o_c, mask, ACCUMULATOR)
            b_dnorm += b_dh1 * b_scale1
        along = tl.sum(b_dnorm * b_norm, axis=1) / channels
        mean = tl.sum(b_dnorm, axis=1) / channels
        b_dx = rstd * (b_dnorm - mean[:, None] - b_norm * along[:, None])
        if BRANCHES > 0:
            b_dx += load(dout + i_b * stride_ob + i_t * stride_ot + o_c, mask, ACCUMULATOR)
            tl.store(dy0 + o_row + o_c, (b_gate0 * b_dx).to(dy0.dtype.element_ty), mask=mask)
        if BRANCHES > 1:
            tl.store(dy1 + o_row + o_c, (b_gate1 * b_dx).to(dy1.dtype.element_ty), mask=mask)
        tl.store(dx + o_row + o_c, b_dx.to(dx.dtype.element_ty), mask=mask)
        if SUMS > 0:
            dshift0 += b_dh0
            dscale0 += b_dh0 * b_norm
            if MODULATIONS > 1:
                dshift1 += b_dh1
                dscale1 += b_dh1 * b_norm
            if BRANCHES > 0:
                p_y = y0 + i_b * stride_yb0 + i_t * stride_yt0 + o_c
                dgate0 += b_dx * load(p_y, mask, ACCUMULATOR)
            if BRANCHES > 1:
                p_y = y1 + i_b * stride_yb1 + i_t * stride_yt1 + o_c
                dgate1 += b_dx * load(p_y, mask, ACCUMULATOR)
    if SUMS > 0:
        o_c = tl.arange(0, CHANNELS)
        m_c = o_c < channels
        p_parts = parts + (i_b * tl.num_programs(0) + i_p) * channels + o_c
        step = (tl.num_programs(0) * tl.num_programs(1)).to(tl.int64) * channels
        if BRANCHES > 0:
            tl.store(p_parts, tl.sum(dgate0, axis=0), mask=m_c)
            p_parts += step
        if BRANCHES > 1:
            tl.store(p_parts, tl.sum(dgate1, axis=0), mask=m_c)
            p_parts += step
        tl.store(p_parts, tl.sum(dshift0, axis=0), mask=m_c)
        tl.store(p_parts + step, tl.sum(dscale0, axis=0), mask=m_c)
        if MODULATIONS > 1:
            tl.store(p_parts + 2 * step, tl.sum(dshift1, axis=0), mask=m_c)
            tl.store(p_parts + 3 * step, tl.sum(dscale1, axis=0), mask=m_c)


def forward(
    x: Tensor, branches: Pairs, modulations: Pairs, eps: float
) -> tuple[Tensor, list[Tensor]]:
    """x' (x itself without branches) and h of each modulation, [B,T,C].

    x [B,T,C]; branches (y [B,T,C], gate [B,C]), at most two; modulations (shift, scale), both
    [B,C], one or two.
    """
    pictures, tokens, channels = x.shape
    out = x.new_empty(x.shape) if branches else x
    h = [x.new_empty(x.shape) for _ in modulations]
    if x.numel() == 0:
        return out, h
    options = _options(x)
    arguments: list[object] = []
    for y, gate in _two(branches, (x, x)):
        arguments += [y, gate, *y.stride()[:2], gate.stride(0)]
    for shift, scale in _two(modulations, (x, x)):
        arguments += [shift, scale, shift.stride(0), scale.stride(0)]
    launch(
        forward_kernel,
        (triton.cdiv(tokens, options["ROWS"]), pictures),
        x,
        out,
        h[0],
        h[-1],
        *arguments,
        tokens,
        channels,
        *x.stride()[:2],
        eps,
        BRANCHES=len(branches),
        MODULATIONS=len(modulations),
        **options,
    )
    return out, h


def backward(
    x: Tensor,
    dout: Tensor | None,
    branches: Pairs,
    modulations: Pairs,
    eps: float,
    with_sums: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """dx, dy of each branch, and sums [S,B,C]: dgate of each branch, dshift, dscale, dshift2, ….

    x: what was normalised. dout: gradient of x', with branches. branches (y, gate); modulations
    (gradient of h, scale). The sums are float32 or wider, and none (S = 0) unless `with_sums`.
    """
    pictures, tokens, channels = x.shape
    dx = x.new_empty(x.shape)
    dy = [y.new_empty(y.shape) for y, _ in branches]
    count = len(branches) + 2 * len(modulations) if with_sums else 0
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0:
        return dx, dy, x.new_zeros(count, pictures, channels, dtype=wide)
    options = _options(x)
    tiles = triton.cdiv(tokens, options["ROWS"])
    # Without sums every program takes one tile.
    tiles_each = triton.cdiv(tiles, max(1, PROGRAMS // pictures)) if with_sums else 1
    shares = triton.cdiv(tiles, tiles_each)
    parts = x.new_empty(count, pictures, shares, channels, dtype=wide)
    loads = (1 if branches else 0) + 1 + len(modulations) + (len(branches) if with_sums else 0)
    ahead = loads * options["ROWS"] * options["CHANNELS"] * x.element_size() <= _AHEAD
    arguments: list[object] = []
    for (y, gate), dy_i in zip(_two(branches, (x, x)), _two(dy, dx), strict=True):
        arguments += [y, gate, dy_i, *y.stride()[:2], gate.stride(0)]
    for dh, scale in _two(modulations, (x, x)):
        arguments += [dh, scale, *dh.stride()[:2], scale.stride(0)]
    launch(
        backward_kernel,
        (shares, pictures),
        x,
        dout if dout is not None else x,
        dx,
        parts,
        *arguments,
        tokens,
        channels,
        tiles_each * options["ROWS"],
        *x.stride()[:2],
        *(dout.stride()[:2] if dout is not None else (0, 0)),
        eps,
        BRANCHES=len(branches),
        MODULATIONS=len(modulations),
        SUMS=count,
        STAGES=2 if ahead else 1,
        **options,
    )
    return dx, dy, parts.sum(2)


def _two(some: Sequence[Any], filler: Any) -> list[Any]:
    """Places that nothing takes are filled, and not read."""
    return [*some, *[filler] * (2 - len(some))]


def _options(x: Tensor) -> dict[str, Any]:
    channels = max(16, triton.next_power_of_2(x.shape[2]))
    rows = max(1, _BLOCK // channels)
    return {
        "ROWS": rows,
        "CHANNELS": channels,
        "ACCUMULATOR": accumulator(x.dtype),
        "num_warps": min(16, rows * channels // 256),
        "num_stages": 2,
    }
