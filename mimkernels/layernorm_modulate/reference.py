"""h_i = LN(x)·(1 + scale_i) + shift_i: adaptive layer normalisation, LN without parameters.

DiT (Peebles and Xie, arXiv 2212.09748, Sec. 3.2), as in the blocks of SD3 (Esser et al., arXiv
2403.03206, Fig. 2); SD3.5-medium's dual-attention blocks take two modulations of one LN(x).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def layernorm_modulate_reference(
    x: Tensor, shift: Sequence[Tensor], scale: Sequence[Tensor], eps: float = 1e-6
) -> tuple[Tensor, ...]:
    """x [B,T,C], shift_i and scale_i [B,C] → h_i [B,T,C] in the type of x."""
    norm = F.layer_norm(x, x.shape[-1:], eps=eps)
    return tuple(
        (norm * (1 + scale_i.unsqueeze(1)) + shift_i.unsqueeze(1)).to(x.dtype)
        for shift_i, scale_i in zip(shift, scale, strict=True)
    )
