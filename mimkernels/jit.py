"""Pieces that several kernels share."""

# Triton's functions take tensors and constants of its own kinds.
# pyright: reportArgumentType=false

import triton
import triton.language as tl


@triton.jit
def multiply(
    p_x,
    p_w,
    m_rows,
    m_columns,
    inner,
    stride_x,
    stride_w,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INNER: tl.constexpr,
    PRECISION: tl.constexpr,
    ACCUMULATOR: tl.constexpr,
):
    """x·wᵀ over the inner axis; p_x [ROWS, INNER] and p_w [INNER, COLUMNS] point at its start."""
    acc = tl.zeros([ROWS, COLUMNS], dtype=ACCUMULATOR)
    o_k = tl.arange(0, INNER)
    # Rows of an exchanged weight may lie far apart.
    step = tl.full([], INNER, dtype=tl.int64)
    for start in range(0, inner, INNER):
        m_k = o_k < inner - start
        b_x = tl.load(p_x, mask=m_rows[:, None] & m_k[None, :], other=0.0)  # [ROWS, INNER]
        b_w = tl.load(p_w, mask=m_k[:, None] & m_columns[None, :], other=0.0)  # [INNER, COLUMNS]
        acc = tl.dot(b_x, b_w, acc, input_precision=PRECISION, out_dtype=ACCUMULATOR)
        p_x += step * stride_x
        p_w += step * stride_w
    return acc
