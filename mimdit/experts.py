"""The four kinds of sub-expert, each a bank of `[layers, experts, …]` parameters.

Shapes: P pictures, each once for every layer of a slice (layers outermost); T = H·W tokens, d
channels, k slots (the sub-experts that a picture picked). Attention only, no MLP (MiM-DiT, Sec. 3).

A bank is called with u, y [P,T,d] (see `mimdit.mim`), the grid (H, W), index and gate [P,k]
(numbers l·E + e of the slice's experts, and their weights) and the slice of layers. It returns a
gated sum [P,T,d] of its experts' outputs, and slots that are still to be projected; either may be
None.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from mimdit.quantized import expert_linear
from mimkernels import channel_attention, expert_depthwise3x3, squeeze_excite, window_attention

Grid = tuple[int, int]


class Projection(NamedTuple):
    """Slots [P,k,T,d] whose last layer, of their own experts, is left to `expert_combine`."""

    slots: Tensor
    weight: Tensor
    bias: Tensor | None


Parts = tuple[Tensor | None, Projection | None]


def _flat(bank: Tensor, layers: slice) -> Tensor:
    """Parameters [L,E,…] of some layers as one bank [l·E,…]."""
    return bank[layers].flatten(0, 1)


def _bank(*shape: int, fan_in: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * fan_in**-0.5)


def _zeros(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


class SpatialExperts(nn.Module):
    """Multi-head self-attention over all tokens."""

    def __init__(self, layers: int, experts: int, dim: int, head_dim: int = 64) -> None:
        super().__init__()
        self.heads = _heads("spatial", dim, head_dim)
        self.qkv_weight = _bank(layers, experts, 3 * dim, dim, fan_in=dim)
        self.qkv_bias = _zeros(layers, experts, 3 * dim)
        self.proj_weight = _bank(layers, experts, dim, dim, fan_in=dim)
        self.proj_bias = _zeros(layers, experts, dim)

    def forward(
        self, u: Tensor, y: Tensor, grid: Grid, index: Tensor, gate: Tensor, layers: slice
    ) -> Parts:
        del y, grid, gate
        weight, bias = _flat(self.qkv_weight, layers), _flat(self.qkv_bias, layers)
        qkv = expert_linear(u, weight, index, bias)
        q, k, v = rearrange(qkv, "b j t (s h c) -> s b j h t c", s=3, h=self.heads)
        # Slots are folded into the batch: fused attention takes four axes.
        out = F.scaled_dot_product_attention(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
        out = rearrange(out, "(b j) h t c -> b j t (h c)", j=index.shape[1])
        weight, bias = _flat(self.proj_weight, layers), _flat(self.proj_bias, layers)
        return None, Projection(out, weight, bias)


class ChannelExperts(nn.Module):
    """Restormer's multi-Dconv head transposed attention (arXiv 2111.09881, Eq. 1)."""

    def __init__(self, layers: int, experts: int, dim: int, head_dim: int = 64) -> None:
        super().__init__()
        self.heads = _heads("channel", dim, head_dim)
        self.qkv_weight = _bank(layers, experts, 3 * dim, dim, fan_in=dim)
        self.dwconv_weight = _bank(layers, experts, 3 * dim, 3, 3, fan_in=9)
        self.temperature = nn.Parameter(torch.ones(layers, experts, self.heads))
        self.proj_weight = _bank(layers, experts, dim, dim, fan_in=dim)

    def forward(
        self, u: Tensor, y: Tensor, grid: Grid, index: Tensor, gate: Tensor, layers: slice
    ) -> Parts:
        del y, gate
        qkv = expert_linear(u, _flat(self.qkv_weight, layers), index)
        kernels = _flat(self.dwconv_weight, layers)
        planes = expert_depthwise3x3(qkv.unflatten(2, grid), kernels, index)
        # Views, [P,k,T,d] each.
        q, k, v = planes.flatten(2, 3).chunk(3, dim=-1)
        temperature = _flat(self.temperature, layers)
        out = channel_attention(q, k, v, temperature, heads=self.heads, index=index)
        return None, Projection(out, _flat(self.proj_weight, layers), None)


