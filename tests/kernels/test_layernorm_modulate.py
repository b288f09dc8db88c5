"""`layernorm_modulate` in Triton's interpreter against its reference and diffusers."""

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.normalization import AdaLayerNormZero, SD35AdaLayerNormZeroX
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from mimkernels.layernorm_modulate import layernorm_modulate, layernorm_modulate_reference
from tests.kernels.common import (
    DEVICE,
    DTYPES,
    compare,
    interpreted,
    poisoned_memory,
    with_gradients,
)


def inputs(
    pictures: int = 2,
    tokens: int = 19,
    channels: int = 150,
    modulations: int = 1,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """x, then shift and scale of each modulation: chunks of one tensor."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(pictures, tokens, channels, generator=g) * 2 + 0.5
    chunks = torch.randn(pictures, 2 * modulations * channels, generator=g)
    return [x.to(DEVICE, dtype), *chunks.to(DEVICE, dtype).chunk(2 * modulations, dim=1)]


def stacked(x: Tensor, *flat: Tensor, **options: Any) -> Tensor:
    h = layernorm_modulate(x, *flat, **{"backend": "triton", **options})
    return torch.stack([h] if isinstance(h, Tensor) else list(h))


def reference(x: Tensor, *flat: Tensor, eps: float = 1e-6) -> Tensor:
    return torch.stack(layernorm_modulate_reference(x, flat[::2], flat[1::2], eps))


@pytest.mark.parametrize("modulations", [1, 2], ids=["one", "dual"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(
    dtype: torch.dtype, modulations: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    with poisoned_memory(monkeypatch):
        compare(stacked, reference, inputs(modulations=modulations, dtype=dtype))


@pytest.mark.parametrize("channels", [256, 1536, 2432, 5000])
def test_widths_of_models(channels: int) -> None:
    compare(stacked, reference, inputs(2, 2, channels))


@pytest.mark.parametrize("modulations", [1, 2], ids=["one", "dual"])
def test_programs_that_sum_many_tokens(modulations: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Three programs a picture of four, four and two tiles, the last of them in part.
    monkeypatch.setattr("mimkernels.jit_rows.PROGRAMS", 6)
    compare(stacked, reference, inputs(tokens=75, modulations=modulations))


@interpreted
@settings(max_examples=15, deadline=None)
@given(
    pictures=st.integers(0, 3),
    tokens=st.integers(0, 40),
    channels=st.integers(1, 300),
    modulations=st.integers(1, 2),
)
def test_any_shape(pictures: int, tokens: int, channels: int, modulations: int) -> None:
    # Two normalised channels are ±1 but for eps: gradients vanish with it. Kernels take a float32.
    runs = (partial(run, eps=0.125) for run in (stacked, reference))
    compare(*runs, inputs(pictures, tokens, channels, modulations, torch.float64))


@interpreted
@pytest.mark.parametrize("modulations", [1, 2], ids=["one", "dual"])
def test_gradcheck(modulations: int) -> None:
    leaves = [v.detach().requires_grad_() for v in inputs(2, 2, 3, modulations, torch.float64)]
    assert torch.autograd.gradcheck(stacked, leaves)


@interpreted
@pytest.mark.parametrize("frozen", [(), (0,), (1, 2)], ids=["none", "x", "modulation"])
def test_strided_input_expanded_gradient_and_frozen_inputs(frozen: tuple[int, ...]) -> None:
    x, shift, scale = inputs(dtype=torch.float64)
    wide = torch.randn(2, 3, 19, 200, dtype=torch.float64)[:, 1, :, 50:]
    for v in (wide, x.transpose(0, 1), x[:, :1].expand(2, 19, 150)):
        rows = v.shape[0]
        args = [v, *(m[:1].expand(rows, -1) for m in (shift, scale))]
        results = []
        for run in (stacked, reference):
            leaves = [a.detach().requires_grad_(i not in frozen) for i, a in enumerate(args)]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            results.append(torch.autograd.grad(run(*leaves)[0].sum(), wanted))
        torch.testing.assert_close(*results)


def test_one_modulation_for_all_pictures() -> None:
    x, shift, scale = inputs()
    for backend in ("triton", "torch"):
        run = partial(stacked, backend=backend)
        found, grads = with_gradients(run, [x, shift[:1], scale[:1]])
        repeated = (m[:1].expand(2, -1) for m in (shift, scale))
        wanted, whole = with_gradients(run, [x, *repeated])
        assert torch.equal(found, wanted)
        for a, b in zip(grads[1:], whole[1:], strict=True):
            torch.testing.assert_close(a, b.sum(0, keepdim=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_modulations_may_have_another_type(backend: str) -> None:
    x, *flat = inputs(modulations=2)
    # Few digits, so that 1 + scale is exact in half precision, too.
    halves = [(v * 128).round().half() / 128 for v in flat]
    run = partial(stacked, backend=backend)
    found, grads = with_gradients(run, [x, *halves])
    wanted, whole = with_gradients(run, [x, *(v.float() for v in halves)])
    assert [v.dtype for v in grads] == [torch.float32] + [torch.float16] * 4
    for a, b in zip([found, *grads], [wanted, *whole], strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=1e-6, rtol=1e-3)
    with torch.autocast(DEVICE, torch.bfloat16):
        h, h2 = layernorm_modulate(x.half(), *flat, backend=backend)
    assert h.dtype == h2.dtype == torch.float16


def test_a_batch_equals_its_single_runs_and_runs_repeat() -> None:
    args = inputs(modulations=2)
    both = stacked(*args)
    for b in (0, 1):
        assert torch.equal(stacked(*(v[b : b + 1] for v in args)), both[:, b : b + 1])
    first, second = (with_gradients(stacked, args) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("with_modulation", [True, False])
def test_operators_pass_opcheck(with_modulation: bool) -> None:
    x, shift, scale, shift2, scale2 = inputs(modulations=2)
    ops = torch.ops.mimkernels
    shifts, scales = [shift, shift2], [scale, scale2]
    torch.library.opcheck(ops.layernorm_modulate.default, (x, shifts, scales, 1e-6))
    args = (x, scales, [torch.randn_like(x)] * 2, 1e-6, with_modulation)
    torch.library.opcheck(ops.layernorm_modulate_backward.default, args)


@pytest.mark.parametrize("modulations", [1, 2], ids=["one", "dual"])
def test_compiles_without_graph_breaks(modulations: int) -> None:
    args = inputs(modulations=modulations)
    compiled = torch.compile(stacked, fullgraph=True, backend="aot_eager")
    found, eager = with_gradients(compiled, args), with_gradients(stacked, args)
    assert torch.equal(found[0], eager[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], eager[1], strict=True))


@interpreted
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("module", [AdaLayerNormZero, SD35AdaLayerNormZeroX])
def test_equals_diffusers(module: Any, backend: str) -> None:
    torch.manual_seed(0)
    norm = module(70)
    dual = module is SD35AdaLayerNormZeroX

    def theirs(x: Tensor, emb: Tensor, *weights: Tensor) -> Tensor:
        names = ("linear.weight", "linear.bias")
        out = functional_call(norm, dict(zip(names, weights, strict=True)), x, {"emb": emb})
        return torch.stack([out[0], out[5]] if dual else [out[0]])

    def ours(x: Tensor, emb: Tensor, *weights: Tensor) -> Tensor:
        chunks = F.linear(F.silu(emb), *weights).chunk(9 if dual else 6, dim=1)
        return stacked(x, *chunks[:2], *(chunks[6:8] if dual else ()), backend=backend)

    args = [torch.randn(2, 11, 70) * 3, torch.randn(2, 70), norm.linear.weight, norm.linear.bias]
    found, wanted = with_gradients(ours, args), with_gradients(theirs, args)
    for a, b in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@interpreted
def test_bad_arguments() -> None:
    x, shift, scale, shift2, scale2 = inputs(modulations=2)
    wide = torch.zeros(1, 1, 16_385)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((x[0], shift, scale), {}, r"x: expected shape \[any, any, any\]"),
        ((x.int(), shift, scale), {}, "x: expected a floating-point type"),
        ((x.transpose(1, 2), shift, scale), {}, "x: expected a last stride of 1"),
        ((wide, wide[0], wide[0]), {}, "x: expected 1 to 16384 channels, got 16385"),
        ((x, shift, scale), {"eps": 0.0}, "eps: expected a positive number"),
        ((x, shift[:, 1:], scale), {}, r"shift: expected shape \[2, 150\]"),
        ((x, shift, scale[0]), {}, r"scale: expected shape \[2, 150\]"),
        ((x, shift, scale.half()), {}, "scale: expected torch.float32 as shift"),
        ((x, shift.to("meta"), scale.to("meta")), {}, "shift: expected device cpu as x"),
        ((x, shift.T.contiguous().T, scale), {}, "shift: expected a last stride of 1"),
        ((x, shift, scale, shift2), {}, "scale2: expected together with shift2, got None"),
        ((x, shift, scale, None, scale2), {}, "shift2: expected together with scale2, got None"),
        ((x, shift, scale, shift2[:, 1:], scale2), {}, "shift2: expected shape"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            layernorm_modulate(*args, **options)
