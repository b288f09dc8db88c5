"""The routing of an exported graph against the model's, which comes before all else.

Sub-experts may differ only where their weights nearly tie; whatever they decide is then compared
with the reference's choice forced on the graph.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.checks import Check
from export.inputs import different
from export.sessions import AnySession
from mimdit.mim import MiM, Routing

# Where routers' sums round either way, this much of a logit makes the reference's choice clear.
_NUDGE = 1e-2
_TRIES = 3

Graphs = Mapping[str, AnySession]


def forced_routing(
    mim: MiM, graphs: Graphs, z_lq: Tensor, means: Tensor
) -> tuple[Tensor, Routing, dict[str, np.ndarray]]:
    """Means whose routing rounds alike, the reference's routing by them, the graph's outputs.

    Means decide the routing. Where two sub-experts tie, they move a little towards the one that the
    reference takes.
    """
    tries = 0
    while True:
        routing = mim.route(means)
        forced = graphs["conditioner"](z_lq=z_lq, means=means.float())
        tries += 1
        if forced["index"].shape != routing.index.shape or tries == _TRIES:
            return means, routing, forced
        flipped = _flipped(forced["index"], routing)
        if not flipped.any() or float(_margins(mim, means)[flipped].max()) > _NUDGE:
            return means, routing, forced
        order = _all_experts(mim, means).index
        means = means.clone()
        for layer, picture, group in flipped.nonzero().tolist():
            taken, left = order[layer, picture, group, mim.top_k - 1 : mim.top_k + 1].tolist()
            rows = mim.intra_router[layer, group].to(means.dtype)
            apart = rows[taken] - rows[left]
            step = _NUDGE * apart / apart.square().sum().clamp(min=1e-12)
            means[layer, picture, : len(step)] += step


def routing_check(
    name: str,
    at: str,
    mim: MiM,
    means: Tensor,
    routing: Routing,
    index: np.ndarray,
    allowed: float,
    fed: dict[str, Any],
) -> Check:
    """The largest margin, in softmax weight, at which picks differ; 0 where none do."""
    pictures = index.shape[1]
    unlike = f", {different(routing.index)} different routings of {pictures} pictures"
    if index.shape != routing.index.shape:
        return Check("conditioner", name, at, math.nan, allowed, "another number of picks", fed=fed)
    flipped = _flipped(index, routing)  # [L,B,G]
    count = int(flipped.sum())
    if not count:
        note = f"{flipped.numel()} equal picks{unlike if pictures > 1 else ''}"
        return Check("conditioner", name, at, 0.0, allowed, note, fed=fed)
    worst = float(_margins(mim, means)[flipped].max())
    first = int(flipped.nonzero()[0, 0])
    note = f"{count} of {flipped.numel()} picks differ, first in block {first}"
    return Check("conditioner", name, at, worst, allowed, note, fed=fed)


def _flipped(index: np.ndarray, routing: Routing) -> Tensor:
    """Where the sets of sub-experts differ, [L,B,G]."""
    sets = (np.sort(x, axis=-1) for x in (index, routing.index.numpy()))
    return torch.from_numpy(np.any(np.not_equal(*sets), axis=-1))


def _margins(mim: MiM, means: Tensor) -> Tensor:
    """Weight of the last sub-expert taken less that of the first one left, [L,B,G]."""
    weights = _all_experts(mim, means).intra
    # Where all are taken nothing may differ.
    if mim.top_k == mim.experts:
        return torch.full_like(weights[..., 0], math.inf)
    return weights[..., mim.top_k - 1] - weights[..., mim.top_k]


def _all_experts(mim: MiM, means: Tensor) -> Routing:
    """The routing with all sub-experts in order of their weights."""
    k, renormalize = mim.top_k, mim.renormalize
    mim.top_k, mim.renormalize = mim.experts, False
    try:
        return mim.route(means)
    finally:
        mim.top_k, mim.renormalize = k, renormalize
