"""y[b] = r[b] + Σ_i Σ_s gate_i[b,s]·(x_i[b,s]·W_i[index_i[b,s]]ᵀ + bias_i[index_i[b,s]]).

Both sums of MiM-DiT (arXiv 2603.02710, Eq. 3 and 4) at once: i runs over the groups of experts, s
over the sub-experts that a picture picked in a group; gate is the product of both weights.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def expert_combine_reference(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    index: Sequence[Tensor],
    gate: Sequence[Tensor],
    bias: Sequence[Tensor | None],
    residual: Tensor | None = None,
) -> Tensor:
    """x_i [B,S_i,T,K_i], weight_i [E_i,N,K_i], index_i and gate_i [B,S_i], r [B,T,N] → [B,T,N]."""
    out = residual
    for x_i, weight_i, index_i, gate_i, bias_i in zip(x, weight, index, gate, bias, strict=True):
        y = x_i @ weight_i[index_i].transpose(-1, -2)
        if bias_i is not None:
            y = y + bias_i[index_i].unsqueeze(-2).to(y.dtype)
        mixed = torch.einsum("bs,bstn->btn", gate_i.to(y.dtype), y)
        out = mixed if out is None else out + mixed
    assert out is not None
    return out
