"""`expert_linear` in Triton's interpreter against its reference."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses import FakeTensorMode

from mimkernels import expert_linear, use_backend
from mimkernels.expert_linear import expert_linear_reference
from tests.kernels.common import (
    DEVICE,
    DTYPES,
    compare,
    interpreted,
    poisoned_memory,
    with_gradients,
)

triton_op = partial(expert_linear, backend="triton")


def inputs(
    pictures: int = 2,
    slots: int = 2,
    tokens: int = 19,
    inner: int = 24,
    columns: int = 40,
    experts: int = 4,
    shared: bool = True,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    shape = (pictures, tokens, inner) if shared else (pictures, slots, tokens, inner)
    picks = [torch.randperm(experts, generator=g)[:slots] for _ in range(pictures)]
    index = torch.stack(picks) if pictures else torch.zeros(0, slots, dtype=torch.int64)
    return [
        torch.randn(shape, generator=g).to(DEVICE, dtype),
        (torch.randn(experts, columns, inner, generator=g) * inner**-0.5).to(DEVICE, dtype),
        index.to(DEVICE),
        torch.randn(experts, columns, generator=g).to(DEVICE, dtype),
    ]


@pytest.mark.parametrize("shared", [True, False], ids=["shared x", "x of slots"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(
    shared: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with poisoned_memory(monkeypatch):
        compare(triton_op, expert_linear_reference, inputs(shared=shared, dtype=dtype))


@interpreted
@settings(max_examples=15, deadline=None)
@given(
    pictures=st.integers(0, 3),
    tokens=st.integers(0, 40),
    inner=st.integers(1, 70),
    columns=st.integers(1, 70),
    experts=st.integers(1, 5),
    data=st.data(),
)
def test_any_shape(
    pictures: int, tokens: int, inner: int, columns: int, experts: int, data: st.DataObject
) -> None:
    slots, shared = data.draw(st.integers(1, experts)), data.draw(st.booleans())
    compare(
        triton_op,
        expert_linear_reference,
        inputs(pictures, slots, tokens, inner, columns, experts, shared, torch.float64),
    )


@interpreted
@pytest.mark.parametrize("shared", [True, False])
def test_gradcheck(shared: bool) -> None:
    x, weight, index, bias = inputs(2, 2, 3, 2, 3, 3, shared, torch.float64)
    leaves = [v.requires_grad_() for v in (x, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda x, weight, bias: triton_op(x, weight, index, bias), leaves
    )


@interpreted
def test_strided_input_and_expanded_gradient() -> None:
    x, weight, index, _ = inputs(2, 2, 8, 16, 12, dtype=torch.float64)
    wide = torch.randn(2, 3, 8, 32, dtype=torch.float64)[:, 1, :, :16]
    for v in (wide, x[:1].expand(2, 8, 16), x[:, :1].expand(2, 8, 16)):
        v = v.detach().requires_grad_()
        grads = [
            torch.autograd.grad(run(v, weight, index).sum(), v)[0]
            for run in (triton_op, expert_linear_reference)
        ]
        torch.testing.assert_close(*grads)


@interpreted
def test_an_expert_that_nobody_picked_gets_no_gradient() -> None:
    x, weight, _, bias = inputs(dtype=torch.float64)
    index = torch.tensor([[0, 2], [2, 0]])
    _, (_, dweight, dbias) = with_gradients(triton_op, [x, weight, index, bias])
    assert dweight[[0, 2]].any() and not dweight[[1, 3]].any()
    assert dbias[[0, 2]].any() and not dbias[[1, 3]].any()


def test_a_batch_equals_its_single_runs_and_runs_repeat() -> None:
    x, weight, index, bias = inputs()
    assert not torch.equal(index[0].sort().values, index[1].sort().values)
    both = triton_op(x, weight, index, bias)
    for b in (0, 1):
        one = triton_op(x[b : b + 1], weight, index[b : b + 1], bias)
        assert torch.equal(both[b : b + 1], one)
    first, second = (with_gradients(triton_op, [x, weight, index, bias]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_operators_pass_opcheck() -> None:
    x, weight, index, bias = inputs()
    forward = torch.ops.mimkernels.expert_linear.default
    backward = torch.ops.mimkernels.expert_linear_backward_weight.default
    torch.library.opcheck(forward, (x[:, None], weight, index, bias))
    grad = x.new_zeros(2, 2, 19, 40)
    torch.library.opcheck(backward, (x[:, None], grad, index, 4, True))


def test_compiles_without_graph_breaks() -> None:
    args = inputs()
    compiled = torch.compile(triton_op, fullgraph=True, backend="aot_eager")
    found, grads = with_gradients(compiled, args)
    eager, eager_grads = with_gradients(triton_op, args)
    assert torch.equal(found, eager)
    assert all(torch.equal(a, b) for a, b in zip(grads, eager_grads, strict=True))


def test_autocast_takes_its_type() -> None:
    x, weight, index, bias = inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        found = expert_linear(x, weight, index, bias, backend="torch")
        reference = expert_linear_reference(x, weight, index, bias)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, reference)


@interpreted
def test_bad_arguments() -> None:
    x, weight, index, bias = inputs()
    cases = [
        ((x[0], weight, index), r"x: expected \[B,T,K\]"),
        ((x.int(), weight, index), "x: expected a floating-point type"),
        ((x.transpose(1, 2).contiguous(), weight, index), "weight: expected shape"),
        ((torch.randn(2, 24, 19).transpose(1, 2), weight, index), "x: expected a last stride of 1"),
        ((x, weight[:, :, 1:], index), "weight: expected shape"),
        ((x, weight.double(), index), "weight: expected torch.float32 as x"),
        ((x, weight.to("meta"), index), "weight: expected device cpu as x"),
        ((x, weight, index[:1]), "index: expected shape"),
        ((x, weight, index.float()), "index: expected int32 or int64"),
        ((x, weight, index + 3), "index: expected 0 to 3"),
        ((x, weight, index, bias[:, 1:]), "bias: expected shape"),
    ]
    for args, message in cases:
        with pytest.raises(ValueError, match=message):
            expert_linear(*args)
    with pytest.raises(ValueError, match="backend: expected one of"):
        expert_linear(x, weight, index, backend="cuda")


@interpreted
def test_choice_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, index, _ = inputs()
    # "auto" on the CPU is the reference, bit for bit.
    assert torch.equal(expert_linear(x, weight, index), expert_linear_reference(x, weight, index))
    with use_backend("triton"):
        assert torch.equal(expert_linear(x, weight, index), triton_op(x, weight, index))
    monkeypatch.setattr("mimkernels.backend._default", "cuda")
    with pytest.raises(ValueError, match=r"^MIMKERNELS_BACKEND: expected one of auto, triton"):
        expert_linear(x, weight, index)
    with pytest.raises(ValueError, match="cannot run here, Triton's interpreter has no bfloat16"):
        triton_op(x.bfloat16(), weight.bfloat16(), index)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="cannot run here, the tensors are on the CPU"):
        triton_op(x, weight, index)


@interpreted
def test_tensors_of_a_gpu_that_is_not_there() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(2, 3, 4, device="cuda"), torch.empty(3, 5, 4, device="cuda")
        index = torch.zeros(2, 1, dtype=torch.int32, device="cuda")
        assert expert_linear(x, weight, index).shape == (2, 1, 3, 5)
        with pytest.raises(ValueError, match="cannot run here, there is no GPU"):
            triton_op(x, weight, index)


def test_inputs_without_channels_leave_the_bias() -> None:
    x, weight, index, bias = inputs()
    compare(triton_op, expert_linear_reference, [x[..., :0], weight[..., :0], index, bias])
