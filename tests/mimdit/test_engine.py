"""The engine against the model it accelerates."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mimdit import accelerate
from mimdit.engine.linears import FusedLinear
from mimdit.loading import assemble
from mimdit.pipeline import MiMDiTPipeline
from mimdit.presets import build
from mimdit.transformer import MiMDiTTransformer2DModel

ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "single attention": {"dual_attention_layers": ()},
    "dual last block": {"dual_attention_layers": (0, 1)},
    "qk norm": {"qk_norm": "rms_norm"},
    "one expert": {"experts": 1, "top_k": 1},
    "homogeneous": {"groups": ("se",) * 4},
    "sparse inter, dense intra": {"inter": "sparse", "intra": "dense"},
    "velocity": {"prediction_type": "velocity", "out_channels": 48},
}


def drawn(dtype: torch.dtype = torch.float64, **options: Any) -> MiMDiTTransformer2DModel:
    torch.manual_seed(0)
    model = build("debug", **{"qk_norm": None} | options).randomize_(0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm_" in name or "norm1" in name or "norm_out" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def inputs(
    batch: int = 2, height: int = 12, width: int = 20, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, batch, 48, height, width, generator=g).to(dtype)
    return x, z, torch.linspace(100, 900, batch).to(dtype)


@pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS.keys())
@torch.no_grad()
def test_results_are_the_reference(options: dict[str, Any]) -> None:
    model = drawn(**options)
    calls = [inputs(), inputs(1, 8, 8), inputs()]
    wanted = [model(x, t, lq_latents=z).sample for x, z, t in calls]
    accelerate(model)
    for (x, z, t), reference in zip(calls, wanted, strict=True):
        condition = model.encode_condition(z)
        assert not condition.tokens
        found = model(x, t, condition).sample
        # Diffusers' RMSNorm has a float32 variance, whatever it is given; gains make velocities of
        # several hundred, so their errors are relative.
        tolerance = 1e-7 if "qk_norm" in options else 1e-9
        scale = reference.abs().max().item()
        torch.testing.assert_close(found, reference, rtol=0, atol=tolerance * max(scale, 1))


@torch.no_grad()
def test_conditions_of_one_shape_take_turns() -> None:
    model = accelerate(drawn())
    x, z, t = inputs()
    first, second = model.encode_condition(z), model.encode_condition(z.flip(-1))
    alone = [model(x, t, c).sample for c in (first, second)]
    assert not torch.equal(*alone)
    for _ in range(2):
        for condition, wanted in zip((first, second), alone, strict=True):
            assert torch.equal(model(x, t, condition).sample, wanted)


@pytest.mark.parametrize("pooled_condition", [False, True])
@torch.no_grad()
def test_own_text_and_a_table_of_modulations(pooled_condition: bool) -> None:
    model = drawn(pooled_condition=pooled_condition)
    x, z, _ = inputs()
    t = torch.tensor([750.0, 750.0]).double()
    text, pooled = torch.randn(1, 7, 32).double(), torch.randn(1, 16).double()
    options = {
        "encoder_hidden_states": text.expand(2, -1, -1),
        "pooled_projections": pooled.expand(2, -1),
    }
    wanted = model(x, t, lq_latents=z, **options).sample
    accelerate(model)
    assert model.engine is not None
    condition = model.encode_condition(z)
    with model.engine.steps(torch.tensor([1000.0, 750.0, 500.0]).double(), [pooled]):
        found = model(x, t, condition, **options).sample
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
    torch.testing.assert_close(model(x, t, condition, **options).sample, wanted, rtol=0, atol=1e-9)


def pipeline() -> MiMDiTPipeline:
    return assemble(drawn(torch.float32), 3, 2)


@pytest.mark.parametrize("size", [(48, 72), (300, 140)], ids=["one tile", "tiles"])
def test_pictures_of_a_pipeline(size: tuple[int, int]) -> None:
    pipe = pipeline()
    picture = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(3))

    def run() -> Tensor:
        g = torch.Generator().manual_seed(0)
        return pipe(picture, generator=g, output_type="pt", num_inference_steps=3).images

    wanted = run()
    assert accelerate(pipe) is pipe
    found = run()
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    assert torch.equal(found, run())
    accelerate(pipe, enabled=False)
    assert torch.equal(run(), wanted)


@torch.no_grad()
def test_keys_and_values_of_all_blocks_at_once() -> None:
    for options in ({"qk_norm": "rms_norm"}, {"dual_attention_layers": ()}):
        model = drawn(num_layers=3, **options)
        engine: Any = accelerate(model).engine
        _, z, _ = inputs()
        tokens = [*torch.randn(3, 2, 15, model.inner_dim, dtype=z.dtype)]
        each = zip(engine.blocks, tokens, strict=True)
        wanted = torch.stack([torch.stack(b.keys_and_values(m)) for b, m in each], dim=1)
        for given, parts in ((tokens, [3]), ([*tokens[:2], tokens[2].clone()], [2, 1])):
            found = engine._keys_and_values(given)
            assert [pair.shape[1] for pair in found] == parts
            # Diffusers' RMSNorm has a float32 variance.
            tolerance = 1e-6 if "qk_norm" in options else 1e-12
            torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0, atol=tolerance)
        # A layer of another kind: block by block, as it is.
        model.transformer_blocks[1].attn.to_k = torch.nn.Sequential(
            model.transformer_blocks[1].attn.to_k
        )
        engine: Any = accelerate(model).engine
        found = engine._keys_and_values(tokens)
        assert [pair.shape[1] for pair in found] == [1, 1, 1]
        torch.testing.assert_close(torch.cat(found, 1), wanted, rtol=0, atol=tolerance)


@torch.no_grad()
def test_shapes_are_kept_up_to_a_bound() -> None:
    model = accelerate(drawn(), shapes=2)
    for height in (8, 10, 12, 8):
        x, z, t = inputs(1, height, 8)
        model(x, t, lq_latents=z)
    assert model.engine is not None
    kept = [shape.grid for shape in model.engine.workspaces]  # pyright: ignore
    assert kept == [(6, 4), (4, 4)]


@torch.no_grad()
def test_changed_weights_are_seen() -> None:
    model = accelerate(drawn())
    x, z, t = inputs()
    model(x, t, lq_latents=z)
    # In place, and by replacing the tensor.
    model.transformer_blocks[0].attn.to_k.weight.mul_(1.5)
    model.transformer_blocks[1].attn.to_q.weight = torch.nn.Parameter(
        model.transformer_blocks[1].attn.to_q.weight * 0.5
    )
    found = model(x, t, lq_latents=z).sample
    wanted = accelerate(model, enabled=False)(x, t, lq_latents=z).sample
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


@torch.no_grad()
def test_engines_of_one_model_leave_each_other_their_weights() -> None:
    """Otherwise each would join, and capture, anew whenever the other had run."""
    model = accelerate(drawn(num_layers=3))
    first: Any = model.engine
    x, z, t = inputs()
    wanted, blocks = model(x, t, lq_latents=z).sample, first.blocks
    places = [p.data_ptr() for p in model.parameters()]
    for options in ({}, {"quantize": "int8"}, {"first_block_cache": 0.1}):
        accelerate(model, **options)(x, t, lq_latents=z)
        assert [p.data_ptr() for p in model.parameters()] == places
    model.engine = first
    assert torch.equal(model(x, t, lq_latents=z).sample, wanted)
    assert first.blocks is blocks
    # What has been replaced is joined anew, its neighbours with it.
    to_k = model.transformer_blocks[1].attn.to_k
    to_k.weight = torch.nn.Parameter(to_k.weight * 0.5)
    found = accelerate(model)(x, t, lq_latents=z).sample
    wanted = accelerate(model, enabled=False)(x, t, lq_latents=z).sample
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_saved_weights_stay_the_same(tmp_path: Path) -> None:
    model = drawn(torch.float32)
    before = copy.deepcopy(model.state_dict())
    accelerate(model)
    model.save_pretrained(tmp_path)
    loaded = MiMDiTTransformer2DModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), before, rtol=0, atol=0)


def test_gradients_take_the_reference() -> None:
    model = accelerate(drawn())
    x, z, t = inputs()
    model(x, t, lq_latents=z).sample.sum().backward()
    assert model.mim.zero_weight.grad is not None
    with torch.no_grad():
        condition = model.encode_condition(z)
    with pytest.raises(ValueError, match="one of the accelerated model"):
        model(x, t, condition)


@torch.no_grad()
def test_layers_of_other_kinds_are_called_as_they_are() -> None:
    class Doubled(torch.nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    plain, other = torch.nn.Linear(4, 6), Doubled(4, 5)
    x = torch.randn(3, 4)
    found = FusedLinear([plain, other])(x)
    torch.testing.assert_close(found, torch.cat([plain(x), other(x)], -1))
    with pytest.raises(ValueError, match="a bias in all"):
        FusedLinear([plain, torch.nn.Linear(4, 3, bias=False)])


def test_bad_requests() -> None:
    with pytest.raises(TypeError, match="target: expected a MiMDiTPipeline"):
        accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="shapes: expected at least 1"):
        accelerate(drawn(), shapes=0)
    model = drawn()
    x, z, t = inputs()
    accelerate(model, graph=True)
    with torch.no_grad(), pytest.raises(ValueError, match="graph: expected a CUDA device"):
        model(x, t, lq_latents=z)
    model.transformer_blocks[0].attn.set_processor(torch.nn.Identity())
    with pytest.raises(ValueError, match="expected this package's own, got Identity"):
        accelerate(model)
