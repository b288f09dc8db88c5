"""Exported graphs against the model."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

pytest.importorskip("onnxruntime")

from export.checks import Check, relative_error
from export.graphs import depthwise3x3
from export.libraries import ExportError
from export.parity import check_graphs
from export.runtime import ExportedPipeline, euler_sigmas
from mimdit.metrics import psnr
from mimdit.report import expert_names
from mimkernels import expert_depthwise3x3
from tests.export.conftest import Exported, pipeline


@pytest.fixture(scope="module")
def runtime(exported: Exported) -> ExportedPipeline:
    runtime = ExportedPipeline(exported.folder, "cpu", threads=1)
    runtime.set_progress_bar_config(disable=True)
    return runtime


def picture(height: int, width: int, count: int = 1) -> np.ndarray:
    return np.random.default_rng(0).random((count, height, width, 3), dtype=np.float32)


def test_every_gate_holds_also_at_sizes_never_traced(exported: Exported) -> None:
    report = json.loads((exported.folder / "parity.json").read_text())
    assert report["passed"] and exported.code == 0, exported.err
    gated = [c for c in report["checks"] if c["gate"] is not None and c["graph"] != "picture"]
    assert {c["graph"] for c in gated} == {"pool", "conditioner", "denoiser"}
    for weights, sizes in (
        ("own", {"", "2×11×13", "1×11×13", "1×16×16", "3×17×12", "1×10×15"}),
        ("drawn", {"2×11×13"}),
    ):
        assert {c["size"] for c in gated if c["weights"] == weights} == sizes
    assert {c["inputs"] for c in gated} == {"random", "photograph"}
    assert all(c["error"] <= 1e-5 for c in gated if c["output"] != "velocity")
    assert all(c["error"] <= 2e-4 for c in gated)
    assert all(c["error"] == 0 for c in gated if c["output"] == "weights")
    steps = [c["note"] for c in gated if c["output"] == "output by step"]
    assert steps == [f"step {i} of 8" for i in range(1, len(steps) + 1)] and len(steps) >= 3
    several = [c["note"] for c in gated if "routing" in c["output"] and c["size"] == "3×17×12"]
    assert len(several) == 4
    assert all("different routings of 3 pictures" in note for note in several)
    assert "3 different routings" in several[0]
    (restored,) = (c for c in report["checks"] if c["graph"] == "picture")
    assert restored["error"] < 1e-3


@pytest.mark.parametrize("size", [(1, 24, 8), (2, 9, 23)], ids=str)
def test_other_sizes(
    exported: Exported, runtime: ExportedPipeline, size: tuple[int, int, int]
) -> None:
    checks = check_graphs(exported.pipe, runtime.graphs, "fp32", [size], seed=1)
    assert len(checks) >= 18
    assert [c for c in checks if not c.passed] == []


def test_other_weights_fail(runtime: ExportedPipeline) -> None:
    checks = check_graphs(pipeline(seed=1), runtime.graphs, "fp32", [(1, 8, 8)])
    assert {c.graph for c in checks if not c.passed} == {"pool", "conditioner", "denoiser"}


def test_pictures_take_their_own_experts(exported: Exported, runtime: ExportedPipeline) -> None:
    """Two pictures of one batch pick differently, and each as it does alone."""
    model = exported.pipe.transformer
    z_lq = torch.rand(2, 48, 32, 24, generator=torch.Generator().manual_seed(0)) * 0.2 - 1
    z_lq[1] += 1.8
    with torch.no_grad():
        found = model.encode_condition(z_lq)
    means = runtime.graphs["pool"](z_lq=z_lq)["means"]
    out = runtime.graphs["conditioner"](z_lq=z_lq, means=means)
    assert (out["index"][:, 0] != out["index"][:, 1]).any(-1).sum() >= 2
    np.testing.assert_array_equal(out["index"], found.routing.index.numpy())
    assert relative_error(out["tokens"], torch.stack(found.tokens)) <= 1e-5
    alone = runtime.graphs["conditioner"](z_lq=z_lq[1:], means=means[:, 1:])
    np.testing.assert_array_equal(alone["index"], out["index"][:, 1:])
    swapped = runtime.graphs["conditioner"](z_lq=z_lq, means=means[:, ::-1])
    np.testing.assert_array_equal(swapped["index"], out["index"][:, ::-1])
    assert relative_error(swapped["tokens"], torch.stack(found.tokens)) > 1e-2


def test_ties_go_to_the_lowest_expert(runtime: ExportedPipeline) -> None:
    z_lq = torch.zeros(1, 48, 16, 16)
    means = np.zeros_like(runtime.graphs["pool"](z_lq=z_lq)["means"])
    out = runtime.graphs["conditioner"](z_lq=z_lq, means=means)
    np.testing.assert_array_equal(out["intra"][0], np.full((1, 4, 2), 0.25, np.float32))
    np.testing.assert_array_equal(out["index"][0], np.broadcast_to([0, 1], (1, 4, 2)))


CALLS: list[tuple[tuple[int, int], dict[str, Any]]] = [
    ((131, 257), {}),
    ((90, 5), {"num_inference_steps": 3}),
    (
        (150, 120),
        {"num_inference_steps": 1, "shifts": 4, "tile": 96, "tile_overlap": 16, "tile_batch": 3},
    ),
    ((128, 140), {"num_inference_steps": 2, "guidance_scale": 2.5, "tile_overlap": 16}),
    ((128, 128), {"num_inference_steps": 1, "strength": 0.7, "color_fix": "adain"}),
    ((150, 120), {"num_inference_steps": 1, "tile": 96, "routing": "tile", "tile_batch": 2}),
]


@pytest.mark.parametrize(("size", "options"), CALLS, ids=str)
def test_pictures_equal_the_pipelines(
    exported: Exported,
    runtime: ExportedPipeline,
    size: tuple[int, int],
    options: dict[str, Any],
) -> None:
    count = 2 if "tile" in options else 1
    options = options | {"output_type": "np"}
    ours, theirs = (
        call(picture(*size, count), generator=torch.Generator().manual_seed(3), **options)
        for call in (runtime, exported.pipe)
    )
    assert ours.images.shape == (count, *size, 3)
    assert psnr(torch.from_numpy(ours.images), torch.from_numpy(theirs.images)) > 60
    np.testing.assert_array_equal(ours.routing.index, theirs.routing.index.numpy())
    other = runtime(picture(*size, count), generator=torch.Generator().manual_seed(4), **options)
    assert not np.array_equal(ours.images, other.images)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps: expected at least 1, got 0"),
        ({"shifts": 3}, "shifts: expected one of 1, 2, 4, got 3"),
        ({"shifts": 0}, "shifts: expected one of 1, 2, 4, got 0"),
        ({"tile_batch": -1}, r"tile_batch: expected 0 \(automatic\) or more, got -1"),
        ({"tile": -8}, r"tile: expected 0 \(automatic\) or pixels, got -8"),
        ({"tile_overlap": -8}, "tile_overlap: expected at least 0, got -8"),
        ({"routing": "all"}, "routing: expected one of picture, tile, got 'all'"),
        ({"experts": {"se": 1}}, "experts: expected none for an exported folder, got {'se': 1}"),
        ({"tile": 40}, "tile: expected 0 or 64 to 192 pixels, got 40"),
        ({"strength": 2}, "strength: expected 0 to 1, got 2"),
        ({"color_fix": "red"}, "color_fix: expected one of none, adain, wavelet, got 'red'"),
        ({"output_type": "jpg"}, "output_type: expected pil, np, pt or latent, got 'jpg'"),
        ({"prompt": "a cat"}, "prompt: expected none for an exported folder, got 'a cat'"),
        ({"negative_prompt": ""}, "negative_prompt: expected none for an exported folder, got ''"),
        (
            {"callback_on_step_end_tensor_inputs": ["latents", "noise"]},
            "callback_on_step_end_tensor_inputs: expected latents, got 'noise'",
        ),
        (
            {"generator": [torch.Generator()] * 2},
            "generator: expected one, or 1 for as many pictures, got 2",
        ),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
def test_wrong_arguments(runtime: ExportedPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        runtime(picture(16, 16), **options)


def test_results_are_those_of_the_pipeline(exported: Exported, runtime: ExportedPipeline) -> None:
    """Every kind of result, generators picture by picture, and what is told on the way."""
    calls: dict[Any, Any] = {"ours": runtime, "theirs": exported.pipe}
    said: dict[str, list[Any]] = {name: [] for name in calls}
    found: dict[str, dict[str, Any]] = {name: {} for name in calls}
    for name, call in calls.items():

        def step_end(pipe: Any, i: int, t: Any, state: Any, name: str = name) -> dict[str, Any]:
            said[name].append((i, round(float(t)), [*state]))
            return {"latents": state["latents"] * 0.9}

        for kind in ("pil", "np", "pt", "latent"):
            generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
            out = call(
                picture(60, 150, 2),
                2 if kind == "np" else 1,
                2,
                generator=generators,
                tile=128,
                tile_batch=1,
                output_type=kind,
                callback_on_step_end=step_end,
                progress=lambda *counts, name=name: said[name].append(counts),
                return_dict=False,
            )
            found[name][kind] = out[0]
    assert said["ours"] == said["theirs"]
    for kind in ("np", "pt", "latent"):
        ours, theirs = (torch.as_tensor(found[name][kind]) for name in calls)
        assert ours.shape == theirs.shape and relative_error(ours, theirs) < 1e-3
    for ours, theirs in zip(found["ours"]["pil"], found["theirs"]["pil"], strict=True):
        np.testing.assert_allclose(np.asarray(ours, int), np.asarray(theirs, int), atol=1)


def test_devices_are_named(exported: Exported, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in ("cuda:1", "mps"):
        message = f"device: expected auto, cpu or cuda for an exported folder, got '{device}'"
        with pytest.raises(ExportError, match=message):
            ExportedPipeline(exported.folder, device)
    ort = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ExportError, match="with CUDAExecutionProvider for cuda, got one with CPU"):
        ExportedPipeline(exported.folder, "cuda", runtime="onnxruntime")


def test_hosts_without_a_gpu_take_the_cpu(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where ONNX Runtime has what a GPU would need."""
    ort = pytest.importorskip("onnxruntime")
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(ort, "get_available_providers", lambda: providers)
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always")
        runtime = ExportedPipeline(exported.folder)
        with pytest.raises(ExportError, match="onnxruntime cannot use cuda"):
            ExportedPipeline(exported.folder, "cuda")
    assert {graph.device for graph in runtime.graphs.values()} == {"cpu"}
    message = "pool.onnx: onnxruntime cannot use cuda; see its messages; the CPU takes its place"
    assert message in [str(note.message) for note in notes]


