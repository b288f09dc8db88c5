"""softmax(scale·q·kᵀ + B)·v inside M×M windows of a cyclically shifted grid, head by head.

Swin Transformer (arXiv 2103.14030, Eq. 4 and Fig. 4): B[p,q] is the table's row for the offset from
place q to place p; pairs that only the shift brought together get −∞.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def window_attention_reference(
    qkv: Tensor,
    table: Tensor,
    index: Tensor | None = None,
    pad_value: Tensor | None = None,
    *,
    window: int,
    heads: int,
    shift: Sequence[int] = (0, 0),
    scale: float | None = None,
    roll_first: bool = False,
) -> Tensor:
    """qkv [B,H,W,3C] or [B,k,H,W,3C], table [(2M−1)²,heads] → [B,H,W,C] or [B,k,H,W,C].

    With index [B] or [B,k], table is a bank [E,(2M−1)²,heads], and pad_value [3C] may be [E,3C].
    """
    height, width, channels = qkv.shape[-3:]
    m, head = window, channels // (3 * heads)
    if qkv.numel() == 0:
        # Empty, and other gradients are zero: fused attention would leave them out.
        others = table.sum() if pad_value is None else table.sum() + pad_value.sum()
        return qkv[..., : heads * head] * others
    x = qkv.reshape(math.prod(qkv.shape[:-3]), height, width, channels)  # [N,H,W,3C]
    picked = None if index is None else index.reshape(-1)
    back = [-s for s in shift]
    if roll_first:
        x = torch.roll(x, back, (1, 2))
    x = F.pad(x, (0, 0, 0, -width % m, 0, -height % m))
    n, padded_h, padded_w = x.shape[:3]
    if pad_value is not None:
        rows, columns = (torch.arange(s, device=x.device) for s in (padded_h, padded_w))
        real = (rows < height)[:, None, None] & (columns < width)[:, None]  # [rows, columns, 1]
        pad = pad_value if pad_value.ndim == 1 else pad_value[picked][:, None, None]
        x = torch.where(real, x, pad.to(x.dtype))
    if not roll_first:
        x = torch.roll(x, back, (1, 2))
    down, across = padded_h // m, padded_w // m
    # [3, N, windows down, windows across, heads, M, M, head width]
    x = x.reshape(n, down, m, across, m, 3, heads, head).permute(5, 0, 1, 3, 6, 2, 4, 7)
    q, k, v = x.reshape(3, n * down * across, heads, m * m, head)
    offset = relative_position(m, table.device)
    bias = table[offset][None] if picked is None else table[picked][:, offset]
    bias = bias.permute(0, 3, 1, 2).unsqueeze(1)  # [N or 1, 1, heads, M², M²]
    masked = pad_value is None
    region = window_regions((height, width), m, shift, table.device, masked, roll_first)
    apart = region[:, :, None] != region[:, None, :]  # [windows, M², M²]
    bias = bias.to(q.dtype).masked_fill(apart[None, :, None], float("-inf"))
    bias = bias.expand(n, *bias.shape[1:]).reshape(n * down * across, heads, m * m, m * m)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)
    out = out.reshape(n, down, across, heads, m, m, head).permute(0, 1, 4, 2, 5, 3, 6)
    out = out.reshape(n, padded_h, padded_w, heads * head)
    if roll_first:
        out = torch.roll(out[:, :height, :width], list(shift), (1, 2))
    else:
        out = torch.roll(out, list(shift), (1, 2))[:, :height, :width]
    return out.reshape(*qkv.shape[:-1], heads * head).contiguous()


def relative_position(window: int, device: torch.device) -> Tensor:
    """Row of the bias table for each pair of places in a window, [M²,M²] (Swin's order)."""
    place = torch.arange(window, device=device)
    offset = place[:, None] - place[None, :] + window - 1
    rows, columns = offset[:, None, :, None], offset[None, :, None, :]
    return (rows * (2 * window - 1) + columns).reshape(window**2, window**2)


def window_regions(
    grid: Sequence[int],
    window: int,
    shift: Sequence[int],
    device: torch.device,
    masked: bool = True,
    roll_first: bool = False,
) -> Tensor:
    """A number for each place of each window, [windows, M²]; equal numbers may attend.

    Separates what the cyclic shift brought together and, if masked, padded tokens from real ones.
    """
    wrapped, real = [], []
    for size, by in zip(grid, shift, strict=True):
        padded = size + -size % window
        place = torch.arange(padded, device=device)
        # After the shift the last rows come from the other edge of the picture.
        wrapped.append(place + by >= padded)
        real.append((place if roll_first else (place + by) % padded) < size)
    region = wrapped[0][:, None] * 2 + wrapped[1][None, :]
    if masked:
        # All padded tokens are one region: which of the two sides they lie on does not matter.
        region = torch.where(real[0][:, None] & real[1][None, :], region, -1)
    # `len` would give the number that was traced, a constant of an exported graph.
    down, across = (w.shape[0] // window for w in wrapped)
    region = region.reshape(down, window, across, window).transpose(1, 2)
    return region.reshape(down * across, window * window)
