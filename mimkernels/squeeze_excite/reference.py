"""x ⊙ s, s = gate(W2·act(W1·x̄ + b1) + b2), x̄ the mean over the tokens.

Squeeze-and-excitation, Hu et al. (arXiv 1709.01507, Eq. 2 to 4): ReLU and sigmoid. EfficientNet
(arXiv 1905.11946) takes SiLU, MobileNetV3 (arXiv 1905.02244) the hard sigmoid. Experts that a
picture picked scale the same x: out = x ⊙ Σ_j weight_j·s_j.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkernels.autocast import no_autocast

ACTIVATIONS = {"relu": F.relu, "silu": F.silu}
# `F.hardsigmoid` takes 1/6 in float32 for the gradient, whatever the type.
GATES = {"sigmoid": torch.sigmoid, "hardsigmoid": lambda z: F.relu6(z + 3) / 6}


def squeeze_excite_reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    index: Tensor | None = None,
    weight: Tensor | None = None,
    *,
    activation: str = "relu",
    gate: str = "sigmoid",
) -> Tensor:
    """x [B,T,C], w1 [R,C], b1 [R], w2 [C,R], b2 [C] → [B,T,C]; no tokens have a mean of zero.

    With index [B,k] these are banks [E,…], and weight [B,k] is 1 if left out.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    act, squash = ACTIVATIONS[activation], GATES[gate]
    w1, b1, w2, b2 = (v.to(wide) if index is None else v[index].to(wide) for v in (w1, b1, w2, b2))
    # Sums over all tokens: autocast must not round them.
    with no_autocast(x.device.type):
        mean = x.sum(1, dtype=wide) / max(x.shape[1], 1)
        if index is None:
            s = squash(F.linear(act(F.linear(mean, w1, b1)), w2, b2))
        else:
            hidden = act(torch.einsum("bc,bkrc->bkr", mean, w1) + b1)
            s = squash(torch.einsum("bkr,bkcr->bkc", hidden, w2) + b2)
            s = s.sum(1) if weight is None else torch.einsum("bk,bkc->bc", weight.to(wide), s)
        return x * s.unsqueeze(1).to(x.dtype)
