"""The case of Swin's window attention."""

from functools import partial

from bench.kernel_cases.base import Case, Draw, Size, grid_of, liger, picks
from mimkernels import window_attention
from mimkernels.costs import cost
from mimkernels.window_attention import window_attention_reference


def window_attention_case(size: Size, draw: Draw) -> Case:
    """The shifted layer: every picture by the tables of its experts.

    The reference rolls, partitions, and calls fused attention with bias and mask, as Swin's do.
    """
    # Heads of 32 channels where the width has them, windows of 8 on grids that have one.
    heads = max(size.channels // 32, 1)
    grid = grid_of(size.tokens)
    window = 8 if min(grid) >= 8 else 2
    qkv = draw(size.pictures, size.slots, *grid, 3 * size.channels)
    table = draw(size.experts, (2 * window - 1) ** 2, heads)
    index, _ = picks(size, draw)
    shape = {"window": window, "heads": heads}
    op = partial(window_attention, **shape, shift=window // 2, backend="triton")
    return Case(
        "window_attention",
        size,
        [qkv, table, index],
        lambda qkv, table, index: op(qkv, table, index=index),
        partial(window_attention_reference, **shape, shift=(window // 2, window // 2)),
        {"liger": liger()},
        cost(window_attention, qkv, table, **shape, shift=window // 2, index=index),
    )
