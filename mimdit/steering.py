"""Overriding the routers: groups of experts whose weights the user names."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch

from mimdit.mim import Routing


def check_experts(groups: Sequence[str], experts: Mapping[str, float]) -> None:
    """ValueError unless `experts` gives groups of the model weights that can be had.

    Each is from 0 to 1; together they are at most 1, and exactly 1 where every group is named.
    """
    names = ", ".join(dict.fromkeys(groups))
    for name, weight in experts.items():
        if name not in groups:
            raise ValueError(f"experts: expected groups of this model ({names}), got {name!r}")
        # Written so that NaN fails.
        if not 0 <= weight <= 1:
            raise ValueError(f"experts: expected weights from 0 to 1, got {weight:g} for {name}")
    total = math.fsum(experts.values())
    if total > 1 + 1e-6:
        raise ValueError(f"experts: expected weights of at most 1 together, got {total:g}")
    if set(groups) <= set(experts) and total < 1 - 1e-6:
        raise ValueError(
            f"experts: expected weights of 1 together, as every group is named; got {total:g} "
            "(leave one out: it takes the rest)"
        )


def steer(routing: Routing, groups: Sequence[str], experts: Mapping[str, float]) -> Routing:
    """The routing with given inter weights of the named groups, in every block.

    The others are scaled so that all sum to 1, and share equally where the routers gave them
    nothing. Groups of one name share its weight in the same way.
    """
    check_experts(groups, experts)
    if not experts:
        return routing
    inter = torch.empty_like(routing.inter)
    left = max(1 - math.fsum(experts.values()), 0.0)
    shares = [([i for i, g in enumerate(groups) if g == n], w) for n, w in experts.items()]
    shares.append(([i for i, g in enumerate(groups) if g not in experts], left))
    for places, weight in shares:
        own = routing.inter[..., places]
        total = own.sum(-1, keepdim=True)
        even = torch.full_like(own, 1 / max(len(places), 1))
        inter[..., places] = weight * torch.where(total > 0, own / total.clamp(min=1e-30), even)
    return replace(routing, inter=inter)
