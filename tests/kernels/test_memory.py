"""What window attention allocates on its way to the kernels, counted without a GPU."""

import pytest
import torch

from mimkernels import window_attention
from mimkernels.explain import allocations, recorded

# Grids that the window divides, and that are padded.
GRIDS = [(64, 64), (50, 65), (5, 128)]


def arguments(grid: tuple[int, int], gradients: bool) -> list[torch.Tensor]:
    """qkv of two slots of two pictures, a bank of tables, the padding's values; without data."""
    shapes = [(2, 2, *grid, 1152), (4, 225, 12), (1152,)]
    made = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in shapes)
    return [x.requires_grad_(gradients) for x in made]


def run(qkv: torch.Tensor, table: torch.Tensor, pad_value: torch.Tensor) -> torch.Tensor:
    index = torch.zeros(2, 2, dtype=torch.int64, device="meta")
    return window_attention(
        qkv, table, window=8, heads=12, shift=4, index=index, pad_value=pad_value, backend="triton"
    )


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_forward_allocates_its_output_and_nothing_else(grid: tuple[int, int]) -> None:
    given = arguments(grid, True)
    with allocations() as made, recorded("sm_90"), torch.no_grad():
        out = run(*given)
    # The index is the test's own.
    assert sum(made) == out.numel() * out.element_size() + 2 * 2 * 8
    with allocations() as made, recorded("sm_90"):
        out = run(*given)
    # The backward pass needs a float32 number for each token and head.
    windows = -(-grid[0] // 8) * -(-grid[1] // 8)
    assert sum(made) == out.numel() * out.element_size() + 2 * 2 * 8 + 4 * 4 * 12 * 64 * windows


@pytest.mark.parametrize("grid", GRIDS[:2], ids=str)
def test_backward_allocates_gradients_and_little_else(grid: tuple[int, int]) -> None:
    given = arguments(grid, True)
    with recorded("sm_90"):
        out = run(*given)
    grad = torch.empty_like(out)
    with allocations() as made, recorded("sm_90"):
        found = torch.autograd.grad(out, given, grad)
    results = sum(x.numel() * x.element_size() for x in found)
    assert results < sum(made) < 1.05 * results
