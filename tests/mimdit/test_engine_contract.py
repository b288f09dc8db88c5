"""What the engine promises beyond equal results: costs, captures, changes of weights, threads."""

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.measure import floating_point_operations
from mimdit import accelerate
from mimdit.engine import Engine, graphed, plan
from mimdit.engine.graphed import Graphed
from mimdit.loading import assemble, load_pipeline
from mimdit.metrics import psnr
from mimdit.pipeline import MiMDiTPipeline
from mimdit.presets import build
from mimdit.transformer import MiMDiTTransformer2DModel
from mimkernels.explain import recorded
from tests.export.conftest import sd35


def drawn(**options: Any) -> MiMDiTTransformer2DModel:
    """With gains, as of the preset's own prediction type, drawn weights would let runs diverge."""
    torch.manual_seed(0)
    plain = {"prediction_type": "velocity", "out_channels": 48}
    return build("debug", **plain | options).randomize_(0).requires_grad_(False).eval()


def inputs(seed: int = 0, batch: int = 1, size: tuple[int, int] = (12, 20)) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x, z = torch.randn(2, batch, 48, *size, generator=g)
    return x, z, torch.full((batch,), 500.0)


def sampled(model: MiMDiTTransformer2DModel, seed: int, steps: int, **size: Any) -> Tensor:
    """Latents after Euler steps of someone's own loop."""
    x, z, _ = inputs(seed, **size)
    times = torch.linspace(1000, 100, steps)
    around = nullcontext() if model.engine is None else model.engine.steps(
        times, [model.prompt()[1]]
    )  # fmt: skip
    with torch.no_grad():
        condition = model.encode_condition(z)
        with around:
            for t in times:
                x = x - model(x, t.expand(len(x)), condition).sample / steps
    return x


def relative(a: Tensor, b: Tensor) -> float:
    return ((a - b).square().mean() / b.square().mean()).sqrt().item()


@torch.no_grad()
@pytest.mark.parametrize("name", ["sd35-medium", "sd35-large"])
def test_flops_of_sd35_are_those_planned(name: str) -> None:
    """Counted by torch on tensors without data, at the paper's 512×512 pixels."""
    with torch.device("meta"):
        model = build(name, torch.bfloat16).requires_grad_(False).eval()
        x, z = (torch.empty(1, 16, 64, 64, dtype=torch.bfloat16) for _ in range(2))
        t = torch.empty(1, dtype=torch.bfloat16)
    model = accelerate(model)
    # The routers' reference cannot run without data.
    with recorded("sm_90"):
        condition = model.encode_condition(z)
    counted = floating_point_operations(lambda: model.predict(x, t, condition))
    assert plan(model, (1, 16, 64, 64)).step_flops == pytest.approx(counted, rel=0.02)
    if name == "sd35-medium":
        assert counted == pytest.approx(2.64e12, rel=0.02)


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[Graphed]:
    """Every capture, of graphs that run on the CPU: a replay recomputes the static output."""
    made: list[Graphed] = []

    def capture(self: Graphed, given: tuple[Tensor, ...]) -> None:
        self._inputs = tuple(v.clone() for v in given)
        self._output = self.function(*self._inputs)
        made.append(self)

        class Graph:
            def replay(graph) -> None:
                self._output.copy_(self.function(*self._inputs))

        self._graph = Graph()

    monkeypatch.setattr(Graphed, "_capture", capture)
    plain = Engine._runner
    monkeypatch.setattr(
        Engine, "_runner", lambda self, shape, joint, _: plain(self, shape, joint, True)
    )
    return made


def test_a_shape_is_captured_once(captures: list[Graphed]) -> None:
    model = drawn()
    wanted = [sampled(model, seed, 3) for seed in (1, 2)]
    accelerate(model)
    found = [sampled(model, seed, 3) for seed in (1, 2)]
    assert len(captures) == 1
    for a, b in zip(found, wanted, strict=True):
        assert relative(a, b) < 1e-5
    # Another size has its own, and the first one's is still there.
    sampled(model, 1, 2, size=(8, 8))
    assert torch.equal(sampled(model, 1, 3), found[0])
    assert len(captures) == 2
    # In place: the graph reads the same weights. Replaced: it must not be used again.
    weight = model.transformer_blocks[0].attn.to_v.weight
    weight.mul_(1.5)
    assert relative(sampled(model, 1, 3), found[0]) > 1e-3
    assert len(captures) == 2
    model.transformer_blocks[0].attn.to_v.weight = torch.nn.Parameter(weight / 1.5)
    assert relative(sampled(model, 1, 3), found[0]) < 1e-5
    assert len(captures) == 3


def test_a_failed_capture_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def fail(*_: Any) -> None:
        tried.append(1)
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(Graphed, "_capture", fail)
    doubled = Graphed(lambda x: 2 * x, torch.device("cpu"))
    with pytest.warns(UserWarning, match="no CUDA graph.*not permitted"):
        assert doubled(torch.ones(1)) == 2
    assert doubled(torch.ones(1)) == 2 and tried == [1]


