"""`grouped_linear` in Triton's interpreter against its reference."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimkernels import grouped_linear, topk_route
from mimkernels.grouped_linear import grouped_linear_reference
from mimkernels.topk_route import Route
from tests.kernels.common import (
    DEVICE,
    DTYPES,
    compare,
    interpreted,
    poisoned_memory,
    with_gradients,
)

triton_op = partial(grouped_linear, backend="triton")
USES = [(True, False), (False, True), (True, True), (False, False)]
ids = ["gather", "combine", "gather and combine", "sorted"]


def route_of(tokens: int, experts: int, k: int, seed: int = 0, skew: float = 1.0) -> Route:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=g) * skew
    return topk_route((logits + torch.arange(experts) * (skew - 1)).to(DEVICE), k, norm="topk")


def inputs(
    route: Route,
    gather: bool,
    inner: int = 24,
    columns: int = 40,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """x, weight, bias, and the gate, which stays wide."""
    g = torch.Generator().manual_seed(seed)
    tokens, k = route.experts.shape
    experts, scale = len(route.counts), max(inner, 1) ** -0.5
    wide = torch.promote_types(dtype, torch.float32)
    return [
        torch.randn(tokens if gather else tokens * k, inner, generator=g).to(DEVICE, dtype),
        (torch.randn(experts, columns, inner, generator=g) * scale).to(DEVICE, dtype),
        torch.randn(experts, columns, generator=g).to(DEVICE, dtype),
        route.weights.to(wide),
    ]


def run(op, route: Route, gather: bool, combine: bool, with_bias: bool = True):
    def call(x: Tensor, weight: Tensor, bias: Tensor, gate: Tensor) -> Tensor:
        own = route._replace(weights=gate)
        out = op(x, weight, own, bias if with_bias else None, gather=gather, combine=combine)
        # Uses without a gate or a bias have a gradient of zero for it.
        return out + 0 * (gate.sum() + bias.sum()).to(out.dtype)

    return call


def compare_use(
    route: Route, gather: bool, combine: bool, with_bias: bool = True, **options: object
) -> None:
    found, expected = (
        run(op, route, gather, combine, with_bias) for op in (triton_op, grouped_linear_reference)
    )
    compare(found, expected, inputs(route, gather, **options))


@pytest.mark.parametrize(("gather", "combine"), USES, ids=ids)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(
    gather: bool, combine: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with poisoned_memory(monkeypatch):
        compare_use(route_of(37, 4, 2), gather, combine, dtype=dtype)


@pytest.mark.parametrize(("gather", "combine"), USES, ids=ids)
def test_inputs_without_channels_leave_the_bias(gather: bool, combine: bool) -> None:
    compare_use(route_of(19, 4, 2), gather, combine, inner=0)


@interpreted
@settings(max_examples=15, deadline=None)
@given(
    tokens=st.integers(0, 60),
    experts=st.integers(1, 6),
    inner=st.integers(1, 70),
    columns=st.integers(1, 70),
    use=st.sampled_from(USES),
    with_bias=st.booleans(),
    # The larger, the fewer experts get any token.
    skew=st.sampled_from([1.0, 30.0]),
    data=st.data(),
)
def test_any_shape(
    tokens: int,
    experts: int,
    inner: int,
    columns: int,
    use: tuple[bool, bool],
    with_bias: bool,
    skew: float,
    data: st.DataObject,
) -> None:
    route = route_of(tokens, experts, data.draw(st.integers(1, experts)), skew=skew)
    sizes = {"inner": inner, "columns": columns, "dtype": torch.float64}
    compare_use(route, *use, with_bias=with_bias, **sizes)


@interpreted
@pytest.mark.parametrize(("gather", "combine"), USES, ids=ids)
def test_gradcheck(gather: bool, combine: bool) -> None:
    route = route_of(3, 2, 2)
    leaves = [v.requires_grad_() for v in inputs(route, gather, 2, 3, torch.float64)]
    assert torch.autograd.gradcheck(run(triton_op, route, gather, combine), leaves)


def test_an_mlp_of_experts_equals_each_token_alone() -> None:
    """Routing, both layers and the way back against a loop over tokens that knows no routing."""
    g = torch.Generator().manual_seed(1)
    x, logits = torch.randn(23, 16, generator=g), torch.randn(23, 5, generator=g)
    up, down = torch.randn(5, 32, 16, generator=g), torch.randn(5, 16, 32, generator=g)
    route = topk_route(logits.to(DEVICE), 2, norm="topk", backend="triton")
    hidden = triton_op(x.to(DEVICE), up.to(DEVICE), route).relu()
    found = triton_op(hidden, down.to(DEVICE), route, gather=False, combine=True)
    for n in range(23):
        best = logits[n].topk(2)
        wanted = sum(
            w * (down[e] @ (up[e] @ x[n]).relu())
            for w, e in zip(best.values.softmax(0), best.indices, strict=True)
        )
        torch.testing.assert_close(found[n].cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_runs_repeat() -> None:
    route = route_of(50, 4, 3)
    args = inputs(route, True)
    first, second = (with_gradients(run(triton_op, route, True, True), args) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@interpreted
def test_strided_input_and_expanded_gradient() -> None:
    route = route_of(12, 3, 2)
    x, weight, bias, _ = inputs(route, True, dtype=torch.float64)
    wide = torch.cat([x, x], 1)[:, 8:32]
    for v in (wide, x[:1].expand(12, 24)):
        v = v.detach().requires_grad_()
        grads = [
            torch.autograd.grad(op(v, weight, route, bias, combine=combine).sum(), v)[0]
            for combine in (True, False)
            for op in (triton_op, grouped_linear_reference)
        ]
        torch.testing.assert_close(grads[0], grads[1])
        torch.testing.assert_close(grads[2], grads[3])


def test_operators_pass_opcheck() -> None:
    route, ops = route_of(20, 3, 2), torch.ops.mimkernels
    x, weight, bias, gate = inputs(route, True)
    routed = (route.offsets, route.permutation, 2, True, True)
    torch.library.opcheck(ops.grouped_linear.default, (x, weight, bias, gate, *routed))
    grad = x.new_zeros(20, 40)
    torch.library.opcheck(
        ops.grouped_linear_backward_input.default, (grad, x, weight, gate, *routed)
    )
    torch.library.opcheck(
        ops.grouped_linear_backward_weight.default, (x, grad, gate, *routed, True)
    )


def test_compiles_without_graph_breaks() -> None:
    route = route_of(20, 3, 2)
    args = inputs(route, True)
    plain = run(triton_op, route, True, True)
    compiled = torch.compile(plain, fullgraph=True, backend="aot_eager")
    found, grads = with_gradients(compiled, args)
    eager, eager_grads = with_gradients(plain, args)
    assert torch.equal(found, eager)
    assert all(torch.equal(a, b) for a, b in zip(grads, eager_grads, strict=True))


@interpreted
def test_bad_arguments() -> None:
    route = route_of(6, 3, 2)
    x, weight, bias, _ = inputs(route, True)
    for args, options, message in (
        ((x[:5], weight, route), {}, r"x: expected shape \[6, any\]"),
        ((x, weight, route), {"gather": False}, r"x: expected shape \[12, any\]"),
        ((x.int(), weight, route), {}, "x: expected a floating-point type"),
        ((x, weight[:2], route), {}, r"weight: expected shape \[3, any, 24\]"),
        ((x, weight.double(), route), {}, "weight: expected torch.float32 as x"),
        ((x, weight, route, bias[:, 1:]), {}, "bias: expected shape"),
    ):
        with pytest.raises(ValueError, match=message):
            grouped_linear(*args, **options)
