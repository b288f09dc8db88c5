"""One read of x for one or two modulations; backward adds up [B,C] in parts, in order."""

from collections.abc import Sequence

import torch
from torch import Tensor

from mimkernels import jit_rows


def forward(
    x: Tensor, shift: Sequence[Tensor], scale: Sequence[Tensor], eps: float
) -> list[Tensor]:
    """h of each modulation [B,T,C]; shapes as in the reference, one or two modulations."""
    return jit_rows.forward(x, [], list(zip(shift, scale, strict=True)), eps)[1]


def backward(
    x: Tensor, scale: Sequence[Tensor], grad: Sequence[Tensor], eps: float, with_modulation: bool
) -> tuple[Tensor, Tensor]:
    """dx [B,T,C] and, if wanted, sums [2N,B,C]: dshift and dscale of N modulations in turns."""
    pairs = list(zip(grad, scale, strict=True))
    dx, _, sums = jit_rows.backward(x, None, [], pairs, eps, with_modulation)
    return dx, sums


def typical_launches(dtype: torch.dtype) -> None:
    """Every kernel once, on tensors without data, at the sizes of one SD3.5-medium block."""
    x = torch.empty(1, 4096, 1536, dtype=dtype, device="meta")
    chunks = list(x.new_empty(1, 9 * 1536).chunk(9, dim=1))
    for count in (1, 2):
        h = forward(x, chunks[:count], chunks[2 : 2 + count], 1e-6)
        backward(x, chunks[2 : 2 + count], h, 1e-6, with_modulation=True)
