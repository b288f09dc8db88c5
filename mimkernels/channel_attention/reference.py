"""A = softmax(τ·q̂ᵀk̂), a c×c matrix of every head, out = v·Aᵀ, and out·W_oᵀ with a projection.

Multi-Dconv head transposed attention, Restormer (arXiv 2111.09881, Eq. 1): q̂ = q/max(‖q‖, 1e-12)
of every channel, the norm taken over the tokens, and likewise k̂. The norms divide the Gram matrix,
not q and k, and the projection multiplies A, not the tokens: P = W_o·blockdiag(A), out = v·Pᵀ.
"""

import torch
from torch import Tensor

from mimkernels.autocast import no_autocast

EPS = 1e-12


def channel_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    proj: Tensor | None = None,
    index: Tensor | None = None,
    *,
    heads: int,
) -> Tensor:
    """q, k, v [B,T,C] or [B,S,T,C], temperature [heads], proj [C,C] → the shape of q.

    With index [B] or [B,S], temperature is a bank [E,heads], and proj [E,C,C].
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    tau = temperature if index is None else temperature[index]
    # Sums over all tokens: autocast must not round them.
    with no_autocast(q.device.type):
        q, k = (x.to(wide).unflatten(-1, (heads, -1)) for x in (q, k))  # [..,T,h,c]
        q_norm, k_norm = (
            torch.linalg.vector_norm(x, dim=-3).clamp_min(EPS) for x in (q, k)
        )  # [..,h,c]
        gram = torch.einsum("...thc,...thd->...hcd", q, k)
        gram = gram / q_norm.unsqueeze(-1) / k_norm.unsqueeze(-2)
        attention = (tau.to(wide)[..., None, None] * gram).softmax(-1).to(v.dtype)
        if proj is None:
            v = v.unflatten(-1, (heads, -1))
            return torch.einsum("...hcd,...thd->...thc", attention, v).flatten(-2)
        weight = proj if index is None else proj[index]
        weight = weight.to(v.dtype).unflatten(-1, (heads, -1))  # [..,C,h,c]
        folded = torch.einsum("...ohc,...hcd->...ohd", weight, attention).flatten(-2)
        return v @ folded.transpose(-1, -2)
