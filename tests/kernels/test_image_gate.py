"""`image_gate` in Triton's interpreter against its reference."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimkernels import image_gate
from mimkernels.image_gate import image_gate_reference
from tests.kernels.common import (
    DEVICE,
    DTYPES,
    FLOOR,
    interpreted,
    poisoned_memory,
)

triton_gate = partial(image_gate, backend="triton")


def inputs(
    layers: int = 3,
    pictures: int = 2,
    tokens: int = 77,
    channels: int = 70,
    groups: int = 4,
    experts: int = 4,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    g = torch.Generator().manual_seed(0)
    routers = groups + groups * experts
    shift = torch.randn(layers, pictures, 1, channels, generator=g)
    x = torch.randn(layers, pictures, tokens, channels, generator=g) + shift
    weight = torch.randn(layers, routers, channels, generator=g) * 0.2
    bias = torch.randn(layers, routers, generator=g)
    return [v.to(DEVICE, dtype) for v in (x, weight, bias)]


def check(args: list[Tensor], groups: int, experts: int, k: int, renormalize: bool) -> None:
    """Values, picks and gradients against float64."""
    leaves = [v.detach().requires_grad_() for v in args]
    exact = [v.detach().double().requires_grad_() for v in args]
    options = {"groups": groups, "experts": experts, "k": k, "renormalize": renormalize}
    inter, intra, index = triton_gate(*leaves, **options)
    wanted = image_gate_reference(*exact, **options)
    floor = max(FLOOR[inter.dtype] * 10, 1e-12)
    torch.testing.assert_close(inter.double(), wanted[0], rtol=0, atol=floor)
    torch.testing.assert_close(intra.double(), wanted[1], rtol=0, atol=floor)
    assert torch.equal(index, wanted[2])
    g = torch.Generator().manual_seed(1)
    outer = [torch.randn(v.shape, generator=g, dtype=torch.float64).to(v) for v in wanted[:2]]
    found = torch.autograd.grad([inter, intra], leaves, [v.to(inter.dtype) for v in outer])
    oracle = torch.autograd.grad(wanted[:2], exact, outer)
    for a, b in zip(found, oracle, strict=True):
        # One renormalised pick has no gradient: what is left of it is rounding, not a scale.
        scale = b.abs().max().clamp(min=1e-3) if b.numel() else 1.0
        error = ((a.double() - b).abs() / scale).max() if b.numel() else torch.zeros(())
        assert error <= max(10 * FLOOR[a.dtype], 1e-10)


@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(
    dtype: torch.dtype, renormalize: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with poisoned_memory(monkeypatch):
        check(inputs(dtype=dtype), 4, 4, 2, renormalize)


@interpreted
@settings(max_examples=12, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(0, 3), st.integers(1, 70), st.integers(1, 140)),
    groups=st.integers(1, 5),
    experts=st.integers(1, 6),
    renormalize=st.booleans(),
    data=st.data(),
)
def test_any_shape(
    sizes: tuple, groups: int, experts: int, renormalize: bool, data: st.DataObject
) -> None:
    k = data.draw(st.integers(1, experts))
    check(inputs(*sizes, groups, experts, torch.float64), groups, experts, k, renormalize)


@interpreted
@pytest.mark.parametrize("renormalize", [False, True])
def test_gradcheck(renormalize: bool) -> None:
    leaves = [v.requires_grad_() for v in inputs(1, 1, 2, 2, 1, 3, torch.float64)]
    options = {"groups": 1, "experts": 3, "k": 2, "renormalize": renormalize}
    assert torch.autograd.gradcheck(lambda *args: triton_gate(*args, **options)[:2], leaves)


def test_pictures_of_a_batch_pick_as_they_do_alone() -> None:
    x, weight, bias = inputs(2, 2, 9, 16)
    options = {"groups": 4, "experts": 4, "k": 2}
    both = triton_gate(x, weight, bias, **options)
    assert not torch.equal(both[2][:, 0], both[2][:, 1])
    for b in (0, 1):
        one = triton_gate(x[:, b : b + 1], weight, bias, **options)
        assert all(torch.equal(a[:, b : b + 1], o) for a, o in zip(both, one, strict=True))


def test_ties_go_to_the_lowest_index() -> None:
    x = torch.randn(2, 5, 8, device=DEVICE)
    weight = x.new_zeros(4 + 16, 8)
    inter, intra, index = triton_gate(x, weight, groups=4, experts=4, k=3)
    assert torch.equal(index.cpu(), torch.tensor([0, 1, 2], dtype=torch.int32).expand(2, 4, 3))
    assert (inter == 0.25).all() and (intra == 0.25).all()


def test_not_a_number_is_not_hidden() -> None:
    x, weight, bias = inputs()
    x[1, 0, 3, 5] = float("nan")
    options = {"groups": 4, "experts": 4, "k": 2}
    for backend in ("triton", "torch"):
        inter, intra, index = image_gate(x, weight, bias, **options, backend=backend)
        assert index.min() >= 0 and index.max() < 4
        assert inter[1, 0].isnan().all() and intra[1, 0].isnan().all()
        assert inter[0].isfinite().all() and intra[2].isfinite().all()


@pytest.mark.parametrize("experts", [1, 3])
def test_picks_stay_in_range_whatever_the_logits(experts: int) -> None:
    x, weight, bias = inputs(groups=4, experts=experts)
    bias[0, 5], bias[1] = float("inf"), float("nan")
    _, _, index = triton_gate(x, weight, bias, groups=4, experts=experts, k=experts)
    assert index.min() >= 0 and index.max() < experts


@pytest.mark.parametrize("renormalize", [False, True])
def test_an_expert_that_its_bias_rules_out(renormalize: bool) -> None:
    x, weight, bias = inputs()
    # One of the groups, and one of a group's experts, which is picked last and weighs nothing.
    bias[0, 2], bias[:, 4 + 1] = float("-inf"), float("-inf")
    check([x, weight, bias], 4, 4, 4, renormalize)
    options = {"groups": 4, "experts": 4, "k": 4, "renormalize": renormalize}
    inter, intra, index = triton_gate(x, weight, bias, **options)
    assert (inter[0, :, 2] == 0).all() and (inter[1:] > 0).all()
    assert (index[:, :, 0, 3] == 1).all() and (intra[:, :, 0, 3] == 0).all()
    # Softmax has no answer where all are ruled out.
    bias[1, 4:8] = float("-inf")
    for backend in ("triton", "torch"):
        _, intra, index = image_gate(x, weight, bias, **options, backend=backend)
        assert intra[1, :, 0].isnan().all() and intra[1, :, 1:].isfinite().all()
        assert index.min() >= 0 and index.max() < 4


def test_one_layer_needs_no_layer_axis() -> None:
    x, weight, bias = inputs()
    options = {"groups": 4, "experts": 4, "k": 2}
    whole = triton_gate(x, weight, bias, **options)
    one = triton_gate(x[1], weight[1], bias[1], **options)
    assert all(torch.equal(a[1], b) for a, b in zip(whole, one, strict=True))
    wide = torch.randn(3, 2, 77, 140, device=DEVICE)[..., :70]
    strided = triton_gate(wide, weight, bias, **options)
    dense = triton_gate(wide.contiguous(), weight, bias, **options)
    assert all(torch.equal(a, b) for a, b in zip(strided, dense, strict=True))


def test_operator_passes_opcheck_and_compiles() -> None:
    args = inputs()
    torch.library.opcheck(torch.ops.mimkernels.image_gate.default, (*args, 4, 4, 2, False))

    def gate(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        inter, intra, index = triton_gate(x, weight, bias, groups=4, experts=4, k=2)
        return (inter.unsqueeze(-1) * intra * index).sum()

    compiled = torch.compile(gate, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (gate, compiled):
        leaves = [v.detach().requires_grad_() for v in args]
        grads.append(torch.autograd.grad(run(*leaves), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@interpreted
def test_bad_arguments() -> None:
    x, weight, bias = inputs()
    options = {"groups": 4, "experts": 4, "k": 2}
    with pytest.raises(ValueError, match="k: expected 1 to 4"):
        image_gate(x, weight, bias, groups=4, experts=4, k=5)
    with pytest.raises(ValueError, match="groups: expected 1 or more, got -1"):
        image_gate(x, weight, bias, groups=-1, experts=4, k=2)
    with pytest.raises(ValueError, match="weight: expected shape"):
        image_gate(x, weight[:, 1:], bias, **options)
    with pytest.raises(ValueError, match="with tokens"):
        image_gate(x[:, :, :0], weight, bias, **options)
    with pytest.raises(ValueError, match="bias: expected shape"):
        image_gate(x, weight, bias[:1], **options)
