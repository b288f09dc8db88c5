"""`expert_depthwise3x3` in Triton's interpreter against its reference."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimkernels import expert_depthwise3x3
from mimkernels.expert_depthwise3x3 import expert_depthwise3x3_reference
from mimkernels.explain import recorded, without_data
from tests.kernels.common import (
    DEVICE,
    DTYPES,
    compare,
    interpreted,
    poisoned_memory,
    with_gradients,
)

triton_op = partial(expert_depthwise3x3, backend="triton")


def inputs(
    pictures: int = 2,
    slots: int = 2,
    height: int = 7,
    width: int = 5,
    channels: int = 70,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    return [
        torch.randn(pictures, slots, height, width, channels, generator=g).to(DEVICE, dtype),
        torch.randn(4, channels, 3, 3, generator=g).to(DEVICE, dtype),
        torch.randint(4, (pictures, slots), generator=g).to(DEVICE),
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with poisoned_memory(monkeypatch):
        compare(triton_op, expert_depthwise3x3_reference, inputs(dtype=dtype))


@interpreted
@settings(max_examples=5, deadline=None)
@given(
    pictures=st.integers(0, 2),
    slots=st.integers(1, 2),
    height=st.integers(0, 7),
    width=st.integers(1, 7),
    channels=st.sampled_from([1, 8, 65]),
)
def test_any_shape(pictures: int, slots: int, height: int, width: int, channels: int) -> None:
    args = inputs(pictures, slots, height, width, channels, torch.float64)
    compare(triton_op, expert_depthwise3x3_reference, args)


@interpreted
def test_gradcheck() -> None:
    x, weight, index = inputs(1, 2, 2, 2, 2, torch.float64)
    leaves = [v.requires_grad_() for v in (x, weight)]
    assert torch.autograd.gradcheck(lambda x, weight: triton_op(x, weight, index), leaves)


@interpreted
def test_strided_input_expanded_gradient_and_repeated_runs() -> None:
    x, weight, index = inputs(dtype=torch.float64)
    wide = torch.randn(2, 2, 7, 5, 140, dtype=torch.float64)[..., 70:].requires_grad_()
    grads = [
        torch.autograd.grad(run(wide, weight, index).sum(), wide)[0]
        for run in (triton_op, expert_depthwise3x3_reference)
    ]
    torch.testing.assert_close(*grads)
    first, second = (with_gradients(triton_op, [x, weight, index]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_pictures_of_a_batch_equal_their_single_runs() -> None:
    x, weight, _ = inputs(height=4, width=3, channels=20)
    index = torch.tensor([[0, 3], [2, 0]], device=DEVICE)
    both, grads = with_gradients(triton_op, [x, weight, index])
    for b in (0, 1):
        assert torch.equal(triton_op(x[b : b + 1], weight, index[b : b + 1]), both[b : b + 1])
    # Nobody picked the expert with number 1.
    assert [bool(g.any()) for g in grads[1]] == [True, False, True, True]


def test_pictures_of_millions_of_pixels_fit_into_a_grid() -> None:
    x, weight, index = (without_data(v) for v in inputs(1, 1, 1, 1))
    with recorded("sm_90") as launches:
        triton_op(x.expand(1, 1, 2048, 2048, 70), weight, index)
    # CUDA's limit of the second and the third axis; the first has two billion.
    assert max(launches[0].grid[1:]) <= 65_535


def test_operators_pass_opcheck_and_compile() -> None:
    x, weight, index = inputs()
    ops = torch.ops.mimkernels
    torch.library.opcheck(ops.expert_depthwise3x3.default, (x, weight, index, True))
    torch.library.opcheck(ops.expert_depthwise3x3_backward_weight.default, (x, x, index, 4))
    compiled = torch.compile(triton_op, fullgraph=True, backend="aot_eager")
    found, eager = (with_gradients(run, [x, weight, index]) for run in (compiled, triton_op))
    assert torch.equal(found[0], eager[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], eager[1], strict=True))


@interpreted
def test_bad_arguments() -> None:
    x, weight, index = inputs()
    with pytest.raises(ValueError, match="weight: expected shape"):
        expert_depthwise3x3(x, weight[:, 1:], index)
    with pytest.raises(ValueError, match="index: expected 0 to 3"):
        expert_depthwise3x3(x, weight, index + 4)
    with pytest.raises(ValueError, match="x: expected shape"):
        expert_depthwise3x3(x[0], weight, index)
