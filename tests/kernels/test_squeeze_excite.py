"""`squeeze_excite` in Triton's interpreter against its reference and torchvision's module."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mimdit.experts import SEExperts
from mimkernels.squeeze_excite import kernel, squeeze_excite, squeeze_excite_reference
from tests.kernels.common import (
    DEVICE,
    DTYPES,
    compare,
    interpreted,
    poisoned_memory,
    with_gradients,
)

INDEX = torch.tensor([[0, 2], [2, 1]], device=DEVICE)
FORMS = [("relu", "sigmoid"), ("silu", "sigmoid"), ("relu", "hardsigmoid")]


def inputs(
    pictures: int = 2,
    tokens: int = 50,
    channels: int = 70,
    hidden: int = 9,
    experts: int | None = None,
    slots: int = 2,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """x, w1, b1, w2, b2, and the slots' weights where these are banks."""
    g = torch.Generator().manual_seed(0)
    bank = () if experts is None else (experts,)
    x = torch.randn(pictures, tokens, channels, generator=g)
    x = x + torch.randn(pictures, 1, channels, generator=g)
    w1, b1, w2, b2 = (
        torch.randn(*bank, *shape, generator=g) * shape[-1] ** -0.5
        for shape in ((hidden, channels), (hidden,), (channels, hidden), (channels,))
    )
    weight = [] if experts is None else [torch.rand(pictures, slots, generator=g)]
    # Steep enough to reach both ends of the hard sigmoid.
    return [v.to(DEVICE, dtype) for v in (x, w1, b1, 4 * w2, b2, *weight)]


def both(activation: str = "relu", gate: str = "sigmoid", index: Tensor | None = None) -> list:
    """The op's kernel and its reference, as functions of what `inputs` gives."""
    form = {"activation": activation, "gate": gate}

    def op(*args: Tensor) -> Tensor:
        weight = args[5] if len(args) > 5 else None
        return squeeze_excite(*args[:5], index=index, weight=weight, backend="triton", **form)

    def reference(*args: Tensor) -> Tensor:
        weight = args[5] if len(args) > 5 else None
        return squeeze_excite_reference(*args[:5], index, weight, **form)

    return [op, reference]


