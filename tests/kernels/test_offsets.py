"""Arguments that spread over more than 2³¹ elements, which int32 offsets cannot reach."""

import pytest
import torch
from torch import Tensor

from mimkernels import expert_linear
from tests.kernels.calls import NAMES, calls, tensors
from tests.kernels.common import interpreted

REACH = 2**31


@pytest.fixture(scope="module")
def space(tmp_path_factory: pytest.TempPathFactory) -> Tensor:
    """Twice the reach, of a sparse file: only what is written takes memory."""
    file = tmp_path_factory.mktemp("offsets") / "space"
    return torch.from_file(str(file), shared=True, size=2 * REACH + 2**20)


def spread(x: Tensor, space: Tensor, place: int) -> Tensor:
    """A copy whose rows (axis −2) lie so far apart that the last is beyond 2³¹ elements."""
    *front, rows, columns = x.shape
    if rows == 1:
        return x
    stride, strides = -(-REACH // (rows - 1)), [1]
    for size in (columns, *front[:0:-1]) if front else ():
        strides.insert(0, strides[0] * size)
    # It starts in the middle: offsets that wrap around read zeros, and no foreign memory.
    start = REACH + place * 4096
    out = space.as_strided(x.shape, (*strides[:-1], stride, 1), start)
    return out.copy_(x)


@interpreted
@pytest.mark.parametrize("name", NAMES)
def test_rows_far_apart_give_the_same_bits(name: str, space: Tensor) -> None:
    torch.manual_seed(0)
    op, dense = calls("cpu")[name]
    far = [
        spread(x, space, i) if x.is_floating_point() and x.ndim > 1 else x
        for i, x in enumerate(dense)
    ]
    results = []
    for arguments in (dense, far):
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in arguments]
        out = tensors(op(*leaves))
        ends, wanted = ([x for x in some if x.requires_grad] for some in (out, leaves))
        grads = torch.autograd.grad(ends, wanted, [x.detach() for x in ends], allow_unused=True)
        results.append([*out, *(g for g in grads if g is not None)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@interpreted
def test_steps_along_rows_far_apart_give_the_same_bits(space: Tensor) -> None:
    """dx steps along the rows of a weight, 16 at a time: one step is 2³¹ elements."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 3, 4, requires_grad=True), torch.randn(1, 17, 4)
    index = torch.zeros(1, 1, dtype=torch.int32)
    grads = []
    for w in (weight, spread(weight, space, 0)):
        out = expert_linear(x, w, index, backend="triton")
        grads += torch.autograd.grad(out, x, torch.ones_like(out))
    assert torch.equal(*grads)
