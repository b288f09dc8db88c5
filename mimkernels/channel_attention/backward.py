"""Gradients of channel attention: one more pass for dA, one that writes dq, dk and dv.

With dA = doᵀ·v, dS = A⊙(dA − rowsum(A⊙dA)) and dG = τ·dS: dτ = Σ dS⊙G, dv = do·A,
dq = (k̂·dGᵀ − rowsum(dG⊙G)·q̂)/‖q‖ and dk = (q̂·dG − colsum(dG⊙G)·k̂)/‖k‖ (x̂ = x/‖x‖ differentiated;
a clamped norm is a constant and has no second term).
"""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.channel_attention.products import apply, gram
from mimkernels.channel_attention.sums import CLAMP, clamp, sum_parts
from mimkernels.expert_linear import kernel as expert_linear
from mimkernels.launch import accumulator, launch, precision
from mimkernels.tiles import architecture


@triton.jit
def matrix_kernel(
    parts, similarity, norms, temperature, index, dgram, along, scale, dtemperature,
    heads, count, stride_te,
    HAS_INDEX: tl.constexpr,
    EPS: tl.constexpr,
    HEAD: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """From the parts of dA, in order: dG over its largest entry, that entry, and dτ.

    Grid (heads, B·S); dgram [B·S,heads,c,c], scale and dtemperature [B·S,heads]; along
    [B·S,heads,2,c]: row sums and column sums of dG⊙G over the same entry.
    """
    i_h, i_n = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_nh = i_n * heads + i_h
    o_r, o_c = tl.arange(0, CHANNELS)[:, None], tl.arange(0, CHANNELS)[None, :]
    m_r, m_c = o_r < HEAD, o_c < HEAD
    mask, o_rc = m_r & m_c, o_r * HEAD + o_c
    parts += i_nh * count * HEAD * HEAD
    b_da = sum_parts(parts, HEAD * HEAD, count, o_rc, mask, PARTS, ACCUMULATOR)
    o_rc += i_nh * HEAD * HEAD
    b_g = tl.load(similarity + o_rc, mask=mask, other=0.0)
    expert = tl.load(index + i_n).to(tl.int64) if HAS_INDEX else 0
    tau = tl.load(temperature + expert * stride_te + i_h).to(ACCUMULATOR)
    b_s = tl.where(m_c, tau * b_g, float("-inf"))
    b_a = tl.exp(b_s - tl.max(b_s, axis=1)[:, None])
    b_a = b_a / tl.sum(b_a, axis=1)[:, None]
    b_ds = tl.where(m_r, b_a * (b_da - tl.sum(b_a * b_da, axis=1)[:, None]), 0.0)
    tl.store(dtemperature + i_nh, tl.sum(b_ds * b_g))
    b_dg = tau * b_ds
    # In float16 gradients of one head may be too small, those of another too large.
    largest = tl.max(tl.abs(b_dg))
    largest = tl.where(largest > 0.0, largest, 1.0)
    tl.store(scale + i_nh, largest)
    b_dg = b_dg / largest
    tl.store(dgram + o_rc, b_dg.to(dgram.dtype.element_ty), mask=mask)
    along += i_nh * 2 * HEAD
    norms += i_nh * 2 * HEAD
    b_q = tl.load(norms + o_r, mask=m_r, other=0.0)
    b_k = tl.load(norms + HEAD + o_c, mask=m_c, other=0.0)
    b_along = tl.where(b_q < EPS, 0.0, tl.sum(b_dg * b_g, axis=1)[:, None])
    tl.store(along + o_r, b_along, mask=m_r)
    b_along = tl.where(b_k < EPS, 0.0, tl.sum(b_dg * b_g, axis=0)[None, :])
    tl.store(along + HEAD + o_c, b_along, mask=m_c)


@triton.jit
def differentiate(
    p_x, p_y, mask, x_norm, y_norm, b_m, b_along,
    PRECISION: tl.constexpr, ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """ŷ·M − along·x̂, [ROWS, CHANNELS]. Both are read for each use: kept, they take registers."""
    b_y = tl.load(p_y, mask=mask, other=0.0)
    b_y = (b_y.to(ACCUMULATOR) * (1.0 / y_norm)).to(b_y.dtype)
    b_dx = tl.dot(b_y, b_m, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    b_x = tl.load(p_x, mask=mask, other=0.0).to(ACCUMULATOR)
    return b_dx - (b_along / x_norm) * b_x


@triton.jit
def token_kernel(
    grad, q, k, attention, dgram, along, scale, norms, dq, dk, dv, slots, tokens, heads,
    stride_gb, stride_gs, stride_gt, stride_qb, stride_qs, stride_qt,
    stride_kb, stride_ks, stride_kt,
    EPS: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """dq, dk and dv of ROWS tokens of a head. Grid (token tiles × heads, B·S); outputs dense."""
    i_n = tl.program_id(1).to(tl.int64)
    i_h, i_t = tl.program_id(0) % heads, tl.program_id(0) // heads
    i_nh = i_n * heads + i_h
    o_t = (i_t * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    o_r, o_c = tl.arange(0, CHANNELS)[:, None], tl.arange(0, CHANNELS)[None, :]
    m_c = o_c < HEAD
    mask = (o_t < tokens) & m_c
    m_rc = (o_r < HEAD) & m_c
    grad += (i_n // slots) * stride_gb + (i_n % slots) * stride_gs + o_t * stride_gt
    q += (i_n // slots) * stride_qb + (i_n % slots) * stride_qs + o_t * stride_qt
    k += (i_n // slots) * stride_kb + (i_n % slots) * stride_ks + o_t * stride_kt
    p_q, p_k, p_g = q + i_h * HEAD + o_c, k + i_h * HEAD + o_c, grad + i_h * HEAD + o_c
    o_out = ((i_n * tokens + o_t) * heads + i_h) * HEAD + o_c
    o_m = i_nh * HEAD * HEAD
    o_n = i_nh * 2 * HEAD + o_c
    q_norm = clamp(tl.load(norms + o_n, mask=m_c, other=1.0), EPS)  # [1, CHANNELS]
    k_norm = clamp(tl.load(norms + HEAD + o_n, mask=m_c, other=1.0), EPS)
    largest = tl.load(scale + i_nh)
    b_m = tl.load(dgram + o_m + o_c * HEAD + o_r, mask=m_rc, other=0.0)  # dGᵀ
    b_along = tl.load(along + o_n, mask=m_c, other=0.0)
    b_x = differentiate(p_q, p_k, mask, q_norm, k_norm, b_m, b_along, PRECISION, ACCUMULATOR)
    b_x *= largest / q_norm
    tl.store(dq + o_out, b_x.to(dq.dtype.element_ty), mask=mask)
    b_m = tl.load(dgram + o_m + o_r * HEAD + o_c, mask=m_rc, other=0.0)
    b_along = tl.load(along + HEAD + o_n, mask=m_c, other=0.0)
    b_x = differentiate(p_k, p_q, mask, k_norm, q_norm, b_m, b_along, PRECISION, ACCUMULATOR)
    b_x *= largest / k_norm
    tl.store(dk + o_out, b_x.to(dk.dtype.element_ty), mask=mask)
    b_m = tl.load(attention + o_m + o_r * HEAD + o_c, mask=m_rc, other=0.0)
    b_g = tl.load(p_g, mask=mask, other=0.0)
    b_x = tl.dot(b_g, b_m, input_precision=PRECISION, out_dtype=ACCUMULATOR)
    tl.store(dv + o_out, b_x.to(dv.dtype.element_ty), mask=mask)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    proj: Tensor | None,
    index: Tensor | None,
    attention: Tensor,
    similarity: Tensor,
    norms: Tensor,
    heads: int,
    with_proj: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv [B,S,T,C], dτ of every slot [B,S,heads], and dW_o (empty unless `with_proj`)."""
    pictures, slots, tokens, channels = q.shape
    head, pairs = channels // heads, pictures * slots
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    dtemperature = norms.new_empty(pictures, slots, heads)
    dproj = q.new_empty(proj.shape if proj is not None and with_proj else 0)
    if q.numel() == 0:
        return dq, dk, dv, dtemperature.zero_(), dproj.zero_()
    if proj is not None:
        # Unfolded, the projection is the linear layer of the picked experts.
        picked = index
        if picked is None:
            picked = torch.zeros(pictures, slots, dtype=torch.int32, device=q.device)
        if with_proj:
            tokens_in = apply(v, attention)
            dproj, _ = expert_linear.backward_weight(tokens_in, grad, picked, len(proj), False)
        grad = expert_linear.forward(grad, proj.transpose(1, 2), picked, None)
    parts, _ = gram(grad, v, heads, squares=False)
    dgram, along = q.new_empty(attention.shape), norms.new_empty(norms.shape)
    scale = norms.new_empty(pictures, slots, heads)
    options = {
        "EPS": CLAMP,
        "HEAD": head,
        "CHANNELS": max(16, triton.next_power_of_2(head)),
        "ACCUMULATOR": accumulator(q.dtype),
    }
    launch(
        matrix_kernel,
        (heads, pairs),
        parts,
        similarity,
        norms,
        temperature,
        index.contiguous() if index is not None else parts,
        dgram,
        along,
        scale,
        dtemperature,
        heads,
        parts.shape[3],
        temperature.stride(0),
        HAS_INDEX=index is not None,
        # Loads that are under way at once.
        PARTS=2,
        num_warps=8,
        num_stages=2,
        **options,
    )
    # Only wgmma and tcgen05 read operands from shared memory, not from registers.
    large = architecture(q.device) in ("sm_90", "sm_100") and q.element_size() == 2
    rows = 64 if large else 32 if q.element_size() == 2 else 16
    launch(
        token_kernel,
        (triton.cdiv(tokens, rows) * heads, pairs),
        grad,
        q,
        k,
        attention,
        dgram,
        along,
        scale,
        norms,
        dq,
        dk,
        dv,
        slots,
        tokens,
        heads,
        *grad.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        ROWS=rows,
        PRECISION=precision(q.dtype),
        num_warps=8 if large else 4,
        num_stages=1,
        **options,
    )
    return dq, dk, dv, dtemperature, dproj
