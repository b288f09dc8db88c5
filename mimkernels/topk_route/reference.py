"""Per-token top-k routing, and the order of the (token, pick) rows sorted by expert.

p = softmax(logits), of which the k largest are kept as they are (Switch, arXiv 2101.03961) or
divided by their sum (Mixtral, arXiv 2401.04088); or sigmoid(logits), each for itself (DeepSeek-V3,
arXiv 2412.19437). Row r of the sorted order holds slot permutation[r] = token·k + pick.
"""

import torch
from torch import Tensor

NORMS = ("softmax", "topk", "sigmoid")


def topk_route_reference(
    logits: Tensor, k: int, norm: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """logits [N,E] → weights, index [N,k], counts, offsets [E], permutation, inverse [N·k]."""
    experts = logits.shape[1]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scores = wide.sigmoid() if norm == "sigmoid" else wide.softmax(-1)
    # By the logits, which sigmoid may round to equal scores; stable: ties go to the lowest index.
    index = wide.sort(dim=-1, descending=True, stable=True)[1][:, :k]
    weights = scores.gather(1, index)
    if norm == "topk":
        weights = weights / weights.sum(-1, keepdim=True)
    flat = index.flatten()
    counts = (flat[:, None] == torch.arange(experts, device=flat.device)).sum(0)
    permutation = flat.sort(stable=True)[1]
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(flat), device=flat.device)
    whole = (index, counts, counts.cumsum(0), permutation, inverse)
    return weights, *(part.int() for part in whole)  # pyright: ignore[reportReturnType]
