"""Two launches for all layers: parts of the token mean, then routers, softmaxes and top-k."""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.launch import accumulator, launch

_ROWS, _CHANNELS = 32, 64


@triton.jit
def mean_kernel(
    x,
    parts,
    pictures,
    tokens,
    channels,
    share,
    stride_xl,
    stride_xb,
    stride_xt,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Sum over `share` tokens. Grid (channel tiles, token parts, L·B); parts [L·B, parts, C]."""
    i_c, i_p = tl.program_id(0), tl.program_id(1)
    i_lb = tl.program_id(2).to(tl.int64)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    o_t = tl.arange(0, ROWS)
    m_c = o_c < channels
    x += (i_lb // pictures) * stride_xl + (i_lb % pictures) * stride_xb
    acc = tl.zeros([CHANNELS], dtype=ACCUMULATOR)
    for start in range(0, share, ROWS):
        i_t = i_p * share + start + o_t
        mask = ((i_t < tokens) & (start + o_t < share))[:, None] & m_c[None, :]
        p_x = x + i_t.to(tl.int64)[:, None] * stride_xt + o_c[None, :]
        b_x = tl.load(p_x, mask=mask, other=0.0)  # [ROWS, CHANNELS]
        acc += tl.sum(b_x.to(ACCUMULATOR), axis=0)
    p_out = parts + (i_lb * tl.num_programs(1) + i_p) * channels + o_c
    tl.store(p_out, acc, mask=m_c)


@triton.jit
def gate_kernel(
    parts,
    weight,
    bias,
    mean,
    inter,
    intra,
    index,
    pictures,
    tokens,
    channels,
    count,
    HAS_BIAS: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    GROUPS: tl.constexpr,
    EXPERTS: tl.constexpr,
    K: tl.constexpr,
    ROUTERS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Grid (G + 1, L·B): program 0 weighs the groups, g + 1 picks in group g.

    weight [L, G+G·E, C] dense. ROUTERS: G or E, rounded up to a power of two.
    """
    i_g = tl.program_id(0)
    i_lb = tl.program_id(1).to(tl.int64)
    i_l = i_lb // pictures
    o_r = tl.arange(0, ROUTERS)
    # Logits of this program: the first G for the groups, then E for each group.
    first = tl.where(i_g == 0, 0, GROUPS + (i_g - 1) * EXPERTS)
    size = tl.where(i_g == 0, GROUPS, EXPERTS)
    m_r = o_r < size
    row = i_l * (GROUPS + GROUPS * EXPERTS) + first + o_r
    logits = tl.zeros([ROUTERS], dtype=ACCUMULATOR)
    for start in range(0, channels, CHANNELS):
        o_c = start + tl.arange(0, CHANNELS)
        m_c = o_c < channels
        b_mean = tl.zeros([CHANNELS], dtype=ACCUMULATOR)
        for i_p in range(0, count):
            b_mean += tl.load(parts + (i_lb * count + i_p) * channels + o_c, mask=m_c, other=0.0)
        b_mean = b_mean / tokens
        if i_g == 0:
            tl.store(mean + i_lb * channels + o_c, b_mean, mask=m_c)
        p_w = weight + row[:, None] * channels + o_c[None, :]
        b_w = tl.load(p_w, mask=m_r[:, None] & m_c[None, :], other=0.0)  # [ROUTERS, CHANNELS]
        logits += tl.sum(b_w.to(ACCUMULATOR) * b_mean[None, :], axis=1)
    if HAS_BIAS:
        logits += tl.load(bias + row, mask=m_r, other=0.0).to(ACCUMULATOR)
    # `max` and `argmax` may drop NaN: picks are made without, the weights keep it.
    # −∞ rules an expert out; +∞, and nothing but −∞, have no softmax.
    bad = (logits != logits) | (logits == float("inf"))
    broken = tl.sum(tl.where(m_r & bad, 1, 0), axis=0) > 0
    broken = broken | (tl.sum(tl.where(m_r & (logits != float("-inf")), 1, 0), axis=0) == 0)
    logits = tl.where(m_r, tl.where(bad | broken, 0.0, logits), float("-inf"))
    p = tl.exp(logits - tl.max(logits, axis=0))
    p = p / tl.sum(p, axis=0)
    if i_g == 0:
        tl.store(inter + i_lb * GROUPS + o_r, tl.where(broken, float("nan"), p), mask=m_r)
    else:
        out = (i_lb * GROUPS + i_g - 1) * K
        left = tl.where(m_r, p, -1.0)
        if RENORMALIZE:
            rest = left
            for _ in tl.static_range(K):
                # The lowest index among equals.
                rest = tl.where(o_r == tl.argmax(rest, axis=0, tie_break_left=True), -1.0, rest)
            p = p / tl.sum(tl.where(m_r & (rest < 0), p, 0.0), axis=0)
        p = tl.where(broken, float("nan"), p)
        for i_k in tl.static_range(K):
            best = tl.argmax(left, axis=0, tie_break_left=True)
            hit = o_r == best
            tl.store(index + out + i_k, best.to(tl.int32))
            tl.store(intra + out + i_k, tl.sum(tl.where(hit, p, 0.0), axis=0))
            left = tl.where(hit, -1.0, left)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    experts: int,
    k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """inter [L,B,G], intra and index [L,B,G,k], and the mean token [L,B,C] for backward."""
    layers, pictures, tokens, channels = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    inter = x.new_empty(layers, pictures, groups, dtype=wide)
    intra = x.new_empty(layers, pictures, groups, k, dtype=wide)
    index = x.new_empty(layers, pictures, groups, k, dtype=torch.int32)
    mean = x.new_empty(layers, pictures, channels, dtype=wide)
    if layers * pictures == 0:
        return inter, intra, index, mean
    # Enough programs to fill a GPU, however few pictures there are.
    count = min(triton.cdiv(tokens, _ROWS), max(1, 1024 // (layers * pictures)))
    share = triton.cdiv(tokens, count)
    parts = x.new_empty(layers * pictures, count, channels, dtype=wide)
    launch(
        mean_kernel,
        (triton.cdiv(channels, _CHANNELS), count, layers * pictures),
        x,
        parts,
        pictures,
        tokens,
        channels,
        share,
        *x.stride()[:3],
        ROWS=_ROWS,
        CHANNELS=_CHANNELS,
        ACCUMULATOR=accumulator(x.dtype),
        num_warps=4,
        num_stages=3,
    )
    launch(
        gate_kernel,
        (groups + 1, layers * pictures),
        parts,
        weight.contiguous(),
        bias.contiguous() if bias is not None else weight,
        mean,
        inter,
        intra,
        index,
        pictures,
        tokens,
        channels,
        count,
        HAS_BIAS=bias is not None,
        RENORMALIZE=renormalize,
        GROUPS=groups,
        EXPERTS=experts,
        K=k,
        ROUTERS=triton.next_power_of_2(max(groups, experts)),
        CHANNELS=128,
        ACCUMULATOR=accumulator(x.dtype),
        num_warps=1,
        num_stages=2,
    )
    return inter, intra, index, mean


def typical_launches(dtype: torch.dtype) -> None:
    """Every kernel of this file once, on tensors without data, for all blocks of SD3.5-medium."""
    x = torch.empty(24, 1, 1024, 384, dtype=dtype, device="meta")
    weight, bias = x.new_empty(24, 20, 384), x.new_empty(24, 20)
    forward(x, weight, bias, groups=4, experts=4, k=2, renormalize=False)
