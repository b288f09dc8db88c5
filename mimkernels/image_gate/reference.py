"""Routers that read a picture's mean token: one over groups, one over each group's sub-experts.

w = softmax(R·x̄ + c) over the groups, p_g = softmax(R_g·x̄ + c_g) over the sub-experts of group g, of
which the k largest are kept as they are (MiM-DiT, arXiv 2603.02710, Eq. 3 and 4; softmax before
top-k as in Shazeer et al., arXiv 1701.06538, without renormalisation unless asked for).
"""

import torch
from torch import Tensor

from mimkernels.autocast import no_autocast


def image_gate_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    experts: int,
    k: int,
    renormalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """x [L,B,T,C], weight [L,G+G·E,C], bias [L,G+G·E] → inter [L,B,G]; intra, index [L,B,G,k]."""
    wide = torch.promote_types(x.dtype, torch.float32)
    mean = x.to(wide).mean(2)
    return gate_reference(mean, weight, bias, groups, experts, k, renormalize)


def gate_reference(
    mean: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    experts: int,
    k: int,
    renormalize: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the mean tokens [L,B,C]."""
    # Picks are discrete: autocast must not round what they rest on.
    with no_autocast(mean.device.type):
        logits = torch.einsum("lbc,lrc->lbr", mean, weight.to(mean.dtype))
    if bias is not None:
        logits = logits + bias.to(mean.dtype).unsqueeze(1)
    inter = logits[..., :groups].softmax(-1)
    p = logits[..., groups:].unflatten(-1, (groups, experts)).softmax(-1)
    # Stable: equal weights go to the lowest index, which `topk` does not promise.
    value, index = p.sort(dim=-1, descending=True, stable=True)
    value, index = value[..., :k], index[..., :k]
    if renormalize:
        value = value / value.sum(-1, keepdim=True)
    return inter, value, index.int()