class SwinExperts(nn.Module):
    """Window attention, then shifted-window attention (Swin, arXiv 2103.14030, Eq. 3 and 4).

    a = WMSA(u); out = a + SWMSA(LN(y + a)); this LayerNorm has no affine.
    """

    def __init__(
        self, layers: int, experts: int, dim: int, head_dim: int = 32, window: int = 8
    ) -> None:
        super().__init__()
        self.heads = _heads("swin", dim, head_dim)
        self.window = window
        # Axis 2: the plain and the shifted attention.
        self.qkv_weight = _bank(layers, experts, 2, 3 * dim, dim, fan_in=dim)
        self.qkv_bias = _zeros(layers, experts, 2, 3 * dim)
        table = torch.randn(layers, experts, 2, (2 * window - 1) ** 2, self.heads) * 0.02
        self.bias_table = nn.Parameter(table)
        self.proj_weight = _bank(layers, experts, 2, dim, dim, fan_in=dim)
        self.proj_bias = _zeros(layers, experts, 2, dim)

    def forward(
        self, u: Tensor, y: Tensor, grid: Grid, index: Tensor, gate: Tensor, layers: slice
    ) -> Parts:
        plain = self._attend(u, grid, index, layers, shift=0)
        a = expert_linear(plain.slots, plain.weight, index, plain.bias)
        h = F.layer_norm(y.unsqueeze(1) + a, (y.shape[-1],))
        return gated_sum(gate, a), self._attend(h, grid, index, layers, shift=self.window // 2)

    def _attend(
        self, x: Tensor, grid: Grid, index: Tensor, layers: slice, shift: int
    ) -> Projection:
        qkv_weight, qkv_bias, table, weight, bias = (
            _flat(bank, layers)[:, int(shift > 0)]
            for bank in (
                self.qkv_weight,
                self.qkv_bias,
                self.bias_table,
                self.proj_weight,
                self.proj_bias,
            )
        )
        qkv = expert_linear(x, qkv_weight, index, qkv_bias)
        planes = qkv.unflatten(2, grid)
        out = window_attention(
            planes, table, window=self.window, heads=self.heads, shift=shift, index=index
        ).flatten(2, 3)
        return Projection(out, weight, bias)


def gated_sum(gate: Tensor, slots: Tensor) -> Tensor:
    """Σ_j gate[p,j]·slots[p,j]: [P,k] and [P,k,T,d] → [P,T,d]."""
    return torch.einsum("pj,pjtd->ptd", gate.to(slots.dtype), slots)


class SEExperts(nn.Module):
    """Squeeze-and-excitation (arXiv 1709.01507): u ⊙ σ(W2·ReLU(W1·mean(u) + b1) + b2)."""

    def __init__(self, layers: int, experts: int, dim: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(dim // reduction, 1)
        self.fc1_weight = _bank(layers, experts, hidden, dim, fan_in=dim)
        self.fc1_bias = _zeros(layers, experts, hidden)
        self.fc2_weight = _bank(layers, experts, dim, hidden, fan_in=hidden)
        self.fc2_bias = _zeros(layers, experts, dim)

    def forward(
        self, u: Tensor, y: Tensor, grid: Grid, index: Tensor, gate: Tensor, layers: slice
    ) -> Parts:
        del y, grid
        w1, b1, w2, b2 = (
            _flat(bank, layers)
            for bank in (self.fc1_weight, self.fc1_bias, self.fc2_weight, self.fc2_bias)
        )
        # All slots scale the same u, so their sum is one vector of scales.
        return squeeze_excite(u, w1, b1, w2, b2, index=index, weight=gate), None


def _heads(kind: str, dim: int, head_dim: int) -> int:
    if dim % head_dim:
        raise ValueError(
            f"mim_dim: expected a multiple of {head_dim} (the head width of {kind} experts), "
            f"got {dim}"
        )
    return dim // head_dim


EXPERTS: dict[str, Callable[[int, int, int], nn.Module]] = {
    "spatial": SpatialExperts,
    "channel": ChannelExperts,
    "swin": SwinExperts,
    "se": SEExperts,
}
