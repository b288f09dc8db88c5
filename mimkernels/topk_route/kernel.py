"""Three launches: picks and counts of each block of tokens, where blocks start, rows of slots.

A token picks an expert at most once, so its rank among a block's rows of that expert is a running
sum along the tokens: nothing is sorted, and nothing depends on the order in which programs run.
"""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.launch import accumulator, launch

# Elements of a block [tokens, experts]; more would not fit into registers.
_ELEMENTS = 2048


@triton.jit
def load_logits(logits, o_n, o_e, tokens, experts, stride, ACCUMULATOR: tl.constexpr):
    """A block [ROWS, EXPERTS]; beyond the last expert −inf, beyond the last token 0."""
    m_n, m_e = o_n < tokens, o_e < experts
    p_x = logits + o_n.to(tl.int64)[:, None] * stride + o_e[None, :]
    b_x = tl.load(p_x, mask=m_n[:, None] & m_e[None, :], other=0.0).to(ACCUMULATOR)
    return tl.where(m_e[None, :], b_x, float("-inf"))


@triton.jit
def best_of(left, taken, o_e, m_e, EXPERTS: tl.constexpr):
    """Where each row has its largest that is not taken, the first among equals [ROWS, EXPERTS]."""
    free = m_e[None, :] & (taken == 0)
    best = tl.max(tl.where(free, left, float("-inf")), axis=1)
    first = tl.min(tl.where(free & (left == best[:, None]), o_e[None, :], EXPERTS), axis=1)
    return o_e[None, :] == first[:, None]


