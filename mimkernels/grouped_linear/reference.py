"""y[r] = W[e(r)]·x[r] + b[e(r)]: linear layers of experts on tokens routed one by one.

Row r of the order sorted by expert e(r) is slot permutation[r] = token·k + pick (`topk_route`).
Rows are gathered from tokens or come sorted; results stay sorted or return to their tokens as
y[n] = Σ_j w[n,j]·y[inverse[n,j]] (Shazeer et al., arXiv 1701.06538, Eq. 1).
"""

import torch
from torch import Tensor

from mimkernels.topk_route import Route


def grouped_linear_reference(
    x: Tensor,
    weight: Tensor,
    route: Route,
    bias: Tensor | None = None,
    *,
    gather: bool = True,
    combine: bool = False,
) -> Tensor:
    """x [N,K] or sorted [N·k,K], weight [E,M,K], bias [E,M] → sorted [N·k,M] or [N,M]."""
    tokens, k = route.experts.shape
    if gather:
        x = x[route.permutation // k]
    rows = torch.arange(tokens * k, device=x.device)
    expert = torch.searchsorted(route.offsets.long(), rows, right=True)
    # Every expert sees every row: shapes then depend on no data, and nothing waits for a device.
    out = x.new_zeros(tokens * k, weight.shape[1])
    for e in range(weight.shape[0]):
        y = x @ weight[e].T
        if bias is not None:
            y = y + bias[e].to(y.dtype)
        out = torch.where((expert == e)[:, None], y, out)
    if not combine:
        return out
    slots = out[route.inverse].unflatten(0, (tokens, k))
    return torch.einsum("nk,nkm->nm", route.weights.to(out.dtype), slots)
