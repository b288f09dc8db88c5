"""The engine among what people do: own loops with tables, inference mode, hooks, pickles."""

import io
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from torch import Tensor, nn

from bench.variants import variants_of
from mimdit import accelerate
from mimdit.engine import Plan, graphed, plan
from mimdit.engine import engine as engines
from mimdit.engine.graphed import Graphed
from mimdit.engine.modulation import Modulator
from mimdit.transformer import MiMDiTTransformer2DModel
from tests.mimdit.test_engine_contract import drawn, inputs, relative, sampled


@pytest.fixture(autouse=True)
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


def texts(model: MiMDiTTransformer2DModel, count: int) -> Tensor:
    """Pooled ones, [count,P], that differ."""
    g = torch.Generator().manual_seed(1)
    return 10 * torch.randn(count, model.config["pooled_projection_dim"], generator=g)


def test_tables_are_of_these_texts_alone() -> None:
    model = drawn(pooled_condition=False)
    x, z, t = inputs(batch=2)
    pooled = texts(model, 2)
    given = [pooled, pooled[:1].expand(2, -1), pooled[1:].expand(2, -1)]
    wanted = [model(x, t, lq_latents=z, pooled_projections=p).sample for p in given]
    accelerate(model)
    engine: Any = model.engine
    condition, times = model.encode_condition(z), torch.tensor([750.0, 500.0])
    # The first row of a batch lies where the batch does.
    for known in ([pooled[:1], pooled[1:]], [pooled], pooled, None):
        engine.prepare(times, known)
        for p, reference in zip(given, wanted, strict=True):
            found = model(x, t, condition, pooled_projections=p).sample
            assert relative(found, reference) < 1e-5
    # Changed in place, they are others.
    engine.prepare(times, pooled)
    pooled.neg_()
    found = model(x, t, condition, pooled_projections=pooled).sample
    wanted = accelerate(model, enabled=False)(x, t, lq_latents=z, pooled_projections=pooled).sample
    assert relative(found, wanted) < 1e-5


