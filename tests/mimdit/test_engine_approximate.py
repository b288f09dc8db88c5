"""Opt-in approximations: products in 8 bits, and the first-block cache."""

from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig
from torch import Tensor, nn

from mimdit import accelerate, experts, mim, planning, quantized
from mimdit.engine import engine as engines
from mimdit.engine import first_block
from mimdit.engine.linears import FusedLinear
from mimdit.loading import assemble
from mimdit.quantized import (
    KINDS,
    QuantizedBank,
    QuantizedLinear,
    check_quantization,
    quantize_rows,
)
from mimkernels import expert_linear
from tests.mimdit.test_engine_contract import drawn, inputs, relative, sampled


@pytest.mark.parametrize("kind", KINDS)
def test_rows_come_back(kind: str) -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-6, 6, 5).unsqueeze(1)
    x[2] = 0
    q, scale = quantize_rows(x, KINDS[kind])
    assert q.dtype == KINDS[kind] and scale.shape == (5, 1)
    found, largest = q.float() * scale, x.abs().amax(1, keepdim=True)
    # Half a step of int8; e4m3 has three bits behind the point and its least normal number.
    bound = largest / 254 if kind == "int8" else x.abs() / 16 + largest / 448 / 512
    assert ((found - x).abs() <= bound * 1.001).all()
    assert found[2].abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear_layers(kind: str, bias: bool) -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(64, n, bias=bias) for n in (48, 32)]
    x = torch.randn(2, 7, 64)
    with torch.no_grad():
        found = QuantizedLinear(layers, KINDS[kind])(x)
        wanted = torch.cat([layer(x) for layer in layers], -1)
    assert found.shape == wanted.shape and found.dtype == x.dtype
    # Of independent roundings of both operands: 1/254 of three deviations, and 2⁻⁴/√3 of each.
    assert relative(found, wanted) < (0.02 if kind == "int8" else 0.06)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slots", [False, True], ids=["shared", "slots"])
def test_banks_of_experts(kind: str, slots: bool) -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(2, 3, 32, 64), torch.randn(6, 32)
    index = torch.tensor([[4, 0], [5, 5], [1, 2]])
    x = torch.randn(3, *([2] if slots else []), 9, 64)
    bank = QuantizedBank.of(weight, KINDS[kind])[slice(0, 2)].flatten(0, 1)
    found = quantized.expert_linear(x, bank, index, bias)
    wanted = expert_linear(x, weight.flatten(0, 1), index, bias)
    assert relative(found, wanted) < (0.02 if kind == "int8" else 0.06)


@torch.no_grad()
def test_mixtures_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts, "expert_linear", quantized.expert_linear)
    monkeypatch.setattr(mim, "expert_combine", quantized.expert_combine)
    model = drawn()
    own = model.mim
    z = torch.randn(2, 60, model.inner_dim)
    wanted, routing = own(z, (6, 10), slice(0, 2))
    accelerate(model, quantize="int8")
    found, again = model.engine.mixtures(z, (6, 10), slice(0, 2))  # pyright: ignore
    assert torch.equal(again.index, routing.index)
    assert 1e-5 < relative(found, wanted) < 0.05
    # The model's own are as they were.
    assert torch.equal(own(z, (6, 10), slice(0, 2))[0], wanted)
    assert all(isinstance(p, nn.Parameter) for p in own.parameters())


def test_int8_is_close_and_notices_changes() -> None:
    model = accelerate(drawn())
    exact = sampled(model, 0, 4)
    accelerate(model, quantize="int8")
    found = sampled(model, 0, 4)
    assert 1e-5 < relative(found, exact) < 0.1
    assert torch.equal(sampled(model, 0, 4), found)
    # Copies of weights follow the weights.
    model.transformer_blocks[0].attn.to_q.weight.mul_(1.5)
    changed = sampled(model, 0, 4)
    accelerate(model)
    exact = sampled(model, 0, 4)
    assert relative(changed, exact) < relative(changed, found)
    # Weights of the model stay as they are.
    assert model.transformer_blocks[0].attn.to_q.weight.dtype == torch.float32


def test_layers_of_other_kinds_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = drawn()
    attn: Any = model.transformer_blocks[0].attn
    attn.to_q.__class__ = Doubled
    wanted = sampled(model, 0, 2)
    accelerate(model, quantize="int8")
    assert relative(sampled(model, 0, 2), wanted) < 0.1
    block = model.engine.blocks[0]  # pyright: ignore
    assert isinstance(block.image_qkv, FusedLinear)
    assert isinstance(block.text_qkv, QuantizedLinear)


def test_fp8_as_a_gpu_would(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "check_quantization", lambda *_: None)
    model = accelerate(drawn())
    exact = sampled(model, 0, 2)
    accelerate(model, quantize="fp8")
    assert 1e-4 < relative(sampled(model, 0, 2), exact) < 0.3


def test_what_the_device_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = drawn()
    with pytest.raises(ValueError, match="'fp8' needs an NVIDIA GPU of compute"):
        accelerate(model, quantize="fp8")
    with pytest.raises(ValueError, match="quantize: expected one of int8, fp8, got 'int4'"):
        accelerate(model, quantize="int4")
    assert model.engine is None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 6))
    check_quantization("int8", torch.device("cuda"))
    with pytest.raises(ValueError, match=r"this one has 8\.6"):
        check_quantization("fp8", torch.device("cuda"))
    with pytest.raises(ValueError, match="'int8' needs the CPU or an NVIDIA GPU"):
        check_quantization("int8", torch.device("mps"))