def test_experts_have_the_names_that_the_pipelines_have(
    exported: Exported, runtime: ExportedPipeline
) -> None:
    """In reports, also of pictures that leave the last ones out."""
    routing = {"inter": np.ones((2, 1, 4)), "index": np.zeros((2, 1, 4, 2), int)}
    names = expert_names(runtime, routing)
    assert names == expert_names(exported.pipe, routing) != expert_names(object(), routing)


def test_too_many_pictures(runtime: ExportedPipeline) -> None:
    with pytest.raises(ValueError, match="expected 1 to 3 pictures at once, got 4"):
        runtime(picture(16, 16, 4))


def test_restores_without_diffusers(exported: Exported, tmp_path: Path) -> None:
    script = (
        "import sys\n"
        "for name in ('diffusers', 'transformers', 'onnx', 'onnxscript'):\n"
        "    sys.modules[name] = None\n"
        "import numpy as np, torch\n"
        "from export.runtime import ExportedPipeline\n"
        f"restore = ExportedPipeline({str(exported.folder)!r}, 'cpu', threads=1)\n"
        "x = np.load(sys.argv[1])\n"
        "out = restore(x, 1, generator=torch.Generator().manual_seed(3), output_type='np')\n"
        "assert not any(m in sys.modules for m in ('mimdit.mim', 'mimdit.transformer'))\n"
        "np.save(sys.argv[1], out.images)\n"
    )
    path = tmp_path / "x.npy"
    np.save(path, picture(40, 30))
    # The parent's interpreter of kernels is not for the child.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(p for p in (os.getcwd(), *sys.path) if p)
    subprocess.run([sys.executable, "-c", script, str(path)], check=True, env=environment)
    expected = exported.pipe(
        picture(40, 30), 1, generator=torch.Generator().manual_seed(3), output_type="np"
    )
    assert psnr(torch.from_numpy(np.load(path)), torch.from_numpy(expected.images)) > 60


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 4, 40])
def test_noise_levels_are_the_schedulers(shift: float, steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    ends = {"sigma_max": scheduler.sigma_max, "sigma_min": scheduler.sigma_min}
    scheduler.set_timesteps(steps)
    found = euler_sigmas({"shift": shift, "train_steps": 1000, **ends}, steps)
    np.testing.assert_array_equal(found, scheduler.sigmas.numpy())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_depthwise_products_are_the_convolution(dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 3, 5, 7, 8), torch.randn(6, 8, 3, 3)
    index = torch.tensor([[0, 5, 5], [3, 1, 0]])
    wide = expert_depthwise3x3(x.to(dtype).double(), weight.to(dtype).double(), index)
    found = depthwise3x3(x.to(dtype), weight.to(dtype), index)
    assert found.dtype == dtype
    assert relative_error(found.double(), wide) <= 2 * torch.finfo(dtype).eps


def test_verdicts() -> None:
    check = Check("g", "o", "1×8×8", 1e-6, 1e-5)
    assert check.passed
    assert not replace(check, error=float("nan")).passed
    assert not replace(check, error=2e-5).passed
    assert replace(check, error=1.0, gate=None).passed
    assert replace(check, error=float("inf")).as_dict()["error"] == "inf"
    assert relative_error(np.ones(3), torch.zeros(3)) > 1