@triton.jit
def pick_kernel(
    logits,
    weights,
    index,
    parts,
    tokens,
    experts,
    stride,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Grid (blocks of tokens); weights, index [N,k] dense; parts [blocks, E], slots of a block."""
    i_n = tl.program_id(0)
    o_n = i_n * ROWS + tl.arange(0, ROWS)
    o_e = tl.arange(0, EXPERTS)
    m_n, m_e = o_n < tokens, o_e < experts
    b_x = load_logits(logits, o_n, o_e, tokens, experts, stride, ACCUMULATOR)
    # `max` and `argmax` may drop NaN: picks are made without, the weights keep it.
    broken = tl.sum(tl.where(b_x != b_x, 1, 0), axis=1) > 0  # [ROWS]
    b_x = tl.where(b_x == b_x, b_x, 0.0)
    top = tl.max(b_x, axis=1)
    score = tl.exp(b_x - top[:, None])
    if NORM == "sigmoid":
        score = 1 / (1 + tl.exp(-b_x))
    if NORM == "softmax":
        score = score / tl.sum(score, axis=1)[:, None]
    left = tl.where(m_e[None, :], b_x, float("-inf"))
    if NORM == "topk":
        taken = tl.zeros([ROWS, EXPERTS], dtype=tl.int32)
        for _ in tl.static_range(K):
            taken += tl.where(best_of(left, taken, o_e, m_e, EXPERTS), 1, 0)
        score = tl.where(taken > 0, score, 0.0)
        score = score / tl.sum(score, axis=1)[:, None]
    taken = tl.zeros([ROWS, EXPERTS], dtype=tl.int32)
    for i_k in tl.static_range(K):
        hit = best_of(left, taken, o_e, m_e, EXPERTS)
        taken += tl.where(hit, 1, 0)
        value = tl.sum(tl.where(hit, score, 0.0), axis=1)
        out = o_n.to(tl.int64) * K + i_k
        tl.store(index + out, tl.sum(tl.where(hit, o_e[None, :], 0), axis=1), mask=m_n)
        tl.store(weights + out, tl.where(broken, float("nan"), value), mask=m_n)
    count = tl.sum(tl.where(m_n[:, None], taken, 0), axis=0)
    tl.store(parts + i_n.to(tl.int64) * experts + o_e, count, mask=m_e)


@triton.jit
def scan_kernel(
    parts, starts, counts, blocks, experts, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr
):
    """Slots of an expert in all blocks before each, and in all; grid (expert tiles)."""
    o_e = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    m_e = o_e < experts
    total = tl.zeros([EXPERTS], dtype=tl.int32)
    for start in range(0, blocks, BLOCKS):
        o_b = start + tl.arange(0, BLOCKS)
        mask = (o_b < blocks)[:, None] & m_e[None, :]
        places = o_b.to(tl.int64)[:, None] * experts + o_e[None, :]
        b_count = tl.load(parts + places, mask=mask, other=0)  # [BLOCKS, EXPERTS]
        before = tl.cumsum(b_count, axis=0) - b_count + total[None, :]
        tl.store(starts + places, before, mask=mask)
        total += tl.sum(b_count, axis=0)
    tl.store(counts + o_e, total, mask=m_e)


@triton.jit
def place_kernel(
    index,
    starts,
    counts,
    offsets,
    permutation,
    inverse,
    tokens,
    experts,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """The row of each slot: experts before, blocks before, tokens before. Grid as `pick_kernel`."""
    i_n = tl.program_id(0)
    o_n = i_n * ROWS + tl.arange(0, ROWS)
    o_e = tl.arange(0, EXPERTS)
    m_n, m_e = o_n < tokens, o_e < experts
    b_count = tl.load(counts + o_e, mask=m_e, other=0)
    b_end = tl.cumsum(b_count, axis=0)
    if i_n == 0:
        tl.store(offsets + o_e, b_end, mask=m_e)
    b_start = tl.load(starts + i_n.to(tl.int64) * experts + o_e, mask=m_e, other=0)
    slots = o_n.to(tl.int64) * K
    taken = tl.zeros([ROWS, EXPERTS], dtype=tl.int32)
    for i_k in tl.static_range(K):
        pick = tl.load(index + slots + i_k, mask=m_n, other=EXPERTS)
        taken += tl.where(o_e[None, :] == pick[:, None], 1, 0)
    row = tl.cumsum(taken, axis=0) - taken + (b_end - b_count + b_start)[None, :]
    for i_k in tl.static_range(K):
        pick = tl.load(index + slots + i_k, mask=m_n, other=EXPERTS)
        own = tl.sum(tl.where(o_e[None, :] == pick[:, None], row, 0), axis=1)  # [ROWS]
        tl.store(inverse + slots + i_k, own, mask=m_n)
        tl.store(permutation + own, (slots + i_k).to(tl.int32), mask=m_n)


@triton.jit
def backward_kernel(
    logits,
    weights,
    index,
    dweights,
    dlogits,
    tokens,
    experts,
    stride,
    stride_dn,
    stride_dk,
    K: tl.constexpr,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """dlogits [N,E] dense; grid as `pick_kernel`."""
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_e = tl.arange(0, EXPERTS)
    m_n, m_e = o_n < tokens, o_e < experts
    # Of the picks: dp, the gradient of their weights, and w·dp, scattered over the experts.
    b_dp = tl.zeros([ROWS, EXPERTS], dtype=ACCUMULATOR)
    b_w = tl.zeros([ROWS, EXPERTS], dtype=ACCUMULATOR)
    for i_k in tl.static_range(K):
        slots = o_n.to(tl.int64) * K + i_k
        pick = tl.load(index + slots, mask=m_n, other=EXPERTS)
        value = tl.load(weights + slots, mask=m_n, other=0.0)
        p_d = dweights + o_n.to(tl.int64) * stride_dn + i_k * stride_dk
        grad = tl.load(p_d, mask=m_n, other=0.0).to(ACCUMULATOR)
        hit = o_e[None, :] == pick[:, None]
        b_dp += tl.where(hit, grad[:, None], 0.0)
        b_w += tl.where(hit, value[:, None], 0.0)
    if NORM == "sigmoid":
        b_dx = b_dp * b_w * (1 - b_w)
    else:
        total = tl.sum(b_w * b_dp, axis=1)[:, None]
        if NORM == "softmax":
            b_x = load_logits(logits, o_n, o_e, tokens, experts, stride, ACCUMULATOR)
            b_w = tl.exp(b_x - tl.max(b_x, axis=1)[:, None])
            b_w = b_w / tl.sum(b_w, axis=1)[:, None]
        b_dx = b_w * (b_dp - total)
    p_out = dlogits + o_n.to(tl.int64)[:, None] * experts + o_e[None, :]
    tl.store(p_out, b_dx.to(dlogits.dtype.element_ty), mask=m_n[:, None] & m_e[None, :])


def block(experts: int) -> tuple[int, int]:
    """Tokens of a program, and experts rounded up to a power of two."""
    padded = triton.next_power_of_2(experts)
    return max(4, min(128, _ELEMENTS // padded)), padded


def forward(logits: Tensor, k: int, norm: str) -> tuple[Tensor, ...]:
    """weights, index [N,k], counts, offsets [E], permutation, inverse [N·k]."""
    tokens, experts = logits.shape
    rows, padded = block(experts)
    wide, number = torch.promote_types(logits.dtype, torch.float32), torch.int32
    weights = logits.new_empty(tokens, k, dtype=wide)
    index = logits.new_empty(tokens, k, dtype=number)
    permutation, inverse = (logits.new_empty(tokens * k, dtype=number) for _ in range(2))
    if tokens == 0:
        zeros = logits.new_zeros(2, experts, dtype=number)
        return weights, index, zeros[0].clone(), zeros[1].clone(), permutation, inverse
    blocks = triton.cdiv(tokens, rows)
    counts, offsets = (logits.new_empty(experts, dtype=number) for _ in range(2))
    parts, starts = (logits.new_empty(blocks, experts, dtype=number) for _ in range(2))
    sizes = {"K": k, "ROWS": rows, "EXPERTS": padded}
    launch(
        pick_kernel,
        (blocks,),
        logits,
        weights,
        index,
        parts,
        tokens,
        experts,
        logits.stride(0),
        **sizes,
        NORM=norm,
        ACCUMULATOR=accumulator(logits.dtype),
        num_warps=4,
        num_stages=2,
    )
    tile = min(padded, 16)
    launch(
        scan_kernel,
        (triton.cdiv(experts, tile),),
        parts,
        starts,
        counts,
        blocks,
        experts,
        BLOCKS=128,
        EXPERTS=tile,
        num_warps=4,
        num_stages=2,
    )
    launch(
        place_kernel,
        (blocks,),
        index,
        starts,
        counts,
        offsets,
        permutation,
        inverse,
        tokens,
        experts,
        **sizes,
        num_warps=4,
        num_stages=2,
    )
    return weights, index, counts, offsets, permutation, inverse


def backward(logits: Tensor, weights: Tensor, index: Tensor, dweights: Tensor, norm: str) -> Tensor:
    """Gradient of the logits [N,E]."""
    (tokens, experts), k = logits.shape, index.shape[1]
    dlogits = logits.new_empty(tokens, experts)
    if tokens == 0:
        return dlogits
    rows, padded = block(experts)
    launch(
        backward_kernel,
        (triton.cdiv(tokens, rows),),
        logits,
        weights,
        index,
        dweights,
        dlogits,
        tokens,
        experts,
        logits.stride(0),
        *dweights.stride(),
        K=k,
        NORM=norm,
        ROWS=rows,
        EXPERTS=padded,
        ACCUMULATOR=accumulator(logits.dtype),
        num_warps=4,
        num_stages=2,
    )
    return dlogits


def typical_launches(dtype: torch.dtype) -> None:
    """Every kernel of this file once, on tensors without data: 4096 tokens to 8 of 64 experts."""
    logits = torch.empty(4096, 64, dtype=dtype, device="meta")
    weights, index, *_ = forward(logits, 8, "softmax")
    backward(logits, weights, index, weights, "softmax")
