"""The engine on a real GPU: its kernels and graphs against the reference, in every type."""

import threading
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from mimdit import accelerate
from mimdit.engine.graphed import Graphed
from mimdit.presets import build
from mimdit.transformer import MiMDiTTransformer2DModel

DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
# The layout of SD3.5-medium, with fewer and narrower blocks.
SD35 = {"num_layers": 3, "num_attention_heads": 4, "caption_projection_dim": 256}
SD35 |= {"joint_attention_dim": 64, "pooled_projection_dim": 32, "pos_embed_max_size": 64}
SD35 |= {"dual_attention_layers": (0, 1), "mim_dim": 128}
LAYOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "debug": ("debug", {}),
    "text alone modulates": ("debug", {"pooled_condition": False}),
    "sd35": ("sd35-medium", SD35),
}
layouts = pytest.mark.parametrize("layout", LAYOUTS)


def drawn(layout: str, dtype: torch.dtype = torch.float32) -> MiMDiTTransformer2DModel:
    torch.manual_seed(0)
    name, options = LAYOUTS[layout]
    model = build(name, **options).randomize_(0).requires_grad_(False).eval()
    return model.to(DEVICE, dtype)


def inputs(
    model: MiMDiTTransformer2DModel, batch: int = 3, size: tuple[int, int] = (28, 20)
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, batch, model.config["in_channels"], *size, generator=g).to(DEVICE)
    return x.to(model.dtype), z.to(model.dtype), torch.linspace(100, 900, batch, device=DEVICE)


@torch.no_grad()
def output(model: MiMDiTTransformer2DModel, **options: Any) -> Tensor:
    x, z, t = inputs(model, **options)
    return model(x, t.to(x.dtype), model.encode_condition(z)).sample


def relative(found: Tensor, wanted: Tensor) -> float:
    error = (found.float() - wanted.float()).square().mean()
    return (error / wanted.float().square().mean()).sqrt().item()


@layouts
def test_float32_is_the_reference(layout: str) -> None:
    model = drawn(layout)
    wanted = [output(model), output(model, batch=1, size=(18, 32)), output(model)]
    accelerate(model)
    found = [output(model), output(model, batch=1, size=(18, 32)), output(model)]
    for ours, reference in zip(found, wanted, strict=True):
        assert relative(ours, reference) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@layouts
def test_half_precision_is_as_exact_as_the_reference(layout: str, dtype: torch.dtype) -> None:
    model = drawn(layout)
    exact = output(model)
    model.to(dtype)
    reference = relative(output(model), exact)
    accelerate(model)
    assert relative(output(model), exact) <= 1.5 * reference


@layouts
def test_graphs_compute_what_single_launches_do(layout: str) -> None:
    model = drawn(layout, torch.bfloat16)
    accelerate(model, graph=False)
    wanted = output(model)
    accelerate(model)
    # Captured, then replayed.
    for _ in range(3):
        assert relative(output(model), wanted) < 2e-3


@layouts
def test_two_runs_have_the_same_bits(layout: str) -> None:
    model = accelerate(drawn(layout, torch.bfloat16))
    output(model)
    assert torch.equal(output(model), output(model))


def test_nothing_is_captured_for_the_second_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    captured: list[Graphed] = []
    plain = Graphed._capture

    def counted(self: Graphed, given: tuple[Tensor, ...]) -> None:
        captured.append(self)
        plain(self, given)

    monkeypatch.setattr(Graphed, "_capture", counted)
    model = accelerate(drawn("debug", torch.bfloat16))
    for _ in range(3):
        output(model)
    assert len(captured) == 1 and not captured[0]._failed
    output(model, batch=1)
    output(model)
    assert len(captured) == 2


@torch.no_grad()
def test_a_second_engine_leaves_the_first_its_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = accelerate(drawn("sd35", torch.bfloat16))
    first, wanted = model.engine, output(model)
    accelerate(model)
    output(model)
    monkeypatch.setattr(Graphed, "_capture", lambda *_: pytest.fail("captured again"))
    model.engine = first
    assert torch.equal(output(model), wanted)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_eight_bits_are_close(kind: str) -> None:
    model = drawn("sd35", torch.bfloat16)
    wanted = output(model)
    try:
        accelerate(model, quantize=kind)
    except ValueError as error:
        pytest.skip(str(error))
    assert relative(output(model), wanted) < 0.1


def test_a_threshold_of_zero_skips_no_step() -> None:
    model = drawn("sd35", torch.bfloat16)
    wanted = output(accelerate(model))
    found = output(accelerate(model, first_block_cache=0.0))
    assert relative(found, wanted) < 2e-3


@pytest.mark.parametrize("own_streams", [False, True], ids=["one stream", "own streams"])
def test_threads_whose_first_pictures_come_together(own_streams: bool) -> None:
    """While one captures, others allocate; and no stream may write what another still reads."""
    model = drawn("debug")
    jobs: list[dict[str, Any]] = [{"batch": 1, "size": (18, 32)}, {"batch": 3}] * 2
    wanted = [output(model, **job) for job in jobs]
    accelerate(model)
    found: dict[int, Tensor] = {}
    start = threading.Barrier(len(jobs))
    torch.cuda.synchronize()

    def work(i: int) -> None:
        stream = torch.cuda.Stream()
        start.wait()
        for _ in range(5):
            with torch.cuda.stream(stream) if own_streams else nullcontext():
                found[i] = output(model, **jobs[i])
        stream.synchronize()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for i, reference in enumerate(wanted):
        assert relative(found[i], reference) < 1e-5
    engine: Any = model.engine
    assert not any(workspace.run._failed for workspace in engine.workspaces.values())


def test_graphs_captured_under_autocast() -> None:
    """They do not read casts of weights that autocast has given back."""
    model = drawn("sd35").requires_grad_(True)

    def run() -> Tensor:
        with torch.autocast(DEVICE, torch.bfloat16):
            return output(model)

    wanted = run()
    accelerate(model)
    for _ in range(3):
        found = run()
        torch.full((2**26,), torch.nan, device=DEVICE)
        assert relative(found, wanted) < 2e-2


@torch.no_grad()
def test_times_that_were_not_prepared_are_no_numbers() -> None:
    model = drawn("text alone modulates")
    wanted = output(model)
    engine: Any = accelerate(model).engine
    x, z, t = inputs(model)
    condition = model.encode_condition(z)
    engine.prepare(t)
    assert relative(model(x, t, condition).sample, wanted) < 1e-5
    engine.prepare(t[1:])
    finite = model(x, t, condition).sample.flatten(1).isfinite().all(1)
    assert finite.tolist() == [False, True, True]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_a_second_gpu() -> None:
    model = drawn("debug")
    x, z, t = inputs(model)
    wanted = output(model)
    accelerate(model.to("cuda:1"))
    x, z, t = (v.to("cuda:1") for v in (x, z, t))
    with torch.no_grad():
        for _ in range(3):
            found = model(x, t, model.encode_condition(z)).sample
            assert relative(found.to(DEVICE), wanted) < 1e-5
