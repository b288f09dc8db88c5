"""The mixture of experts inside a mixture of experts (MiM-DiT, Eq. 2 to 4).

One module holds the parameters of all blocks, stacked `[layers, …]`, and computes the tokens of any
slice of them at once: they are independent of each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimdit.experts import EXPERTS, Grid
from mimdit.quantized import expert_combine
from mimkernels import image_gate

# Elements of the largest intermediate, the experts' q, k and v, that layers may fill together.
_TOGETHER = 2**28


@dataclass(frozen=True)
class Routing:
    """What the routers chose: inter [L,B,G], intra and index [L,B,G,k] (weights, sub-experts).

    pooled: the token means of u less their running mean, which the routers read, [L,B,d], and if
    the module takes squares the logarithms of the root mean squares of u after them, [L,B,2d];
    then as it came whatever followed in the statistics that were routed.
    """

    inter: Tensor
    intra: Tensor
    index: Tensor
    pooled: Tensor

    def repeat(self, times: int) -> "Routing":
        """The choices of B pictures for times·B of them (tiles, tile by tile)."""
        return Routing(*(x.repeat(1, times, *[1] * (x.ndim - 2)) for x in self._parts()))

    def pictures(self, numbers: Tensor) -> "Routing":
        """The choices of some of the B pictures, by number."""
        return Routing(*(x[:, numbers.to(x.device)] for x in self._parts()))

    def as_dict(self) -> dict[str, Any]:
        """Nested lists, for JSON."""
        return {name: getattr(self, name).tolist() for name in ("inter", "intra", "index")}

    def at(self, layers: slice) -> "Routing":
        """The choices of some layers."""
        return Routing(*(x[layers] for x in self._parts()))

    @staticmethod
    def cat(routings: "Sequence[Routing]") -> "Routing":
        """The choices of successive layers."""
        joined = zip(*(r._parts() for r in routings), strict=True)
        return Routing(*(torch.cat(tensors) for tensors in joined))

    def _parts(self) -> tuple[Tensor, ...]:
        return self.inter, self.intra, self.index, self.pooled


class MiM(nn.Module):
    """Turns patch embeddings of the damaged picture into the conditioning tokens of every block.

    Args:
        layers: L, blocks of the backbone. width: D, its width. dim: d, the experts' width.
        groups: kinds of the expert groups (`EXPERTS`); repeating one gives homogeneous groups.
        experts: E, sub-experts a group. top_k: k, active ones.
        inter: "dense" (softmax over the groups) or "sparse" (only the top group, with its weight).
        intra: "sparse" (softmax, then top-k) or "dense" (all, each with weight 1/E).
        renormalize: let the k chosen weights sum to one.
        squares: take the mean squares of u, too, for a model that reads them from the routing.
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
        squares: bool = True,
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
            "squares": squares,
        }
        self.layers, self.groups, self.experts = layers, tuple(groups), experts
        self.top_k = experts if intra == "dense" else top_k
        self.inter, self.intra, self.renormalize = inter, intra, renormalize
        self.squares = squares

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

    def project(self, z: Tensor, layers: slice) -> tuple[Tensor, Tensor]:
        """z [B,T,D] → y = W_down·z + b and u = LayerNorm(y), both [l,B,T,d]."""
        weight, bias = self.down_weight[layers], self.down_bias[layers]
        # One product for all layers: they read the same z.
        y = F.linear(z, weight.flatten(0, 1), bias.flatten())
        y = y.unflatten(-1, bias.shape).permute(2, 0, 1, 3).contiguous()
        scale, shift = (
            v[layers, None, None].to(y.dtype) for v in (self.norm_weight, self.norm_bias)
        )
        return y, (F.layer_norm(y, y.shape[-1:]) * scale + shift).to(y.dtype)

    def pool(self, z: Tensor) -> Tensor:
        """Token means of u (and with squares of u²) for all layers, [L,B,d] or [L,B,2d]; those of
        tiles average to the picture's."""
        return torch.cat([self._moments(self.project(z, i)[1]) for i in self.chunks(z)])

    def means(self, pooled: Tensor) -> Tensor:
        """Of what `pool` or a `Routing` gives, the part [L,B,d] that comes from the mean tokens."""
        return pooled[..., : self.running_mean.shape[1]]

    def chunks(self, z: Tensor) -> list[slice]:
        """Slices of the layers, each as long as memory for z [B,T,D] allows."""
        size = self.together(z.shape[0] * z.shape[1])
        return [slice(i, min(i + size, self.layers)) for i in range(0, self.layers, size)]

    def together(self, tokens: int) -> int:
        """How many layers go through at once with so many tokens."""
        one = tokens * self.top_k * 3 * self.down_bias.shape[1]
        return max(1, min(self.layers, _TOGETHER // max(one, 1)))

    def route(self, pooled: Tensor) -> Routing:
        """Routing of all layers from `pool`'s means."""
        return self._route(pooled, slice(None))

    def forward(
        self, z: Tensor, grid: Grid, layers: slice, routing: Routing | None = None
    ) -> tuple[Tensor, Routing]:
        """Conditioning tokens m [l,B,T,D] of some blocks, and their routing.

        z [B,T,D] with T = grid[0]·grid[1]; a given `routing` (of all blocks) overrides the routers.
        """
        y, u = self.project(z, layers)
        if routing is None:
            moments = self._moments(u)
            if self.training:
                self.track(self.means(moments).mean(1), layers)
            chosen = self._route(moments, layers)
        else:
            chosen = routing.at(layers)
        count, pictures = u.shape[:2]
        # Layers become pictures of their own, with experts of their own: number l·E + e.
        first = torch.arange(count, device=u.device).view(-1, 1, 1, 1) * self.experts
        number = (chosen.index + first).flatten(0, 1).transpose(0, 1).contiguous()  # [G,P,k]
        weight = (chosen.inter.unsqueeze(-1) * chosen.intra).to(u.dtype)
        weight = weight.flatten(0, 1).transpose(0, 1).contiguous()  # [G,P,k]
        y, u = y.flatten(0, 1), u.flatten(0, 1)  # [P,T,d]
        mixed, left = y, []
        for bank, index, gate in zip(self.banks, number, weight, strict=True):
            added, projection = bank(u, y, grid, index, gate, layers)
            mixed = mixed if added is None else mixed + added
            if projection is not None:
                left.append((*projection, index, gate))
        if left:
            slots, weights, biases, indices, gates = (list(p) for p in zip(*left, strict=True))
            mixed = expert_combine(slots, weights, indices, gates, bias=biases, residual=mixed)
        # [l,B·T,d] times [l,d,D].
        tokens = mixed.unflatten(0, (count, pictures)).flatten(1, 2)
        bias = self.zero_bias[layers].unsqueeze(1)
        m = torch.baddbmm(bias, tokens, self.zero_weight[layers].transpose(1, 2))
        return m.unflatten(1, z.shape[:2]), chosen

    def _moments(self, u: Tensor) -> Tensor:
        """Token means of u [l,B,T,d], and with squares of u² after them, in float32 or wider."""
        wide = u.to(torch.promote_types(u.dtype, torch.float32))
        mean = wide.mean(2)
        return torch.cat([mean, wide.square().mean(2)], dim=-1) if self.squares else mean

    def _route(self, moments: Tensor, layers: slice) -> Routing:
        """By the mean tokens, the first d of moments [l,B,d or 2d], less the running means."""
        mean = self.means(moments)
        weight = torch.cat(
            [self.inter_router[layers], self.intra_router[layers].flatten(1, 2)], dim=1
        )
        # R·(x̄ − μ) = R·x̄ − R·μ; not as a product, which autocast would round.
        bias = -(weight * self.running_mean[layers].unsqueeze(1)).sum(-1)
        inter, intra, index = image_gate(
            mean.unsqueeze(2),
            weight,
            bias,
            groups=len(self.groups),
            experts=self.experts,
            k=self.top_k,
            renormalize=self.renormalize,
        )
        if self.inter == "sparse":
            top = inter.argmax(-1, keepdim=True)
            inter = torch.zeros_like(inter).scatter(-1, top, inter.gather(-1, top))
        if self.intra == "dense":
            index = torch.arange(self.experts, device=mean.device).expand(index.shape)
            intra = torch.full_like(intra, 1 / self.experts)
        pooled = mean - self.running_mean[layers].unsqueeze(1)
        if self.squares:
            # Whatever comes after the squares goes through.
            width = mean.shape[-1]
            squares, others = moments[..., width:].tensor_split((width,), dim=-1)
            pooled = torch.cat([pooled, 0.5 * (squares + 1e-4).log(), others], dim=-1)
        return Routing(inter, intra, index.long(), pooled)

    @torch.no_grad()
    def track(self, mean: Tensor, layers: slice, momentum: float = 0.01) -> None:
        """Follow the batch's mean [l,d]: a plain average at first, then an exponential one."""
        self.running_steps[layers] += 1
        rate = torch.clamp(1 / self.running_steps[layers], min=momentum).unsqueeze(1)
        self.running_mean[layers] = self.running_mean[layers].lerp(mean, rate)

    @torch.no_grad()
    def randomize_(self, generator: torch.Generator) -> None:
        """Draw, on the CPU, what starts at zero or one, and routers that differ."""
        for name, tensor in self.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor)
            if name == "zero_weight":
                tensor.copy_(noise * tensor.shape[-1] ** -0.5)
            elif name.endswith("_router"):
                tensor.copy_(noise * 0.5)
            elif name.endswith(("bias", "table", "norm_weight", "temperature")):
                tensor.add_(noise * 0.1)
        noise = torch.randn(self.running_mean.shape, generator=generator, device="cpu")
        self.running_mean.copy_(noise * 0.1)


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")
