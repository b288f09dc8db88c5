"""`expert_combine` in Triton's interpreter against its reference."""

from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimkernels import expert_combine
from mimkernels.expert_combine import expert_combine_reference
from tests.kernels.common import (
    DEVICE,
    DTYPES,
    compare,
    interpreted,
    poisoned_memory,
    with_gradients,
)


def inputs(
    groups: int = 2,
    pictures: int = 2,
    tokens: int = 19,
    columns: int = 40,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
) -> list[Tensor]:
    """Flat: x, weight, index, gate (and bias) of each group, then the residual."""
    g = torch.Generator().manual_seed(0)
    flat: list[Tensor] = []
    for i in range(groups):
        slots, inner, experts = 1 + i % 3, 24 + 5 * i, 4
        flat += [
            torch.randn(pictures, slots, tokens, inner, generator=g).to(dtype),
            (torch.randn(experts, columns, inner, generator=g) * inner**-0.5).to(dtype),
            torch.randint(experts, (pictures, slots), generator=g),
            torch.rand(pictures, slots, generator=g).to(dtype),
        ]
        flat += [torch.randn(experts, columns, generator=g).to(dtype)] if bias else []
    flat.append(torch.randn(pictures, tokens, columns, generator=g).to(dtype))
    return [v.to(DEVICE) for v in flat]


def run(op: Any, parts: int, *flat: Tensor) -> Tensor:
    """An op on the flat arguments of `inputs`, `parts` of them a group."""
    groups = [flat[i : i + parts] for i in range(0, len(flat) - 1, parts)]
    x, weight, index, gate, *rest = (list(v) for v in zip(*groups, strict=True))
    bias = rest[0] if rest else [None] * len(groups)
    if op is expert_combine_reference:
        return op(x, weight, index, gate, bias, flat[-1])
    return op(x, weight, index, gate, bias=bias, residual=flat[-1], backend="triton")


triton_op, reference = partial(run, expert_combine, 5), partial(run, expert_combine_reference, 5)


@pytest.mark.parametrize("groups", [1, 2, 4, 5])
def test_forward_and_gradients(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with poisoned_memory(monkeypatch):
        compare(triton_op, reference, inputs(groups))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_number_types(dtype: torch.dtype) -> None:
    compare(triton_op, reference, inputs(dtype=dtype))


def test_no_bias() -> None:
    plain = [partial(run, op, 4) for op in (expert_combine, expert_combine_reference)]
    compare(*plain, inputs(bias=False))


@interpreted
@settings(max_examples=12, deadline=None)
@given(
    groups=st.integers(1, 4),
    pictures=st.integers(0, 2),
    tokens=st.integers(0, 35),
    columns=st.integers(1, 70),
)
def test_any_shape(groups: int, pictures: int, tokens: int, columns: int) -> None:
    compare(triton_op, reference, inputs(groups, pictures, tokens, columns, torch.float64))


@interpreted
def test_gradcheck() -> None:
    g = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 2, 3), (3, 2, 3), (1, 2), (3, 2), (1, 2, 2)]
    leaves = [torch.randn(s, generator=g, dtype=torch.float64).requires_grad_() for s in shapes]
    index = torch.tensor([[2, 0]])

    def call(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return expert_combine(
            x, weight, index, gate, bias=bias, residual=residual, backend="triton"
        )

    assert torch.autograd.gradcheck(call, leaves)


def test_a_batch_equals_its_single_runs_and_runs_repeat() -> None:
    flat = inputs()
    both = triton_op(*flat)
    for b in (0, 1):
        # Weights and biases, with experts first, are shared by the pictures.
        one = [v if i % 5 in (1, 4) and i < 10 else v[b : b + 1] for i, v in enumerate(flat)]
        assert torch.equal(triton_op(*one), both[b : b + 1])
    first, second = (with_gradients(triton_op, flat) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_an_expert_that_nobody_picked_gets_no_gradient() -> None:
    x, weight, _, gate, bias, residual = inputs(1)
    index = torch.tensor([[2], [0]], device=DEVICE)
    _, grads = with_gradients(triton_op, [x, weight, index, gate, bias, residual])
    for grad in (grads[1], grads[3]):
        assert [bool(g.any()) for g in grad] == [True, False, True, False]


def test_operators_pass_opcheck_and_compile() -> None:
    x, weight, index, gate, bias, residual = inputs(1)
    ops = torch.ops.mimkernels
    torch.library.opcheck(
        ops.expert_combine.default, ([x], [weight], [index], [gate], [bias], residual)
    )
    grad = torch.randn_like(residual)
    torch.library.opcheck(ops.expert_combine_backward_input.default, (grad, x, weight, index, gate))
    torch.library.opcheck(
        ops.expert_combine_backward_weight.default, (x, grad, index, gate, 4, True)
    )
    compiled = torch.compile(triton_op, fullgraph=True, backend="aot_eager")
    flat = inputs(2)
    found, eager = with_gradients(compiled, flat), with_gradients(triton_op, flat)
    assert torch.equal(found[0], eager[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], eager[1], strict=True))


@interpreted
def test_bad_arguments() -> None:
    x, weight, index, gate, bias, residual = inputs(1)
    with pytest.raises(ValueError, match="gate: expected 1 groups as x, got 2"):
        expert_combine([x], [weight], [index], [gate, gate])
    with pytest.raises(ValueError, match="gate: expected shape"):
        expert_combine(x, weight, index, gate[:1])
    with pytest.raises(ValueError, match="x: expected \\[B,S,T,K\\]"):
        expert_combine(x[0], weight, index, gate)
    with pytest.raises(ValueError, match="residual: expected shape"):
        expert_combine(x, weight, index, gate, bias=bias, residual=residual[:, 1:])
    with pytest.raises(ValueError, match="x: expected at least one group, got none"):
        expert_combine([], [], [], [])
    # Of several groups the sentence says which.
    two = {"x": [x] * 2, "weight": [weight] * 2, "index": [index] * 2, "gate": [gate] * 2}
    for name, bad, message in (
        ("x", x.double(), r"x\[1\]: expected torch.float32 as x\[0\]"),
        ("weight", weight[:, 1:], r"weight\[1\]: expected shape"),
        ("index", index + 4, r"index\[1\]: expected 0 to 3"),
        ("gate", gate.half(), r"gate\[1\]: expected torch.float32 as x\[1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            expert_combine(**(two | {name: [two[name][0], bad]}))


@interpreted
def test_banks_may_be_slices_and_gradients_expanded() -> None:
    x, _, index, gate, _, _ = (v[0] if isinstance(v, list) else v for v in inputs(1))
    x, gate = x.double(), gate.double()
    bank = torch.randn(4, 2, 12, x.shape[3], dtype=torch.float64)
    biases = torch.randn(4, 2, 12, dtype=torch.float64)
    grads = []
    for backend in ("triton", "torch"):
        leaves = [v.detach().requires_grad_() for v in (x, bank, gate, biases)]
        weight, bias = leaves[1][:, 1], leaves[3][:, 1]
        out = expert_combine(leaves[0], weight, index, leaves[2], bias=bias, backend=backend)
        grads.append([out, *torch.autograd.grad(out.sum(), leaves)])
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected)
