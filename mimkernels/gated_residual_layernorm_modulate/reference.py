"""x' = x + Σ_j gate_j·y_j and h_i = LN(x')·(1 + scale_i) + shift_i.

The end of one sub-block and the start of the next, in DiT with adaLN-Zero (Peebles and Xie, arXiv
2212.09748, Sec. 3.2) and SD3's blocks (Esser et al., arXiv 2403.03206, Fig. 2).
"""

from collections.abc import Sequence

from torch import Tensor

from mimkernels.layernorm_modulate.reference import layernorm_modulate_reference


def gated_residual_layernorm_modulate_reference(
    x: Tensor,
    y: Sequence[Tensor],
    gate: Sequence[Tensor],
    shift: Sequence[Tensor],
    scale: Sequence[Tensor],
    eps: float = 1e-6,
) -> tuple[Tensor, ...]:
    """x and y_j [B,T,C]; gate_j, shift_i and scale_i [B,C] → x', h_i [B,T,C] in the type of x."""
    dtype = x.dtype
    for y_j, gate_j in zip(y, gate, strict=True):
        x = (x + gate_j.unsqueeze(1) * y_j).to(dtype)
    return x, *layernorm_modulate_reference(x, shift, scale, eps)
