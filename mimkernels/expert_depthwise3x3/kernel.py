"""A tile of pixels and channels at a time; neighbours are read again, from cache."""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mimkernels.launch import accumulator, launch

_PIXELS, _CHANNELS = 32, 64


@triton.jit
def forward_kernel(
    x,
    weight,
    index,
    out,
    slots,
    height,
    width,
    channels,
    stride_xb,
    stride_xj,
    stride_xh,
    stride_xw,
    FLIP: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Grid (channel tiles × pixel tiles, B·k); weight [E,C,9] and out dense. FLIP: for dx."""
    tiles_c = tl.cdiv(channels, CHANNELS)
    i_c, i_p = tl.program_id(0) % tiles_c, tl.program_id(0) // tiles_c
    i_s = tl.program_id(1).to(tl.int64)
    expert = tl.load(index + i_s).to(tl.int64)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    o_p = i_p * PIXELS + tl.arange(0, PIXELS)
    m_c, m_p = o_c < channels, o_p < height * width
    row, column = o_p // width, o_p % width
    x += (i_s // slots) * stride_xb + (i_s % slots) * stride_xj
    acc = tl.zeros([PIXELS, CHANNELS], dtype=ACCUMULATOR)
    for tap in tl.static_range(9):
        y, z = row + (tap // 3 - 1), column + (tap % 3 - 1)
        inside = m_p & (y >= 0) & (y < height) & (z >= 0) & (z < width)
        p_x = x + y.to(tl.int64)[:, None] * stride_xh + z.to(tl.int64)[:, None] * stride_xw
        b_x = tl.load(p_x + o_c[None, :], mask=inside[:, None] & m_c[None, :], other=0.0)
        p_w = weight + (expert * channels + o_c) * 9 + (8 - tap if FLIP else tap)
        b_w = tl.load(p_w, mask=m_c, other=0.0)  # [CHANNELS]
        acc += b_x.to(ACCUMULATOR) * b_w.to(ACCUMULATOR)[None, :]
    p_out = out + (i_s * height * width + o_p)[:, None] * channels + o_c[None, :]
    tl.store(p_out, acc.to(out.dtype.element_ty), mask=m_p[:, None] & m_c[None, :])


@triton.jit
def weight_kernel(
    x,
    grad,
    index,
    parts,
    pairs,
    slots,
    height,
    width,
    channels,
    share,
    stride_xb,
    stride_xj,
    stride_xh,
    stride_xw,
    stride_gb,
    stride_gj,
    stride_gh,
    stride_gw,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """Sums over `share` pixels of the slots that picked an expert; parts [E, parts, 9, C].

    Grid (channel tiles, parts, E); slots in order and no atomics: the same bits every time.
    """
    i_c, i_p = tl.program_id(0), tl.program_id(1)
    i_e = tl.program_id(2).to(tl.int64)
    o_c = i_c * CHANNELS + tl.arange(0, CHANNELS)
    m_c = o_c < channels
    for tap in tl.static_range(9):
        acc = tl.zeros([CHANNELS], dtype=ACCUMULATOR)
        for i_s in range(0, pairs):
            if tl.load(index + i_s) == i_e:
                i_b = (i_s // slots).to(tl.int64)
                i_j = (i_s % slots).to(tl.int64)
                for start in range(0, share, PIXELS):
                    o_p = start + tl.arange(0, PIXELS)
                    place = i_p * share + o_p
                    m_p = (o_p < share) & (place < height * width)
                    row, column = place // width, place % width
                    y, z = row + (tap // 3 - 1), column + (tap % 3 - 1)
                    inside = m_p & (y >= 0) & (y < height) & (z >= 0) & (z < width)
                    mask = inside[:, None] & m_c[None, :]
                    o_g = row.to(tl.int64) * stride_gh + column.to(tl.int64) * stride_gw
                    o_x = y.to(tl.int64) * stride_xh + z.to(tl.int64) * stride_xw
                    p_g = grad + i_b * stride_gb + i_j * stride_gj + o_g[:, None]
                    p_x = x + i_b * stride_xb + i_j * stride_xj + o_x[:, None]
                    b_g = tl.load(p_g + o_c[None, :], mask=mask, other=0.0)  # [PIXELS, CHANNELS]
                    b_x = tl.load(p_x + o_c[None, :], mask=mask, other=0.0)
                    acc += tl.sum(b_g.to(ACCUMULATOR) * b_x.to(ACCUMULATOR), axis=0)
        p_out = parts + ((i_e * tl.num_programs(1) + i_p) * 9 + tap) * channels + o_c
        tl.store(p_out, acc, mask=m_c)


def forward(x: Tensor, weight: Tensor, index: Tensor, flip: bool) -> Tensor:
    """x [B,k,H,W,C], weight [E,C,3,3], index [B,k] → [B,k,H,W,C] dense."""
    pictures, slots, height, width, channels = x.shape
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    tiles = triton.cdiv(channels, _CHANNELS) * triton.cdiv(height * width, _PIXELS)
    launch(
        forward_kernel,
        (tiles, pictures * slots),
        x,
        weight.contiguous(),
        index.contiguous(),
        out,
        slots,
        height,
        width,
        channels,
        *x.stride()[:4],
        FLIP=flip,
        PIXELS=_PIXELS,
        CHANNELS=_CHANNELS,
        ACCUMULATOR=accumulator(x.dtype),
        num_warps=4,
        num_stages=2,
    )
    return out


def backward_weight(x: Tensor, grad: Tensor, index: Tensor, experts: int) -> Tensor:
    """x and grad [B,k,H,W,C] → dW [E,C,3,3]."""
    _, slots, height, width, channels = x.shape
    wide = torch.promote_types(x.dtype, torch.float32)
    # Enough programs to fill a GPU, and few enough parts to add up.
    count = max(1, min(triton.cdiv(height * width, _PIXELS), 64))
    share = triton.cdiv(height * width, count)
    parts = x.new_empty(experts, count, 9, channels, dtype=wide)
    if parts.numel():
        launch(
            weight_kernel,
            (triton.cdiv(channels, _CHANNELS), count, experts),
            x,
            grad,
            index.contiguous(),
            parts,
            index.numel(),
            slots,
            height,
            width,
            channels,
            share,
            *x.stride()[:4],
            *grad.stride()[:4],
            PIXELS=_PIXELS,
            CHANNELS=_CHANNELS,
            ACCUMULATOR=accumulator(x.dtype),
            num_warps=8,
            num_stages=2,
        )
    sums = parts.sum(1).transpose(1, 2).to(x.dtype)  # [E,C,9]
    return sums.contiguous().view(experts, channels, 3, 3)


def typical_launches(dtype: torch.dtype) -> None:
    """Every kernel of this file once, on tensors without data, at the sizes of one SD3.5 block."""
    x = torch.empty(1, 2, 32, 32, 1152, dtype=dtype, device="meta")
    weight, index = x.new_empty(4, 1152, 3, 3), torch.empty(1, 2).int()
    forward(x, weight, index, flip=False)
    backward_weight(x, x, index, 4)
