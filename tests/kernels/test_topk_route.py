"""`topk_route` in Triton's interpreter against its reference."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimkernels import topk_route
from mimkernels.backend import noting_launches
from mimkernels.topk_route import topk_route_reference
from mimkernels.topk_route.reference import NORMS
from tests.kernels.common import DEVICE, DTYPES, compare, interpreted, poisoned_memory

triton_op = partial(topk_route, backend="triton")


def logits(tokens: int, experts: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=g).to(DEVICE, dtype)


def assert_same_places(x: Tensor, k: int, norm: str) -> None:
    found, expected = triton_op(x, k, norm=norm), topk_route_reference(x, k, norm)
    for name, a, b in zip(found._fields[1:], found[1:], expected[1:], strict=True):
        assert a.dtype == torch.int32
        assert torch.equal(a, b), name


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(
    norm: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = logits(150, 6, dtype)
    with poisoned_memory(monkeypatch):
        compare(
            lambda x: triton_op(x, 2, norm=norm).weights,
            lambda x: topk_route_reference(x, 2, norm)[0],
            [x],
        )
        assert_same_places(x, 2, norm)


@interpreted
@settings(max_examples=12, deadline=None)
@given(
    tokens=st.integers(0, 300),
    experts=st.integers(1, 70),
    norm=st.sampled_from(NORMS),
    data=st.data(),
)
def test_any_shape(tokens: int, experts: int, norm: str, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, min(experts, 4)))
    x = logits(tokens, experts, torch.float64)
    # Many ties, and experts that nobody picks.
    x = data.draw(st.sampled_from([x, x.round(), torch.zeros_like(x)]))
    assert_same_places(x, k, norm)
    found, expected = triton_op(x, k, norm=norm), topk_route_reference(x, k, norm)
    torch.testing.assert_close(found.weights, expected[0], rtol=1e-12, atol=1e-14)


def test_rows_are_sorted_by_expert_and_then_by_slot() -> None:
    route = triton_op(logits(200, 5), 3)
    order = route.experts.flatten()[route.permutation.long()]
    assert (order.diff() >= 0).all()
    same = order.diff() == 0
    assert (route.permutation.diff()[same] > 0).all()
    assert torch.equal(route.inverse[route.permutation.long()].cpu(), torch.arange(600).int())
    assert torch.equal(route.counts.cumsum(0).int(), route.offsets)
    assert route.offsets[-1] == 600


@interpreted
@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm: str) -> None:
    x = logits(4, 5, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: triton_op(x, 2, norm=norm).weights, [x])


def test_impossible_and_broken_logits() -> None:
    x = logits(3, 4)
    x[0, 1:] = float("-inf")
    x[1, 2] = float("nan")
    route = triton_op(x, 2)
    # Experts that are ruled out are picked in order, with no weight.
    assert route.experts[0].tolist() == [0, 1] and route.weights[0].tolist() == [1, 0]
    assert route.weights[1].isnan().all() and not route.weights[2].isnan().any()
    assert ((route.experts >= 0) & (route.experts < 4)).all()


def test_more_experts_than_the_kernel_takes() -> None:
    x = logits(3, 1025)
    # As on a GPU, where "auto" takes the kernel.
    with noting_launches():
        found = topk_route(x, 2)
    wanted = topk_route_reference(x, 2, "softmax")
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    with pytest.raises(ValueError, match=r"cannot run here, .* at most 1024 experts, got 1025"):
        triton_op(x, 2)


def test_runs_repeat() -> None:
    x = logits(300, 8)
    assert all(torch.equal(a, b) for a, b in zip(triton_op(x, 2), triton_op(x, 2), strict=True))


@interpreted
def test_strided_input_and_expanded_gradient() -> None:
    x = logits(20, 12, torch.float64)[::2, 3:9].requires_grad_()
    grads = [
        torch.autograd.grad(run(x).sum(), x)[0]
        for run in (
            lambda x: triton_op(x, 2).weights,
            lambda x: topk_route_reference(x, 2, "softmax")[0],
        )
    ]
    torch.testing.assert_close(*grads)


def test_operators_pass_opcheck() -> None:
    x, ops = logits(40, 6), torch.ops.mimkernels
    torch.library.opcheck(ops.topk_route.default, (x, 2, "softmax"))
    weights, index, *_ = topk_route_reference(x, 2, "softmax")
    torch.library.opcheck(ops.topk_route_backward.default, (x, weights, index, weights, "softmax"))


def test_compiles_without_graph_breaks() -> None:
    x = logits(40, 6)
    compiled = torch.compile(lambda x: triton_op(x, 2), fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(x), triton_op(x, 2), strict=True))


@interpreted
def test_bad_arguments() -> None:
    x = logits(4, 3)
    for call, message in (
        (lambda: topk_route(x[0], 1), r"logits: expected shape \[N, E\]"),
        (lambda: topk_route(x.int(), 1), "logits: expected a floating-point type"),
        (lambda: topk_route(logits(3, 4).T, 1), "logits: expected a last stride of 1"),
        (lambda: topk_route(x, 4), r"k: expected 1 to 3 \(the experts\), got 4"),
        (lambda: topk_route(x, 1, norm="max"), "norm: expected one of softmax, topk, sigmoid"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
