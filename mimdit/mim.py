"""The mixture of experts inside a mixture of experts (MiM-DiT, Eq. 2 to 4).

One module holds the parameters of all blocks, stacked `[layers, …]`; a block calls
`mim(z, layer=l)`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimdit.experts import EXPERTS, Grid


@dataclass(frozen=True)
class Routing:
    """What the routers chose: inter [L,B,G], intra and index [L,B,G,k] (weights, sub-experts)."""

    inter: Tensor
    intra: Tensor
    index: Tensor

    def repeat(self, times: int) -> "Routing":
        """The choices of B pictures for times·B of them (tiles, tile by tile)."""
        return Routing(
            *(x.repeat(1, times, *[1] * (x.ndim - 2)) for x in (self.inter, self.intra, self.index))
        )

    def as_dict(self) -> dict[str, Any]:
        """Nested lists, for JSON."""
        return {name: getattr(self, name).tolist() for name in ("inter", "intra", "index")}

    def at(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """inter [B,G], intra [B,G,k] and index [B,G,k] of one block."""
        return self.inter[layer], self.intra[layer], self.index[layer]


class MiM(nn.Module):
    """Turns patch embeddings of the damaged picture into the conditioning tokens of every block.

    Args:
        layers: L, blocks of the backbone. width: D, its width. dim: d, the experts' width.
        groups: kinds of the expert groups (`EXPERTS`); repeating one gives homogeneous groups.
        experts: E, sub-experts a group. top_k: k, active ones.
        inter: "dense" (softmax over the groups) or "sparse" (only the top group, with its weight).
        intra: "sparse" (softmax, then top-k) or "dense" (all, each with weight 1/E).
        renormalize: let the k chosen weights sum to one.
    """

    running_mean: Tensor
    running_steps: Tensor

    def __init__(
        self,
        layers: int,
        width: int,
        dim: int,
        groups: Sequence[str] = ("spatial", "channel", "swin", "se"),
        experts: int = 4,
        top_k: int = 2,
        inter: str = "dense",
        intra: str = "sparse",
        renormalize: bool = False,
    ) -> None:
        super().__init__()
        _one_of("inter", inter, ("dense", "sparse"))
        _one_of("intra", intra, ("dense", "sparse"))
        for group in groups:
            _one_of("groups", group, tuple(EXPERTS))
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k: expected 1 to {experts} (the number of experts), got {top_k}")
        # The arguments, to build another one of the same kind.
        self.settings: dict[str, Any] = {
            "layers": layers,
            "width": width,
            "dim": dim,
            "groups": tuple(groups),
            "experts": experts,
            "top_k": top_k,
            "inter": inter,
            "intra": intra,
            "renormalize": renormalize,
        }
        self.layers, self.groups, self.experts = layers, tuple(groups), experts
        self.top_k = experts if intra == "dense" else top_k
        self.inter, self.intra, self.renormalize = inter, intra, renormalize

        self.down_weight = nn.Parameter(torch.randn(layers, dim, width) * width**-0.5)
        self.down_bias = nn.Parameter(torch.zeros(layers, dim))
        self.norm_weight = nn.Parameter(torch.ones(layers, dim))
        self.norm_bias = nn.Parameter(torch.zeros(layers, dim))
        self.inter_router = nn.Parameter(torch.randn(layers, len(groups), dim) * 0.02)
        self.intra_router = nn.Parameter(torch.randn(layers, len(groups), experts, dim) * 0.02)
        # Routers read the pooled features less this mean: with it left in, some never learn.
        self.register_buffer("running_mean", torch.zeros(layers, dim))
        self.register_buffer("running_steps", torch.zeros(layers))
        self.banks = nn.ModuleList(EXPERTS[group](layers, experts, dim) for group in groups)
        # ZeroLinear: the backbone starts undisturbed.
        self.zero_weight = nn.Parameter(torch.zeros(layers, width, dim))
        self.zero_bias = nn.Parameter(torch.zeros(layers, width))

    def project(self, z: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """z [B,T,D] → y = W_down·z + b and u = LayerNorm(y), both [B,T,d]."""
        y = F.linear(z, self.down_weight[layer], self.down_bias[layer])
        norm = (self.norm_weight[layer].to(y.dtype), self.norm_bias[layer].to(y.dtype))
        return y, F.layer_norm(y, y.shape[-1:], *norm)

    def pool(self, z: Tensor) -> Tensor:
        """Token means of u for all layers, [L,B,d]; means of tiles average to the picture's."""
        return torch.stack([self.project(z, i)[1].float().mean(1) for i in range(self.layers)])

    def route(self, pooled: Tensor) -> Routing:
        """Routing of all layers from `pool`'s means [L,B,d]."""
        chosen = [self._route(pooled[i], i) for i in range(self.layers)]
        return Routing(*(torch.stack(parts) for parts in zip(*chosen, strict=True)))

    def forward(
        self, z: Tensor, grid: Grid, layer: int, routing: Routing | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Conditioning tokens of one block.

        z [B,T,D] with T = grid[0]·grid[1]; a given `routing` overrides the routers.
        Returns m [B,T,D] and this layer's (inter [B,G], intra [B,G,k], index [B,G,k]).
        """
        y, u = self.project(z, layer)
        if routing is None:
            pooled = u.float().mean(dim=1)
            if self.training:
                self._track(pooled.detach(), layer)
            inter, intra, index = self._route(pooled, layer)
        else:
            inter, intra, index = routing.at(layer)
        mixed = y
        for g, bank in enumerate(self.banks):
            out = bank(u, y, grid, layer, index[:, g])  # [B,k,T,d]
            gate = (inter[:, g, None] * intra[:, g]).to(out.dtype)  # [B,k]
            mixed = mixed + torch.einsum("bj,bjtd->btd", gate, out)
        m = F.linear(mixed, self.zero_weight[layer], self.zero_bias[layer])
        return m, (inter, intra, index)

    def _route(self, pooled: Tensor, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(pooled.device.type, enabled=False):
            centred = pooled.float() - self.running_mean[layer].float()
            inter = F.linear(centred, self.inter_router[layer].float()).softmax(-1)
            logits = torch.einsum("bd,ged->bge", centred, self.intra_router[layer].float())
            p = logits.softmax(-1)
        if self.inter == "sparse":
            top = inter.argmax(-1, keepdim=True)
            inter = torch.zeros_like(inter).scatter(-1, top, inter.gather(-1, top))
        if self.intra == "dense":
            index = torch.arange(self.experts, device=p.device).expand(p.shape)
            return inter, torch.full_like(p, 1 / self.experts), index
        # Stable: equal weights go to the lowest index, on every device and in every export.
        value, index = p.sort(dim=-1, descending=True, stable=True)
        value, index = value[..., : self.top_k], index[..., : self.top_k]
        if self.renormalize:
            value = value / value.sum(-1, keepdim=True)
        return inter, value, index

    @torch.no_grad()
    def _track(self, pooled: Tensor, layer: int, momentum: float = 0.01) -> None:
        self.running_steps[layer] += 1
        # A plain average at first, then an exponential one.
        rate = torch.clamp(1 / self.running_steps[layer], min=momentum)
        self.running_mean[layer].lerp_(pooled.mean(0).to(self.running_mean.dtype), rate)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
