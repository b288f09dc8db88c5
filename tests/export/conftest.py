"""One exported folder for all tests: tracing takes longer than everything else together."""

import contextlib
import io
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from mimdit.loading import assemble, load_pipeline
from mimdit.pipeline import MiMDiTPipeline
from mimdit.presets import build
from mimdit.transformer import MiMDiTTransformer2DModel
from tests.export.tiny_engines import Exports
from tests.mimdit.sd35_folder import backbone, vae

GPU_A = {"name": "GPU A", "capability": "90"}
# Of the exports that `reuse` stands for.
UNCHECKED = ["--batch", "1..3", "--no-check"]


@dataclass(frozen=True)
class Exported:
    """A model folder, its pipeline, and what `mimdit-export` made of it and printed.

    programs: that the graphs were made of, by name.
    """

    model: Path
    pipe: MiMDiTPipeline
    folder: Path
    code: int
    out: str
    err: str
    programs: dict[str, Any]


def pipeline(seed: int = 0, **settings: Any) -> MiMDiTPipeline:
    """A `debug` model whose grids may be larger, with three prompts and drawn weights."""
    torch.manual_seed(seed)
    prompts = ("empty", "positive", "negative")
    model = build("debug", pos_embed_max_size=24, prompts=prompts, **settings)
    model.randomize_(seed).eval()
    # Means of zero then give the first block's experts equal weights.
    model.mim.running_mean[0] = 0
    with torch.no_grad():
        model.pooled_prompt_embeds.normal_()
    pipe = assemble(model, default_steps=2, default_shifts=2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sd35(layout: str = "medium", side: int = 512) -> MiMDiTPipeline:
    """A small model in a layout of SD3.5, whose codec takes tiles of `side` pixels."""
    torch.manual_seed(0)
    prompts: dict[str, Any] = {
        "prompts": ("empty", "positive", "negative"),
        "prompt_embeds": torch.randn(3, 5, 32),
        "pooled_prompt_embeds": torch.randn(3, 64),
    }
    model = MiMDiTTransformer2DModel.from_backbone(backbone(layout), mim_dim=64, **prompts)
    codec = AutoencoderKL.from_config(dict(vae().config) | {"sample_size": side}).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = MiMDiTPipeline(model.randomize_(0), codec, scheduler, default_steps=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from export import folder
    from export.cli import main

    programs: dict[str, Any] = {}

    def export_onnx(*arguments: Any) -> Any:
        written = original(*arguments)
        programs[written.graph] = written.program
        return written

    original = folder.export_onnx
    place = tmp_path_factory.mktemp("export")
    pipe = pipeline()
    pipe.save_pretrained(place / "model")
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(folder, "export_onnx", export_onnx)
        code = main([str(place / "model"), "--out", str(place / "onnx"), "--batch", "1..3"])
    # Its own copy, as the command had: memory alignment changes the last bits.
    read = load_pipeline(str(place / "model"))
    read.set_progress_bar_config(disable=True)
    texts = (out.getvalue(), err.getvalue())
    return Exported(place / "model", read, place / "onnx", code, *texts, programs)


@pytest.fixture(scope="session", autouse=True)
def tiny_exports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Exports | None]:
    """Of the cases of `test_tiny_engines` that will be asked for; they begin with the first test
    of this folder.
    """
    tests = (item for item in request.session.items if isinstance(item, pytest.Function))
    names = [t.callspec.params["name"] for t in tests if t.originalname == "test_engines_of_tiny"]
    if not names or find_spec("tensorrt_rtx") is None:
        yield None
        return
    exports = Exports(names, tmp_path_factory.mktemp("tiny"))
    yield exports
    exports.stop()


def reuse(exported: Exported, change: Callable[[Path], None] = lambda _: None) -> Any:
    """In place of an export that takes long: the files of an earlier one, changed."""
    from export.limits import Limits
    from export.onnx_export import Written

    def copy(graph: Any, work: Path, limits: Limits, opset: int) -> Written:
        file = f"{graph.name}.onnx"
        shutil.copy(exported.folder / file, work / file)
        change(work / file)
        return Written(graph.name, file, 1, 0.0, exported.programs[graph.name])

    return copy


def with_gpu(patch: pytest.MonkeyPatch, found: dict[str, str] | None) -> None:
    """What all modules take for the GPU of this machine."""
    from export import backends, cache, engines, plan

    for module in (engines, cache, backends, plan):
        patch.setattr(module, "gpu", lambda: found)


def with_tensorrt(patch: pytest.MonkeyPatch) -> Any:
    """A recording `tensorrt`, a GPU, and sessions whose memory is the CPU's."""
    pytest.importorskip("onnxruntime")
    from export import backends, locate
    from export.sessions import EngineSession
    from tests.export import fake_tensorrt

    fake = fake_tensorrt.module("10.16.1")
    patch.setitem(sys.modules, "tensorrt", fake)
    with_gpu(patch, GPU_A)
    for module in (backends, locate):
        patch.setattr(module, "EngineSession", partial(EngineSession, device="cpu"))
    return fake


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Any:
    return with_tensorrt(monkeypatch)


@pytest.fixture(scope="session")
def engines(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with engines of the stand-in, to be checked at one size and with one step."""
    from export import cli, folder, plan

    def short(pipe: MiMDiTPipeline, args: Any) -> Any:
        return replace(whole(pipe, args), sizes=[(2, 11, 13)])

    whole, target = plan.plan, tmp_path_factory.mktemp("engines") / "built"
    with pytest.MonkeyPatch.context() as patch:
        with_tensorrt(patch)
        patch.setattr(plan, "STEPS", 1)
        patch.setattr(plan, "plan", short)
        patch.setattr(folder, "export_onnx", reuse(exported))
        assert cli.main([str(exported.model), "--out", str(target), "--trt", *UNCHECKED]) == 0
    return target


@pytest.fixture
def built(engines: Path, tensorrt: Any, tmp_path: Path) -> Path:
    """A copy of `engines` where they can run."""
    return Path(shutil.copytree(engines, tmp_path / "built"))