def test_a_shape_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced by dynamo into one graph without breaks; what generates code is left out."""
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    plain: Callable[..., Any] = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **kw: plain(f, backend=backend, **kw))
    torch._dynamo.reset()
    model = drawn()
    wanted = [sampled(model, seed, 2) for seed in (1, 2)]
    accelerate(model, compile=True)
    for seed in (1, 2):
        assert relative(sampled(model, seed, 2), wanted[seed - 1]) < 1e-5
    assert len(graphs) == 1
    torch._dynamo.reset()


def test_two_sizes_in_a_row() -> None:
    model = drawn()
    sizes = [(12, 20), (8, 8), (12, 20), (16, 6)]
    wanted = [sampled(model, i, 2, size=size) for i, size in enumerate(sizes)]
    accelerate(model)
    for i, size in enumerate(sizes):
        assert relative(sampled(model, i, 2, size=size), wanted[i]) < 1e-5


def test_other_number_types() -> None:
    model = accelerate(drawn(qk_norm=None))
    sampled(model, 0, 2)
    model.to(torch.float64)
    x, z, t = (v.double() for v in inputs())
    with torch.no_grad():
        found = model(x, t, model.encode_condition(z)).sample
        wanted = accelerate(model, enabled=False)(x, t, lq_latents=z).sample
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9 * wanted.abs().max().item())


def test_bfloat16_is_as_exact_as_the_reference() -> None:
    model = drawn()
    x, z, t = inputs(batch=3)
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        truth = exact.predict(x.double(), t.double(), exact.encode_condition(z.double()))
        model.bfloat16()
        low = [v.bfloat16() for v in (x, t, z)]
        reference = model.predict(low[0], low[1], model.encode_condition(low[2]))
        accelerate(model)
        found = model.predict(low[0], low[1], model.encode_condition(low[2]))
    assert relative(found.double(), truth) < 1.5 * relative(reference.double(), truth)


def test_threads_take_turns() -> None:
    """Own loops of different pictures, lengths and sizes on one accelerated model."""
    model = drawn(pooled_condition=False)
    jobs = [(1, 3, (12, 20)), (2, 5, (12, 20)), (3, 4, (8, 8)), (4, 3, (12, 20))]
    wanted = [sampled(model, seed, steps, size=size) for seed, steps, size in jobs]
    accelerate(model)
    found: dict[int, Tensor] = {}
    start = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        start.wait()
        seed, steps, size = jobs[i]
        for _ in range(3):
            found[i] = sampled(model, seed, steps, size=size)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, latents in enumerate(wanted):
        assert relative(found[i], latents) < 1e-5


def test_a_copy_of_an_accelerated_model_is_accelerated() -> None:
    model = accelerate(drawn())
    wanted = sampled(model, 0, 2)
    other = copy.deepcopy(model)
    assert other.engine is not None and other.engine is not model.engine
    assert torch.equal(sampled(other, 0, 2), wanted)
    other.transformer_blocks[0].attn.to_v.weight.mul_(1.5)
    assert relative(sampled(other, 0, 2), wanted) > 1e-3
    assert torch.equal(sampled(model, 0, 2), wanted)


@pytest.mark.gpu
def test_a_graph_replays_what_runs() -> None:
    device = torch.device("cuda")
    model = drawn().to(device)
    run = Graphed(lambda x: model.proj_out(x).relu(), device)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(2, 5, model.inner_dim, device=device)
            torch.testing.assert_close(run(x), model.proj_out(x).relu())
    assert not run._failed and graphed._WARMUP > 0


MODELS: dict[str, Callable[[], MiMDiTPipeline]] = {
    "debug": lambda: assemble(drawn(), 40),
    "tiny": lambda: load_pipeline("tiny"),
    "medium": lambda: sd35("medium", 128),
    "large": lambda: sd35("large", 128),
}


@pytest.mark.parametrize(
    ("model", "guidance"),
    [
        ("debug", 1),
        *(pytest.param(name, 1, marks=pytest.mark.slow) for name in ("tiny", "medium", "large")),
        *(pytest.param(name, 3, marks=pytest.mark.slow) for name in ("medium", "large")),
    ],
)
def test_pictures_after_forty_steps(model: str, guidance: float) -> None:
    """The same pixels to 60 dB; three different pictures, of a size that is no multiple of any."""
    pipe = MODELS[model]()
    pipe.set_progress_bar_config(disable=True)
    pictures = torch.rand(3, 3, 70, 50, generator=torch.Generator().manual_seed(3))

    def run() -> Tensor:
        given = {"generator": torch.Generator().manual_seed(0), "guidance_scale": guidance}
        return pipe(pictures, num_inference_steps=40, output_type="pt", **given).images

    wanted = run()
    accelerate(pipe)
    assert psnr(run(), wanted) > 60
