"""Pass 1: parts of the Gram matrices and norms; between: softmax of c×c; pass 2: tokens times A.

With a projection, P = W_o·blockdiag(A) of every slot is formed first and takes the place of A.
"""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.channel_attention.backward import backward
from mimkernels.channel_attention.products import apply, gram
from mimkernels.channel_attention.sums import CLAMP, clamp, sum_parts
from mimkernels.launch import accumulator, launch


@triton.jit
def softmax_kernel(
    parts, squares, temperature, index, similarity, attention, norms, heads, count, stride_te,
    HAS_INDEX: tl.constexpr,
    EPS: tl.constexpr,
    HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    PARTS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """G = q̂ᵀk̂, A = softmax(τ·G) for ROWS channels of q, and the norms, from the parts in order.

    Grid (row tiles × heads, B·S); similarity (G) and attention (A) [B·S,heads,c,c], norms
    [B·S,heads,2,c].
    """
    i_n = tl.program_id(1).to(tl.int64)
    i_h, i_r = tl.program_id(0) % heads, tl.program_id(0) // heads
    i_nh = i_n * heads + i_h
    o_r = i_r * ROWS + tl.arange(0, ROWS)[:, None]
    o_c = tl.arange(0, CHANNELS)[None, :]
    m_r, m_c = o_r < HEAD, o_c < HEAD
    o_rc = o_r * HEAD + o_c
    parts += i_nh * count * HEAD * HEAD
    b_g = sum_parts(parts, HEAD * HEAD, count, o_rc, m_r & m_c, PARTS, ACCUMULATOR)
    squares += i_nh * count * 2 * HEAD
    b_q = tl.sqrt(sum_parts(squares, 2 * HEAD, count, o_r, m_r, PARTS, ACCUMULATOR))
    b_k = tl.sqrt(sum_parts(squares + HEAD, 2 * HEAD, count, o_c, m_c, PARTS, ACCUMULATOR))
    norms += i_nh * 2 * HEAD
    tl.store(norms + o_r, b_q, mask=m_r)
    # One row tile speaks for all.
    if i_r == 0:
        tl.store(norms + HEAD + o_c, b_k, mask=m_c)
    b_g = b_g / clamp(b_q, EPS) / clamp(b_k, EPS)
    expert = tl.load(index + i_n).to(tl.int64) if HAS_INDEX else 0
    tau = tl.load(temperature + expert * stride_te + i_h).to(ACCUMULATOR)
    b_s = tl.where(m_c, tau * b_g, float("-inf"))
    b_a = tl.exp(b_s - tl.max(b_s, axis=1)[:, None])
    b_a = b_a / tl.sum(b_a, axis=1)[:, None]
    o_rc += i_nh * HEAD * HEAD
    tl.store(similarity + o_rc, b_g, mask=m_r & m_c)
    tl.store(attention + o_rc, b_a.to(attention.dtype.element_ty), mask=m_r & m_c)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    proj: Tensor | None,
    index: Tensor | None,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B,S,T,C], and for backward A and G [B,S,heads,c,c] and the norms [B,S,heads,2,c].

    q, k, v [B,S,T,C], temperature [E,heads], proj [E,C,C], index [B,S]; without index E is 1. A is
    in the type of q, what is summed is float32 or wider.
    """
    pictures, slots, _, channels = q.shape
    head, wide = channels // heads, torch.promote_types(q.dtype, torch.float32)
    attention = q.new_empty(pictures, slots, heads, head, head)
    similarity = q.new_empty(attention.shape, dtype=wide)
    norms = q.new_empty(pictures, slots, heads, 2, head, dtype=wide)
    if q.numel() == 0:
        return q.new_empty(q.shape), attention, similarity, norms
    parts, squares = gram(q, k, heads, squares=True)
    rows = 16
    launch(
        softmax_kernel,
        (triton.cdiv(head, rows) * heads, pictures * slots),
        parts,
        squares,
        temperature,
        index.contiguous() if index is not None else parts,
        similarity,
        attention,
        norms,
        heads,
        parts.shape[3],
        temperature.stride(0),
        HAS_INDEX=index is not None,
        EPS=CLAMP,
        HEAD=head,
        ROWS=rows,
        CHANNELS=max(16, triton.next_power_of_2(head)),
        # Loads that are under way at once.
        PARTS=4,
        ACCUMULATOR=accumulator(q.dtype),
        num_warps=4,
        num_stages=2,
    )
    matrix = attention
    if proj is not None:
        # A row of W_o is to Aᵀ what a token is to A.
        matrix = apply(proj, attention.transpose(-1, -2), index).unsqueeze(2)
    return apply(v, matrix), attention, similarity, norms


def typical_launches(dtype: torch.dtype) -> None:
    """Every kernel once, on tensors without data, at the sizes of one SD3.5 block at 1024²."""
    qkv, index = torch.empty(1, 2, 4096, 1152, dtype=dtype, device="meta"), torch.empty(1, 2).int()
    q, k, v = qkv.chunk(3, dim=-1)
    temperature, proj = qkv.new_empty(4, 6), qkv.new_empty(4, 384, 384)
    forward(q, k, v, temperature, proj, index, heads=6)
    out, *saved = forward(q, k, v, temperature, None, index, heads=6)
    backward(out, q, k, v, temperature, None, index, *saved, heads=6, with_proj=False)
