"""`gated_residual_layernorm_modulate` in Triton's interpreter, its reference, and diffusers."""

from functools import partial
from typing import Any

import pytest
import torch
from diffusers.models.attention import JointTransformerBlock
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimkernels.gated_residual_layernorm_modulate import (
    gated_residual_layernorm_modulate,
    gated_residual_layernorm_modulate_reference,
)
from tests.kernels.common import (
    DEVICE,
    DTYPES,
    compare,
    interpreted,
    poisoned_memory,
    with_gradients,
)

FORMS = [(1, 1), (2, 1), (1, 2), (2, 2)]
forms = pytest.mark.parametrize(
    ("branches", "modulations"), FORMS, ids=[f"{m} to {n}" for m, n in FORMS]
)


def inputs(
    branches: int = 1,
    modulations: int = 1,
    pictures: int = 2,
    tokens: int = 19,
    channels: int = 150,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """x, every y, then gates, shifts and scales, which are chunks of one tensor."""
    g = torch.Generator().manual_seed(0)
    rows = torch.randn(1 + branches, pictures, tokens, channels, generator=g)
    count = branches + 2 * modulations
    chunks = torch.randn(pictures, count * channels, generator=g)
    return [*rows.to(DEVICE, dtype), *chunks.to(DEVICE, dtype).chunk(count, dim=1)]


def split(n: int, flat: tuple[Tensor, ...]) -> list[tuple[Tensor, ...]]:
    """y, gates, shifts and scales."""
    rest = flat[2 * n :]
    return [flat[:n], flat[n : 2 * n], rest[: len(rest) // 2], rest[len(rest) // 2 :]]


def run(n: int, x: Tensor, *flat: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The op with `n` branches on the flat arguments of `inputs`."""
    names = (("y", "y2"), ("gate", "gate2"), ("shift", "shift2"), ("scale", "scale2"))
    named = {
        name: v
        for both, some in zip(names, split(n, flat), strict=True)
        for name, v in zip(both, some, strict=False)
    }
    return gated_residual_layernorm_modulate(x, **named, **{"backend": "triton", **options})


def stacked(n: int, *flat: Tensor, **options: Any) -> Tensor:
    return torch.stack(run(n, *flat, **options))


def reference(n: int, x: Tensor, *flat: Tensor, eps: float = 1e-6) -> Tensor:
    return torch.stack(gated_residual_layernorm_modulate_reference(x, *split(n, flat), eps))


@forms
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(
    dtype: torch.dtype, branches: int, modulations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with poisoned_memory(monkeypatch):
        runs = (partial(op, branches) for op in (stacked, reference))
        compare(*runs, inputs(branches, modulations, dtype=dtype))


@pytest.mark.parametrize("channels", [256, 1536, 2432])
def test_widths_of_models(channels: int) -> None:
    compare(partial(stacked, 2), partial(reference, 2), inputs(2, 1, 2, 2, channels))


@forms
def test_programs_that_sum_many_tokens(
    branches: int, modulations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Three programs a picture of four, four and two tiles, the last of them in part.
    monkeypatch.setattr("mimkernels.jit_rows.PROGRAMS", 6)
    runs = (partial(op, branches) for op in (stacked, reference))
    compare(*runs, inputs(branches, modulations, tokens=75))


@interpreted
@settings(max_examples=15, deadline=None)
@given(
    form=st.sampled_from(FORMS),
    pictures=st.integers(0, 3),
    tokens=st.integers(0, 40),
    channels=st.integers(1, 300),
)
def test_any_shape(form: tuple[int, int], pictures: int, tokens: int, channels: int) -> None:
    # Two normalised channels are ±1 but for eps: gradients vanish with it. Kernels take a float32.
    runs = (partial(op, form[0], eps=0.125) for op in (stacked, reference))
    compare(*runs, inputs(*form, pictures, tokens, channels, torch.float64))


@interpreted
@pytest.mark.parametrize(("branches", "modulations"), [(1, 1), (2, 2)])
def test_gradcheck(branches: int, modulations: int) -> None:
    args = inputs(branches, modulations, 1, 2, 3, torch.float64)
    leaves = [v.detach().requires_grad_() for v in args]
    assert torch.autograd.gradcheck(partial(run, branches), leaves)


def test_normalises_what_it_returns() -> None:
    x, y, gate, shift, scale = inputs(dtype=torch.float16)
    out, h = run(1, x, y, gate, shift, scale)
    doubles = (v.double() for v in (out, shift, scale))
    exact = torch.nn.functional.layer_norm(next(doubles), (150,), eps=1e-6)
    shift64, scale64 = doubles
    wanted = exact * (1 + scale64[:, None]) + shift64[:, None]
    # Half a unit in the last place, and float32's own errors.
    assert ((h - wanted).abs() <= wanted.abs() * 2**-11 + 2e-6).all()


@interpreted
@pytest.mark.parametrize("frozen", [(), (0,), (1,), (2, 3, 4)], ids=["none", "x", "y", "rest"])
def test_strided_input_expanded_gradient_and_frozen_inputs(frozen: tuple[int, ...]) -> None:
    x, y, *rest = inputs(dtype=torch.float64)
    wide = torch.randn(2, 3, 19, 200, dtype=torch.float64)[:, 1, :, 50:]
    for v, w in ((wide, y), (x, wide), (y[:, :1].expand(2, 19, 150), x)):
        results = []
        for op in (stacked, reference):
            args = enumerate([v, w, *rest])
            leaves = [a.detach().requires_grad_(i not in frozen) for i, a in args]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            results.append(torch.autograd.grad(op(1, *leaves)[1].sum(), wanted))
        torch.testing.assert_close(*results)


def test_each_output_alone_has_its_gradient() -> None:
    args = inputs(2, 2)
    for i in range(3):
        results = []
        for op in (partial(run, 2), partial(reference, 2)):
            leaves = [v.detach().requires_grad_() for v in args]
            loss = op(*leaves)[i].square().sum()
            some = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
            results.append(some)
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_a_batch_equals_its_single_runs_and_runs_repeat() -> None:
    args = inputs(2, 2)
    both = stacked(2, *args)
    for b in (0, 1):
        assert torch.equal(stacked(2, *(v[b : b + 1] for v in args)), both[:, b : b + 1])
    first, second = (with_gradients(partial(stacked, 2), args) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_types_may_differ_and_gates_of_one_row_serve_all(backend: str) -> None:
    args = inputs(2, 2)
    op = partial(stacked, 2, backend=backend)
    halves = [args[0], *(v.half() for v in args[1:3]), *(v[:1].half() for v in args[3:])]
    out, grads = with_gradients(op, halves)
    assert out.dtype == torch.float32
    assert [(v.dtype, v.shape) for v in grads] == [(v.dtype, v.shape) for v in halves]


@pytest.mark.parametrize("with_parameters", [True, False])
def test_operators_pass_opcheck(with_parameters: bool) -> None:
    x, *flat = inputs(2, 2)
    y, gate, shift, scale = (list(v) for v in split(2, tuple(flat)))
    ops = torch.ops.mimkernels
    forward = ops.gated_residual_layernorm_modulate.default
    torch.library.opcheck(forward, (x, y, gate, shift, scale, 1e-6))
    args = (x, y, gate, scale, [torch.randn_like(x) for _ in range(3)], 1e-6, with_parameters)
    torch.library.opcheck(ops.gated_residual_layernorm_modulate_backward.default, args)


@forms
def test_compiles_without_graph_breaks(branches: int, modulations: int) -> None:
    args, op = inputs(branches, modulations), partial(stacked, branches)
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    found, eager = with_gradients(compiled, args), with_gradients(op, args)
    assert torch.equal(found[0], eager[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], eager[1], strict=True))


@interpreted
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("dual", [False, True], ids=["plain", "dual"])
def test_closes_the_attention_of_diffusers_block(dual: bool, backend: str) -> None:
    torch.manual_seed(0)
    block = JointTransformerBlock(32, 2, 16, qk_norm="rms_norm", use_dual_attention=dual)
    seen: list[Tensor] = []
    block.norm2.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.ff.register_forward_pre_hook(lambda _, args: seen.append(args[0]))

    def theirs(x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        seen.clear()
        block(x, text, temb)
        return torch.stack(seen)

    def ours(x: Tensor, text: Tensor, temb: Tensor) -> Tensor:
        h, gate, shift, scale, _, *second = block.norm1(x, emb=temb)
        y, _ = block.attn(h, block.norm1_context(text, emb=temb)[0])
        others = {"y2": block.attn2(second[0]), "gate2": second[1]} if dual else {}
        out = gated_residual_layernorm_modulate(x, y, gate, shift, scale, **others, backend=backend)
        return torch.stack(out)

    args = [torch.randn(2, 9, 32) * 2, torch.randn(2, 5, 32), torch.randn(2, 32)]
    found, wanted = with_gradients(ours, args), with_gradients(theirs, args)
    for a, b in zip((*found[0], *found[1]), (*wanted[0], *wanted[1]), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@interpreted
def test_bad_arguments() -> None:
    x, y, gate, shift, scale = inputs()
    good = (x, y, gate, shift, scale)
    cases: list[tuple[tuple[Tensor, ...], dict[str, Any], str]] = [
        ((x[0], *good[1:]), {}, r"x: expected shape \[any, any, any\]"),
        ((x, y[:, 1:], *good[2:]), {}, r"y: expected shape \[2, 19, 150\]"),
        ((x, y.int(), *good[2:]), {}, "y: expected a floating-point type"),
        ((x, y.to("meta"), *good[2:]), {}, "y: expected device cpu as x"),
        ((x, y.mT.contiguous().mT, *good[2:]), {}, "y: expected a last stride of 1"),
        ((x, y, gate[0], shift, scale), {}, r"gate: expected shape \[2, 150\]"),
        ((x, y, gate, shift, scale[:, 1:]), {}, r"scale: expected shape \[2, 150\]"),
        (good, {"y2": y}, "gate2: expected together with y2, got None"),
        (good, {"gate2": gate}, "y2: expected together with gate2, got None"),
        (good, {"scale2": scale}, "shift2: expected together with scale2, got None"),
        (good, {"y2": y[:1], "gate2": gate}, "y2: expected shape"),
        (good, {"eps": -1.0}, "eps: expected a positive number"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            gated_residual_layernorm_modulate(*args, **options)
