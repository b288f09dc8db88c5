"""y[b,j] = x[b,(j)]·W[index[b,j]]ᵀ + bias[index[b,j]]: the linear layer of the experts picked.

The sparse mixture of Shazeer et al. (arXiv 1701.06538), routed by picture.
"""

from torch import Tensor


def expert_linear_reference(
    x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None = None
) -> Tensor:
    """x [B,T,K] (shared by the slots) or [B,k,T,K], weight [E,N,K], index [B,k] → [B,k,T,N]."""
    if x.ndim == 3:
        x = x.unsqueeze(1)
    y = x @ weight[index].transpose(-1, -2)
    return y if bias is None else y + bias[index].unsqueeze(-2).to(y.dtype)
