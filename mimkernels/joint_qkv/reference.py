"""q, k and v of several token streams for one attention, with RMS-normalised queries and keys.

Joint attention of SD3 (Esser et al., arXiv 2403.03206, Sec. 4 and, for the norm, 5.3.2); RMSNorm
x/√(mean(x²) + ε)·w of Zhang and Sennrich (arXiv 1910.07467).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def joint_qkv_reference(
    qkvs: Sequence[Tensor],
    q_norm_weights: Sequence[Tensor | None],
    k_norm_weights: Sequence[Tensor | None],
    heads: int,
    width: int,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """qkvs [B,T_i,3·h·d] or, without queries, [B,T_i,2·h·d]; weights [d] → q, k, v [B,h,ΣT_i,d].

    heads h, width d.
    """
    parts = [
        stream_reference(qkv, q_weight, k_weight, heads, width, eps)
        for qkv, q_weight, k_weight in zip(qkvs, q_norm_weights, k_norm_weights, strict=True)
    ]
    q = torch.cat([q for q, _, _ in parts if q is not None], dim=2)
    return q, torch.cat([k for _, k, _ in parts], dim=2), torch.cat([v for _, _, v in parts], dim=2)


def stream_reference(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    heads: int,
    width: int,
    eps: float,
) -> tuple[Tensor | None, Tensor, Tensor]:
    """q (None without queries), k and v [B,h,T,d] of one stream."""
    x = qkv.unflatten(-1, (qkv.shape[-1] // (heads * width), heads, width))
    *q, k, v = x.permute(2, 0, 3, 1, 4)
    return _rms_norm(q[0], q_weight, eps) if q else None, _rms_norm(k, k_weight, eps), v


def _rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    if weight is None:
        return x
    wide = torch.promote_types(x.dtype, torch.float32)
    rstd = torch.rsqrt(x.to(wide).square().mean(-1, keepdim=True) + eps)
    return ((x * rstd).to(x.dtype) * weight).to(x.dtype)