def test_prepared_steps_look_up_and_others_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    model = drawn(pooled_condition=False)
    x, z, _ = inputs(batch=3)
    times = [torch.tensor([750.0, 987.3, 20.0]), torch.tensor([987.3, 111.0, 20.0])]
    wanted = [model(x, t, lq_latents=z).sample for t in times]
    engine: Any = accelerate(model).engine
    condition = model.encode_condition(z)
    engine.prepare(torch.tensor([987.3, 750.0, 20.0]))
    computed, embed = [], engine.modulator.embed
    monkeypatch.setattr(
        engine.modulator, "embed", lambda *given: computed.append(1) or embed(*given)
    )
    for t, reference, count in zip(times, wanted, (0, 1), strict=True):
        assert relative(model(x, t, condition).sample, reference) < 1e-5
        assert len(computed) == count
    # As a GPU would, which cannot look at times: not a number rather than another time's.
    (table,) = engine._run.tables
    assert table(times[1]).isnan().any(1).tolist() == [False, True, False]
    # Nothing is prepared for other weights.
    to_v = model.transformer_blocks[0].attn.to_v
    to_v.weight = nn.Parameter(to_v.weight * 1.5)
    model(x, times[0], model.encode_condition(z))
    assert len(computed) == 1 and engine.modulator.embed is not None
    engine.prepare(torch.tensor([1.0]))
    engine.release()
    assert engine._run.tables == []
    for wrong, message in (
        ((torch.tensor(1.0),), "expected one axis and two, got 0 and 2"),
        ((torch.ones(1), texts(model, 1).double()), "pooled: expected torch.float32"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.prepare(*wrong)


def test_benchmarks_in_half_precision_look_up_all_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most times of forty steps are none of bfloat16's."""
    model = drawn(pooled_condition=False).bfloat16()
    x, z, _ = inputs(size=(8, 8))
    engine = variants_of(model, z, ["engine"])[0][0]
    computed, embed = [], Modulator.embed
    monkeypatch.setattr(Modulator, "embed", lambda *given: computed.append(1) or embed(*given))
    engine.picture(model, x, z, 40)
    assert len(computed) == 1


def test_other_sizes_give_way_where_memory_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = drawn()
    wanted = sampled(model, 0, 1, size=(8, 8))
    engine: Any = accelerate(model).engine
    sampled(model, 0, 1)
    plain = engines.make_buffers

    def short(*given: Any) -> Any:
        if engine.workspaces or alone:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried\nmore")
        return plain(*given)

    monkeypatch.setattr(engines, "make_buffers", short)
    alone = False
    with pytest.warns(UserWarning, match="Tried; trying again without what other sizes kept"):
        found = sampled(model, 0, 1, size=(8, 8))
    assert relative(found, wanted) < 1e-5
    assert [shape.grid for shape in engine.workspaces] == [(4, 4)]
    alone = True
    engine.release()
    with pytest.raises(torch.OutOfMemoryError):
        sampled(model, 0, 1)


def test_a_plan_of_the_engine() -> None:
    model = drawn()
    engine: Any = accelerate(model).engine
    found = engine.plan((2, 48, 16, 24), steps=7, device="A100")
    assert isinstance(found, Plan) and found == plan(model, (2, 48, 16, 24), 7, "A100")
    assert "7 steps" in str(found) and "A100" in str(found)


def test_inference_mode_leaves_no_traces() -> None:
    model = drawn()
    wanted = sampled(model, 0, 2)
    accelerate(model)
    # Weights that are joined anew inside, and buffers made there.
    model.transformer_blocks[0].attn.to_k.weight = nn.Parameter(
        model.transformer_blocks[0].attn.to_k.weight.clone()
    )
    for around in (torch.inference_mode, nullcontext, torch.inference_mode):
        with around():
            assert relative(sampled(model, 0, 2), wanted) < 1e-5
    assert not any(p.is_inference() for p in model.parameters())
    with torch.enable_grad():
        x, z, t = inputs()
        model.requires_grad_(True)
        model(x, t, lq_latents=z).sample.sum().backward()


def test_a_bare_backbone_sees_new_layers() -> None:
    class Doubled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = accelerate(drawn())
    x, _, t = inputs()
    before = model(x, t).sample
    model.transformer_blocks[0].attn.to_v.__class__ = Doubled
    model.transformer_blocks[1].attn.to_v = model.transformer_blocks[0].attn.to_v
    found = model(x, t).sample
    assert relative(found, before) > 1e-3
    assert relative(found, accelerate(model, enabled=False)(x, t).sample) < 1e-5


def test_layers_with_a_forward_or_hook_of_their_own() -> None:
    """As other kinds of LoRA set it, also when they come and go later."""
    model = drawn()
    before = sampled(accelerate(model), 0, 2)
    attn: Any = model.transformer_blocks[0].attn
    plain = attn.to_v.forward
    attn.to_v.forward = lambda x: 2 * plain(x)
    handle = attn.add_v_proj.register_forward_hook(lambda *given: 2 * given[2])
    found = sampled(model, 0, 2)
    assert relative(found, before) > 1e-3
    accelerate(model, enabled=False)
    assert relative(found, sampled(model, 0, 2)) < 1e-5
    accelerate(model)
    del attn.to_v.forward
    handle.remove()
    assert relative(sampled(model, 0, 2), before) < 1e-5


class Packed(Tensor):
    """A weight as quantising libraries make them: a class of tensor that only products take."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Packed":
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("detach", "alias"):
            return cls(args[0].inner)
        if name not in ("t", "addmm", "mm"):
            raise NotImplementedError(name)
        return func(*(a.inner if isinstance(a, cls) else a for a in args), **kwargs or {})


def test_weights_of_other_libraries_are_left_to_them() -> None:
    model = drawn()
    wanted = sampled(model, 0, 2)
    for block in model.transformer_blocks:
        layer: Any = block.attn.to_v
        layer.weight = nn.Parameter(Packed(layer.weight.detach()), requires_grad=False)
    assert relative(sampled(accelerate(model), 0, 2), wanted) < 1e-5


def test_attention_arguments_run_the_reference() -> None:
    """Also with a condition that the engine encoded, which holds no tokens."""
    model = drawn()
    x, z, t = inputs()
    wanted = model(x, t, lq_latents=z).sample
    accelerate(model)
    for given in ({"lq_latents": z}, {"condition": model.encode_condition(z)}):
        found = model(x, t, **given, joint_attention_kwargs={"attention_mask": None}).sample
        assert relative(found, wanted) < 1e-5


def test_what_would_be_computed_otherwise_is_refused() -> None:
    with pytest.raises(ValueError, match="qk_norm: expected None or 'rms_norm', got LayerNorm"):
        accelerate(drawn(qk_norm="layer_norm"))
    model = accelerate(drawn())
    _, z, _ = inputs()
    apply_first_block_cache(model, FirstBlockCacheConfig(threshold=0.1))
    with pytest.raises(ValueError, match="hooks: expected none of diffusers', but there are some"):
        model.encode_condition(z)
    model = drawn()
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)
    with pytest.raises(ValueError, match="layerwise casting, group offload or a cache"):
        accelerate(model)


def test_pickles() -> None:
    model = accelerate(drawn(), shapes=3)
    wanted, file = sampled(model, 0, 2), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert other.engine.model is other and other.engine.shapes == 3
    assert torch.equal(sampled(other, 0, 2), wanted)


def test_captures_are_of_their_gpu_and_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA that notes what is asked of it."""
    asked: list[Any] = []

    @contextmanager
    def noted(*given: Any, **options: Any) -> Any:
        asked.append((given, options))
        yield

    def stream(device: Any) -> Any:
        return SimpleNamespace(device=device, wait_stream=lambda _: None)

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: None))
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, noted)
    cached: list[bool] = []

    def doubled(x: Tensor) -> Tensor:
        cached.append(torch.is_autocast_cache_enabled())
        assert graphed._CAPTURE.locked()
        return 2 * x

    second = torch.device("cuda:1")
    with torch.inference_mode():
        run = Graphed(doubled, second)
        run(torch.ones(2))
    # A graph has the casts of autocast made anew; its inputs may be written from anywhere.
    assert cached == [False] * 3 and torch.is_autocast_cache_enabled()
    assert not run._inputs[0].is_inference()
    (device, _), _, ((_, options)) = asked
    assert device == (second,) and options["stream"].device == second
    assert options["capture_error_mode"] == "thread_local"
