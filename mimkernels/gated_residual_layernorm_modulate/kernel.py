"""Branches, residual, LayerNorm and modulation of a row at once, in registers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mimkernels import jit_rows


def forward(
    x: Tensor,
    y: Sequence[Tensor],
    gate: Sequence[Tensor],
    shift: Sequence[Tensor],
    scale: Sequence[Tensor],
    eps: float,
) -> list[Tensor]:
    """x' and h of each modulation [B,T,C]; shapes as in the reference, one or two of each."""
    branches, modulations = zip(y, gate, strict=True), zip(shift, scale, strict=True)
    out, h = jit_rows.forward(x, list(branches), list(modulations), eps)
    return [out, *h]


def backward(
    out: Tensor,
    y: Sequence[Tensor],
    gate: Sequence[Tensor],
    scale: Sequence[Tensor],
    grad: Sequence[Tensor],
    eps: float,
    with_parameters: bool,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """dx and dy_j [B,T,C] and, if wanted, sums [M + 2N,B,C].

    out: x'. grad: gradients of x' and of each h. The sums are dgate of M branches, then dshift and
    dscale of N modulations in turns.
    """
    branches, modulations = zip(y, gate, strict=True), zip(grad[1:], scale, strict=True)
    return jit_rows.backward(out, grad[0], list(branches), list(modulations), eps, with_parameters)


def typical_launches(dtype: torch.dtype) -> None:
    """Every kernel once, on tensors without data, at the sizes of SD3.5-medium's blocks.

    One branch into one modulation or, before a dual-attention block, two; that block's two branches
    into the one of its MLP; and the gradients with frozen modulations.
    """
    x = torch.empty(1, 4096, 1536, dtype=dtype, device="meta")
    chunks = list(x.new_empty(1, 9 * 1536).chunk(9, dim=1))
    for branches, modulations in ((1, 1), (1, 2), (2, 1)):
        y, gate = [x] * branches, chunks[:branches]
        shift, scale = chunks[2 : 2 + modulations], chunks[4 : 4 + modulations]
        grad = forward(x, y, gate, shift, scale, 1e-6)
        backward(x, y, gate, scale, grad, 1e-6, with_parameters=True)
        if branches == modulations:
            backward(x, y, gate, scale, grad, 1e-6, with_parameters=False)