def test_first_block_cache() -> None:
    model = drawn()
    exact = sampled(accelerate(model), 0, 6)
    # Nothing is below a threshold of zero, and everything is below a large one.
    assert relative(sampled(accelerate(model, first_block_cache=0.0), 0, 6), exact) < 1e-5
    assert model.engine.skipped == 0  # pyright: ignore
    found = sampled(accelerate(model, first_block_cache=100), 0, 6)
    assert relative(found, exact) > 1e-5
    assert torch.equal(found, sampled(model, 0, 6))


@torch.no_grad()
def test_the_cache_is_of_a_picture_a_branch_and_a_run() -> None:
    model = accelerate(drawn(), first_block_cache=FirstBlockCacheConfig(threshold=1e6))
    x, z, _ = inputs()
    engine: Any = model.engine
    first, second = model.encode_condition(z), model.encode_condition(z.flip(-1))
    other = model.prompt()[0] * 2
    times = torch.tensor([1000.0, 500.0])
    for _ in range(2):
        with engine.steps(times, [model.prompt()[1]]):
            for given, text in ((first, None), (second, None), (first, other)):
                model(x, times[:1], given, encoder_hidden_states=text)
                assert engine.skipped == 0
            model(x, times[1:], first)
            model(x, times[1:], second)
            assert engine.skipped == 2
    # Without a word where runs begin and end, rising time tells; what was skipped is counted on.
    for time in (900.0, 600.0, 900.0, 600.0):
        model(x, torch.tensor([time]), first)
    assert engine.skipped == 4


@torch.no_grad()
def test_the_cache_knows_pictures_whose_conditions_and_texts_are_made_anew() -> None:
    """And what it keeps does not grow with steps, nor with pictures."""
    model = accelerate(drawn(), first_block_cache=1e6)
    engine: Any = model.engine
    texts, held = (model.prompt()[0], model.prompt()[0] * 2), []
    most = 0
    for seed in range(2):
        x, z, _ = inputs(seed, size=(8, 8))
        for time in (1000.0, 700.0, 400.0):
            for text in texts:
                # Kept alive, so that no address comes twice.
                held.append(text.clone())
                given = {"lq_latents": z.clone(), "encoder_hidden_states": held[-1]}
                model(x, torch.tensor([time]), **given)
        assert engine.skipped == (seed + 1) * 2 * len(texts)
        most = most or engine._run.cache.bytes
        assert 0 < engine._run.cache.bytes <= most
    # Pictures that never end, either.
    for seed in range(12):
        x, z, t = inputs(seed, size=(8, 8))
        model(x, t, lq_latents=z)
    assert engine._run.cache.bytes <= first_block._LOOSE * most / len(texts)


@torch.no_grad()
def test_branches_whose_texts_take_turns_at_one_address() -> None:
    """A cast text goes after its call, and the other branch's may lie where it was."""
    model = accelerate(drawn(), first_block_cache=1e6)
    engine: Any = model.engine
    x, z, _ = inputs()
    condition = model.encode_condition(z)
    texts = [model.prompt()[0] * scale for scale in (1, 8)]

    def run(some: list[Tensor]) -> list[Tensor]:
        found = []
        with engine.steps(torch.tensor([1000.0, 500.0]), [model.prompt()[1]]):
            for time in (1000.0, 500.0):
                for text in some:
                    given = {"encoder_hidden_states": text.clone()}
                    found.append(model(x, torch.tensor([time]), condition, **given).sample)
                    del given
        assert engine.skipped == len(some)
        return found

    alone = [run([text])[1] for text in texts]
    assert not torch.equal(*alone)
    for found, wanted in zip(run(texts)[2:], alone, strict=True):
        assert torch.equal(found, wanted)


def test_the_cache_of_tiles_whose_conditions_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = assemble(drawn(), 4)
    pipe.set_progress_bar_config(disable=True)
    accelerate(pipe, first_block_cache=1e6)
    picture = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(3))

    def run() -> Tensor:
        g = torch.Generator().manual_seed(0)
        return pipe(picture, tile=64, tile_overlap=0, generator=g, output_type="pt").images

    def skipped() -> int:
        return pipe.transformer.engine.skipped  # pyright: ignore

    kept, count = run(), skipped()
    # All steps of all tiles but the first of each.
    assert count > 3 and count % 3 == 0
    monkeypatch.setattr(planning, "_KEPT", 0)
    assert torch.equal(run(), kept) and skipped() == count
    # Without memory for it nothing is kept, and all blocks run.
    monkeypatch.setattr(first_block, "free_memory", lambda _: 0)
    exact = run()
    assert skipped() == 0
    accelerate(pipe)
    assert relative(exact, run()) < 1e-5


def test_bad_thresholds() -> None:
    for wrong in (-0.1, float("nan"), "low", True):
        with pytest.raises(ValueError, match="first_block_cache: expected a threshold"):
            accelerate(drawn(), first_block_cache=wrong)
    with pytest.raises(ValueError, match="two blocks or more"):
        accelerate(drawn(num_layers=1), first_block_cache=0.1)