@pytest.mark.parametrize("banked", [False, True], ids=["plain", "banks"])
@pytest.mark.parametrize("form", FORMS, ids=" ".join)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(
    banked: bool, form: tuple[str, str], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with poisoned_memory(monkeypatch):
        args = inputs(experts=3 if banked else None, dtype=dtype)
        compare(*both(*form, INDEX if banked else None), args)


@interpreted
@settings(max_examples=25, deadline=None)
@given(
    pictures=st.integers(0, 3),
    tokens=st.sampled_from([0, 1, 7, 32, 100]),
    channels=st.integers(1, 140),
    hidden=st.integers(1, 40),
    experts=st.sampled_from([None, 1, 3]),
    slots=st.integers(0, 3),
    form=st.sampled_from(FORMS),
    data=st.data(),
)
def test_any_shape(
    pictures: int, tokens: int, channels: int, hidden: int, experts: int | None, slots: int,
    form: tuple[str, str], data: st.DataObject,
) -> None:  # fmt: skip
    args = inputs(pictures, tokens, channels, hidden, experts, slots, torch.float64)
    index = None
    if experts is not None:
        g = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        index = torch.randint(0, experts, (pictures, slots), generator=g)
    (found, grads), (wanted, oracle) = (with_gradients(f, args) for f in both(*form, index))
    for a, b in zip([found, *grads], [wanted, *oracle], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@interpreted
@pytest.mark.parametrize("form", [("relu", "sigmoid"), ("silu", "hardsigmoid")], ids=" ".join)
def test_gradcheck(form: tuple[str, str]) -> None:
    args = inputs(1, 2, 2, 2, experts=2, slots=1, dtype=torch.float64)
    leaves = [v.requires_grad_() for v in args]
    assert torch.autograd.gradcheck(both(*form, torch.tensor([[1]]))[0], leaves)


@interpreted
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("form", [*FORMS, ("silu", "hardsigmoid")], ids=" ".join)
def test_equals_torchvision(form: tuple[str, str], backend: str) -> None:
    ops = pytest.importorskip("torchvision.ops")
    names = {"relu": nn.ReLU, "silu": nn.SiLU, "sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid}
    torch.manual_seed(0)
    module = ops.SqueezeExcitation(24, 6, names[form[0]], names[form[1]])
    bank = [module.fc1.weight.flatten(1), module.fc1.bias]
    bank += [module.fc2.weight.flatten(1), module.fc2.bias]
    for v in bank:
        # Steep enough to reach both ends of the hard sigmoid.
        nn.init.normal_(v)
    planes = torch.randn(2, 24, 5, 7) + torch.randn(2, 24, 1, 1)
    x = planes.flatten(2).mT.contiguous()
    out = squeeze_excite(x, *bank, activation=form[0], gate=form[1], backend=backend)
    wanted = module(planes)
    torch.testing.assert_close(out.mT.unflatten(2, (5, 7)), wanted, rtol=0, atol=1e-5)


@interpreted
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_equals_the_se_experts(backend: str) -> None:
    torch.manual_seed(0)
    experts = SEExperts(1, 3, dim=32, reduction=4).requires_grad_(False)
    for v in experts.parameters():
        nn.init.normal_(v)
    u, gate, index = torch.randn(2, 12, 32) + 1, torch.rand(2, 2), INDEX.cpu()
    wanted, _ = experts(u, u, (3, 4), index, gate, slice(None))
    bank = (experts.fc1_weight, experts.fc1_bias, experts.fc2_weight, experts.fc2_bias)
    out = squeeze_excite(u, *(v[0] for v in bank), index=index, weight=gate, backend=backend)
    torch.testing.assert_close(out, wanted, rtol=0, atol=1e-5)


@interpreted
def test_the_formula_step_by_step(monkeypatch: pytest.MonkeyPatch) -> None:
    # More tokens than one program takes, and more parts than are added at once.
    monkeypatch.setattr(kernel, "_PROGRAMS", 6)
    monkeypatch.setattr(kernel, "_BLOCK", 2048)
    x, w1, b1, w2, b2, weight = inputs(1, 400, 40, 9, experts=3, dtype=torch.float64)
    index = torch.tensor([[2, 0]])
    scale = torch.zeros(40, dtype=torch.float64)
    for e, p in zip(index[0], weight[0], strict=True):
        hidden = torch.clamp(w1[e] @ x[0].mean(0) + b1[e], min=0)
        scale += p / (1 + torch.exp(-(w2[e] @ hidden + b2[e])))
    for f in both(index=index):
        torch.testing.assert_close(f(x, w1, b1, w2, b2, weight)[0], x[0] * scale)
    compare(*both(index=index), [x, w1, b1, w2, b2, weight])


@interpreted
def test_strided_input_and_expanded_gradient() -> None:
    _, *bank = inputs(dtype=torch.float64)
    wide = torch.randn(2, 50, 3, 140, dtype=torch.float64)[:, :, 1, :70]
    # Rows of a larger matrix.
    bank[0] = torch.randn(18, 90, dtype=torch.float64)[::2, :70]
    for v in (wide, wide[:1].expand(2, -1, -1), wide[:, :1].expand(-1, 50, -1)):
        v = v.detach().requires_grad_()
        grads = [torch.autograd.grad(f(v, *bank).sum(), v)[0] for f in both()]
        torch.testing.assert_close(*grads)


def test_left_out_weights_are_one() -> None:
    *args, weight = inputs(experts=3)
    op = partial(squeeze_excite, *args, index=INDEX, backend="triton")
    assert torch.equal(op(), op(weight=torch.ones_like(weight)))


def test_a_batch_equals_its_single_runs_and_runs_repeat() -> None:
    x, *bank, weight = args = inputs(experts=3)
    first, second = (with_gradients(both(index=INDEX)[0], args) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    for b in (0, 1):
        one = both(index=INDEX[b : b + 1])[0](x[b : b + 1], *bank, weight[b : b + 1])
        assert torch.equal(first[0][b : b + 1], one)


@interpreted
def test_an_expert_that_nobody_picked_gets_no_gradient() -> None:
    args = inputs(tokens=5, experts=4, dtype=torch.float64)
    _, grads = with_gradients(both(index=torch.tensor([[3, 0], [0, 3]]))[0], args)
    for grad in grads[1:5]:
        assert grad[[0, 3]].any(dim=-1).all(dim=0).any() and not grad[[1, 2]].any()


def test_not_a_number_stays_in_its_picture() -> None:
    x, *bank = inputs(tokens=5, experts=3)
    x[1, 2, 3] = float("nan")
    out, grads = with_gradients(both("relu", "hardsigmoid", INDEX)[0], [x, *bank])
    assert out[1].isnan().all() and out[0].isfinite().all()
    # The other picture alone picked the expert with number 0.
    for grad in grads[1:5]:
        assert grad[1].isnan().any() and grad[0].isfinite().all()


def test_operators_pass_opcheck() -> None:
    x, *bank, weight = inputs(tokens=5, channels=6, hidden=2, experts=3)
    ops = torch.ops.mimkernels
    torch.library.opcheck(
        ops.squeeze_excite.default, (x, *bank, INDEX, weight, "silu", "hardsigmoid")
    )
    torch.library.opcheck(ops.squeeze_excite_backward_scale.default, (x, x))
    torch.library.opcheck(ops.squeeze_excite_rescale.default, (x, x[:, 0], x[:, 1]))


def test_compiles_without_graph_breaks() -> None:
    args = inputs(tokens=5, channels=6, hidden=2, experts=3)
    op, _ = both(index=INDEX)
    found, grads = with_gradients(torch.compile(op, fullgraph=True, backend="aot_eager"), args)
    eager, eager_grads = with_gradients(op, args)
    assert torch.equal(found, eager)
    assert all(torch.equal(a, b) for a, b in zip(grads, eager_grads, strict=True))


def test_autocast_takes_its_type_and_keeps_wide_sums() -> None:
    args = inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        found = squeeze_excite(*args, backend="torch")
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, squeeze_excite_reference(*(v.bfloat16() for v in args)))


@interpreted
def test_bad_arguments() -> None:
    x, w1, b1, w2, b2 = inputs()
    banks = [v[None] for v in (w1, b1, w2, b2)]
    cases = [
        ((x[0], w1, b1, w2, b2), {}, "x: expected shape"),
        ((x.int(), w1, b1, w2, b2), {}, "x: expected a floating-point type"),
        ((x.mT.contiguous().mT, w1, b1, w2, b2), {}, "x: expected a last stride of 1"),
        ((x, w1[:, 1:], b1, w2, b2), {}, "w1: expected shape"),
        ((x, w1[:0], b1[:0], w2[:, :0], b2), {}, "w1: expected at least 1 hidden channel"),
        ((x, w1, b1[1:], w2, b2), {}, "b1: expected shape"),
        ((x, w1, b1, w2.mT, b2), {}, "w2: expected shape"),
        ((x, w1, b1, w2, b2.half()), {}, "b2: expected torch.float32 as x"),
        ((x, w1, b1, w2, b2), {"activation": "gelu"}, "activation: expected one of relu, silu"),
        ((x, w1, b1, w2, b2), {"gate": "tanh"}, "gate: expected one of sigmoid, hardsigmoid"),
        ((x, w1, b1, w2, b2), {"index": INDEX}, "w1: expected shape"),
        ((x, *banks), {"index": INDEX}, "index: expected 0 to 0, got 0 to 2"),
        ((x, *banks), {"index": INDEX[:1] * 0}, "index: expected shape"),
        ((x, *banks), {"index": INDEX * 0, "weight": b1[None]}, "weight: expected shape"),
        ((x, w1, b1, w2, b2), {"weight": b1}, "index: expected together with weight"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            squeeze_excite(*args, **options)
