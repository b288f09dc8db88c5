"""What all ops promise alike, shown on one small call of each."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from tests.kernels.calls import NAMES, calls, tensors
from tests.kernels.common import DEVICE, interpreted

# The argument's name, what was expected and what came.
SENTENCE = r"^\w+(\.\w+|\[\d+\])?: expected .+, got .+"
names = pytest.mark.parametrize("name", NAMES)
# These take the interpreter long, and show it in their own tests at one size.
LONG = ("window_attention", "channel_attention")
quick_names = pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in LONG else n for n in NAMES]
)


def drawn(name: str) -> tuple[Callable[..., object], list[Tensor]]:
    torch.manual_seed(0)
    return calls(DEVICE)[name]


def takes_index(name: str) -> bool:
    """Whether experts are chosen by an argument, and not by a `Route`."""
    return sum(not x.is_floating_point() for x in calls("cpu")[name][1]) == 1


def spoilt(x: Tensor) -> Iterator[Tensor]:
    """An argument of another type, on another device, and with another last stride."""
    yield x.int() if x.is_floating_point() else x.float()
    yield x.to("meta")
    if x.is_floating_point() and x.shape[-1] > 1:
        yield torch.stack([x, x], dim=-1)[..., 0]


@interpreted
@names
def test_errors_name_the_argument_what_was_expected_and_what_came(name: str) -> None:
    op, good = drawn(name)
    for i, x in enumerate(good):
        for bad in spoilt(x):
            # Alone, a tensor may be on any device that has kernels.
            sentence = (
                "backend: 'triton' cannot run" if len(good) == 1 and bad.is_meta else SENTENCE
            )
            with pytest.raises(ValueError, match=sentence):
                op(*good[:i], bad, *good[i + 1 :])


@interpreted
@pytest.mark.parametrize("by", [3, -1])
@pytest.mark.parametrize("name", [n for n in NAMES if takes_index(n)])
def test_an_expert_that_is_not_there(name: str, by: int) -> None:
    op, good = drawn(name)
    (i,) = (i for i, x in enumerate(good) if not x.is_floating_point())
    with pytest.raises(ValueError, match=r"^index: expected 0 to 2, got -?[0-9]+ to [0-9]+"):
        op(*good[:i], good[i] + by, *good[i + 1 :])


@quick_names
def test_the_same_input_gives_the_same_bits(name: str) -> None:
    """Results, and gradients of two backward passes through one graph."""
    op, arguments = drawn(name)
    runs = []
    for _ in range(2):
        leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in arguments]
        out = tensors(op(*leaves))
        ends = [x for x in out if x.requires_grad]
        grads = [x.detach() for x in ends]
        wanted = [x for x in leaves if x.requires_grad]
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        passes = [torch.autograd.grad(ends, wanted, grads, **options) for _ in range(2)]
        runs += [[*out, *gradients] for gradients in passes]
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


@quick_names
def test_gradients_of_a_sum(name: str) -> None:
    """They have strides of zero."""
    op, arguments = drawn(name)
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in arguments]
    ends = [x for x in tensors(op(*leaves)) if x.requires_grad]
    wanted = [x for x in leaves if x.requires_grad]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    dense = torch.autograd.grad(ends, wanted, [torch.ones_like(x) for x in ends], **options)
    ones = [x.new_ones(()).expand(x.shape) for x in ends]
    expanded = torch.autograd.grad(ends, wanted, ones, **options)
    assert all(torch.equal(a, b) for a, b in zip(expanded, dense, strict=True))


@interpreted
@quick_names
def test_gradients_of_gradients_are_refused(name: str) -> None:
    """Also of a sum's gradient, a constant, as gradient penalties take it."""
    op, arguments = drawn(name)
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in arguments]
    wanted = [x for x in leaves if x.requires_grad]
    total = torch.stack([x.sum() for x in tensors(op(*leaves)) if x.requires_grad]).sum()
    grads = torch.autograd.grad(total, wanted, create_graph=True, allow_unused=True)
    penalty = torch.stack([g.square().sum() for g in grads if g is not None]).sum()
    with pytest.raises(RuntimeError, match="expected 'torch' for gradients of gradients"):
        torch.autograd.grad(penalty, wanted, allow_unused=True)


@interpreted
@quick_names
def test_gradients_inside_autocast_are_those_outside(name: str) -> None:
    op, arguments = drawn(name)
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in arguments]
    wanted = [x for x in leaves if x.requires_grad]
    with torch.autocast("cpu", torch.float16):
        ends = [x for x in tensors(op(*leaves)) if x.requires_grad]
        grads = [x.detach() + 1 for x in ends]
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
        inside = torch.autograd.grad(ends, wanted, grads, **options)
    outside = torch.autograd.grad(ends, wanted, grads, **options)
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))
