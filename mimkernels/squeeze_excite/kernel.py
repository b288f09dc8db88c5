"""Three launches: parts of the token mean; both layers, gates and slots; then the scaling.

The first is `image_gate`'s.
"""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportIndexIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.image_gate.kernel import mean_kernel
from mimkernels.launch import accumulator, launch

_ROWS, _CHANNELS = 32, 64
# Enough programs to fill a GPU, and few enough parts to add up.
_PROGRAMS = 512
# Bytes of a block of w1, which goes through registers; with more of them some compilers spill.
_BLOCK = 8192


@triton.jit
def excite_kernel(
    parts, w1, b1, w2, b2, index, weight, mean, before_act, before_gate, scale,
    slots, tokens, channels, hidden, count,
    stride_1e, stride_1r, stride_1b, stride_2e, stride_2c, stride_2b,
    HAS_INDEX: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATE: tl.constexpr,
    ALL: tl.constexpr,
    CHANNELS: tl.constexpr,
    HIDDEN: tl.constexpr,
    PARTS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Scales [B,C] from the parts [B,count,C] of the mean, in order; what backward needs, too.

    Grid (channel tiles, B); every program goes through the hidden layer, ALL channels wide.
    mean [B,C], before_act [B,k,R], before_gate [B,k,C].
    """
    i_c = tl.program_id(0)
    i_b = tl.program_id(1).to(tl.int64)
    o_a, o_p = tl.arange(0, ALL), tl.arange(0, PARTS)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    m_a, m_c = o_a < channels, o_c < channels
    b_mean = tl.zeros([ALL], dtype=ACCUMULATOR)
    for start in range(0, count, PARTS):
        i_p = start + o_p
        p_parts = parts + (i_b * count + i_p)[:, None] * channels + o_a[None, :]
        b_parts = tl.load(p_parts, mask=(i_p < count)[:, None] & m_a[None, :], other=0.0)
        b_mean += tl.sum(b_parts, axis=0)
    b_mean = b_mean / tokens
    # One channel tile speaks for all.
    if i_c == 0:
        tl.store(mean + i_b * channels + o_a, b_mean, mask=m_a)
    b_scale = tl.zeros([CHANNELS], dtype=ACCUMULATOR)
    for i_j in range(0, slots):
        i_s = i_b * slots + i_j
        expert = tl.load(index + i_s).to(tl.int64) if HAS_INDEX else 0
        b_z = tl.load(b2 + expert * stride_2b + o_c, mask=m_c, other=0.0).to(ACCUMULATOR)
        for start in range(0, hidden, HIDDEN):
            i_r = start + tl.arange(0, HIDDEN)
            m_r = i_r < hidden
            p_w = w1 + expert * stride_1e + i_r.to(tl.int64)[:, None] * stride_1r + o_a[None, :]
            b_w = tl.load(p_w, mask=m_r[:, None] & m_a[None, :], other=0.0)  # [HIDDEN, ALL]
            b_h = tl.sum(b_w.to(ACCUMULATOR) * b_mean[None, :], axis=1)
            b_h += tl.load(b1 + expert * stride_1b + i_r, mask=m_r, other=0.0).to(ACCUMULATOR)
            if i_c == 0:
                tl.store(before_act + i_s * hidden + i_r, b_h, mask=m_r)
            # Not `maximum`, which drops NaN.
            b_h = tl.where(b_h < 0.0, 0.0, b_h) if ACTIVATION == "relu" else b_h * tl.sigmoid(b_h)
            p_w = w2 + expert * stride_2e + o_c.to(tl.int64)[:, None] * stride_2c + i_r[None, :]
            b_w = tl.load(p_w, mask=m_c[:, None] & m_r[None, :], other=0.0)  # [CHANNELS, HIDDEN]
            b_z += tl.sum(b_w.to(ACCUMULATOR) * b_h[None, :], axis=1)
        tl.store(before_gate + i_s * channels + o_c, b_z, mask=m_c)
        if GATE == "sigmoid":
            b_s = tl.sigmoid(b_z)
        else:
            b_s = (b_z + 3.0) / 6.0
            b_s = tl.where(b_s < 0.0, 0.0, tl.where(b_s > 1.0, 1.0, b_s))
        if HAS_WEIGHT:
            b_s *= tl.load(weight + i_s).to(ACCUMULATOR)
        b_scale += b_s
    tl.store(scale + i_b * channels + o_c, b_scale, mask=m_c)


@triton.jit
def scale_kernel(
    x, scale, shift, out, tokens, channels, stride_xb, stride_xt,
    HAS_SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """out = x·scale (+ shift), both [B,C]. Grid (token tiles, channel tiles, B); out dense."""
    i_b = tl.program_id(2).to(tl.int64)
    o_t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    o_c = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < channels
    mask = (o_t < tokens)[:, None] & m_c[None, :]
    p_x = x + i_b * stride_xb + o_t[:, None] * stride_xt + o_c[None, :]
    b_x = tl.load(p_x, mask=mask, other=0.0).to(ACCUMULATOR)  # [ROWS, CHANNELS]
    b_x *= tl.load(scale + i_b * channels + o_c, mask=m_c, other=0.0)[None, :]
    if HAS_SHIFT:
        b_x += tl.load(shift + i_b * channels + o_c, mask=m_c, other=0.0)[None, :]
    p_out = out + (i_b * tokens + o_t)[:, None] * channels + o_c[None, :]
    tl.store(p_out, b_x.to(out.dtype.element_ty), mask=mask)


@triton.jit
def product_kernel(
    x, y, parts, tokens, channels, share, stride_xb, stride_xt, stride_yb, stride_yt,
    ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):  # fmt: skip
    """Σ x·y over `share` tokens, a multiple of ROWS. Grid (channel tiles, parts, B)."""
    i_c, i_p = tl.program_id(0), tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < channels
    acc = tl.zeros([CHANNELS], dtype=ACCUMULATOR)
    for start in range(i_p * share, tl.minimum(i_p * share + share, tokens), ROWS):
        i_t = (start + tl.arange(0, ROWS)).to(tl.int64)
        mask = (i_t < tokens)[:, None] & m_c[None, :]
        p_x = x + i_b * stride_xb + i_t[:, None] * stride_xt + o_c[None, :]
        p_y = y + i_b * stride_yb + i_t[:, None] * stride_yt + o_c[None, :]
        b_x = tl.load(p_x, mask=mask, other=0.0).to(ACCUMULATOR)  # [ROWS, CHANNELS]
        acc += tl.sum(b_x * tl.load(p_y, mask=mask, other=0.0).to(ACCUMULATOR), axis=0)
    tl.store(parts + (i_b * tl.num_programs(1) + i_p) * channels + o_c, acc, mask=m_c)


def forward(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
    activation: str,
    gate: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [B,T,C]; and wide: mean and scale [B,C], what enters act [B,k,R] and gate [B,k,C].

    Banks w1 [E,R,C], b1 [E,R], w2 [E,C,R], b2 [E,C]; without index k = 1, and E = 1.
    """
    pictures, tokens, channels = x.shape
    slots, hidden = 1 if index is None else index.shape[1], w1.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    mean, scale = (x.new_empty(pictures, channels, dtype=wide) for _ in range(2))
    before_act = x.new_empty(pictures, slots, hidden, dtype=wide)
    before_gate = x.new_empty(pictures, slots, channels, dtype=wide)
    if pictures * channels == 0:
        return x.new_empty(x.shape), mean, scale, before_act, before_gate
    count, share = _shares(x)
    parts = x.new_empty(pictures, count, channels, dtype=wide)
    options = _options(x)
    if tokens:
        launch(
            mean_kernel,
            (triton.cdiv(channels, _CHANNELS), count, pictures),
            x,
            parts,
            pictures,
            tokens,
            channels,
            share,
            0,
            *x.stride()[:2],
            **options,
        )
    everything = triton.next_power_of_2(channels)
    rows = max(1, _BLOCK // (everything * x.element_size()))
    launch(
        excite_kernel,
        (triton.cdiv(channels, _CHANNELS), pictures),
        parts,
        w1,
        b1,
        w2,
        b2,
        index.contiguous() if index is not None else x,
        weight.contiguous() if weight is not None else x,
        mean,
        before_act,
        before_gate,
        scale,
        slots,
        max(tokens, 1),
        channels,
        hidden,
        count,
        *w1.stride()[:2],
        b1.stride(0),
        *w2.stride()[:2],
        b2.stride(0),
        HAS_INDEX=index is not None,
        HAS_WEIGHT=weight is not None,
        ACTIVATION=activation,
        GATE=gate,
        ALL=everything,
        CHANNELS=_CHANNELS,
        HIDDEN=min(rows, triton.next_power_of_2(hidden)),
        PARTS=rows,
        ACCUMULATOR=options["ACCUMULATOR"],
        num_warps=4 if everything <= 4096 else 8,
        num_stages=2,
    )
    return rescale(x, scale, None), mean, scale, before_act, before_gate


def rescale(x: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    """x [B,T,C] times scale, plus shift, both [B,C] dense."""
    pictures, tokens, channels = x.shape
    out = x.new_empty(x.shape)
    if out.numel():
        grid = (triton.cdiv(tokens, _ROWS), triton.cdiv(channels, _CHANNELS), pictures)
        added = shift if shift is not None else scale
        arguments = (x, scale, added, out, tokens, channels, *x.stride()[:2])
        launch(scale_kernel, grid, *arguments, HAS_SHIFT=shift is not None, **_options(x))
    return out


def backward_scale(grad: Tensor, x: Tensor) -> Tensor:
    """Σ_t grad·x [B,C], float32 or wider."""
    pictures, tokens, channels = x.shape
    count, share = _shares(x)
    wide = torch.promote_types(x.dtype, torch.float32)
    parts = x.new_empty(pictures, count, channels, dtype=wide)
    if parts.numel():
        grid = (triton.cdiv(channels, _CHANNELS), count, pictures)
        strides = (*grad.stride()[:2], *x.stride()[:2])
        arguments = (grad, x, parts, tokens, channels, share, *strides)
        launch(product_kernel, grid, *arguments, **_options(x))
    return parts.sum(1)


def _shares(x: Tensor) -> tuple[int, int]:
    """Parts that the tokens are summed in, none without tokens, and the tokens of each."""
    pictures, tokens, channels = x.shape
    steps = triton.cdiv(tokens, _ROWS)
    programs = max(1, pictures * triton.cdiv(channels, _CHANNELS))
    share = triton.cdiv(steps, max(1, min(steps, _PROGRAMS // programs))) * _ROWS
    return triton.cdiv(tokens, max(share, 1)), share


def _options(x: Tensor) -> dict[str, object]:
    return {
        "ROWS": _ROWS,
        "CHANNELS": _CHANNELS,
        "ACCUMULATOR": accumulator(x.dtype),
        "num_warps": 4,
        "num_stages": 3,
    }


def typical_launches(dtype: torch.dtype) -> None:
    """Every kernel once, on tensors without data, at the sizes of one SD3.5 block at 1024²."""
    x, index = torch.empty(1, 4096, 384, dtype=dtype, device="meta"), torch.empty(1, 2).int()
    bank = (
        x.new_empty(4, 24, 384),
        x.new_empty(4, 24),
        x.new_empty(4, 384, 24),
        x.new_empty(4, 384),
    )
    out, _, scale, *_ = forward(x, *bank, index, x.new_empty(1, 2), "relu", "sigmoid")
    backward_scale(out, x)
    rescale(out, scale, scale)
