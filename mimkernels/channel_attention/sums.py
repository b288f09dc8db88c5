"""Pieces of the kernels between the passes, forward and backward."""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import triton
import triton.language as tl

# No norm is taken to be less: torch's own default in `F.normalize`.
CLAMP = 1e-12


@triton.jit
def sum_parts(
    p_parts, stride, count, o_in, mask, PARTS: tl.constexpr, ACCUMULATOR: tl.constexpr
):  # fmt: skip
    """Σ over `count` parts, in order, at the places o_in [rows, columns] of each."""
    acc = tl.zeros_like(o_in).to(ACCUMULATOR)
    o_p = tl.arange(0, PARTS)[:, None, None]
    for start in range(0, count, PARTS):
        i_p = start + o_p
        p_some = p_parts + i_p * stride + o_in[None, :, :]
        acc += tl.sum(tl.load(p_some, mask=(i_p < count) & mask[None, :, :], other=0.0), axis=0)
    return acc


@triton.jit
def clamp(norm, EPS: tl.constexpr):
    """max(norm, EPS); not a number stays."""
    return tl.where(norm < EPS, tl.zeros_like(norm) + EPS, norm)
