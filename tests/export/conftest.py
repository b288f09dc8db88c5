"""One exported folder for all tests: tracing takes longer than everything else together."""

import contextlib
import io
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from mimdit.loading import assemble, load_pipeline
from mimdit.pipeline import MiMDiTPipeline
from mimdit.presets import build


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


def reuse(exported: Exported, change: Callable[[Path], None] = lambda _: None) -> Any:
    """In place of an export that takes long: the files of an earlier one, changed."""
    from export.onnx_export import Limits, Written

    def copy(graph: Any, work: Path, limits: Limits, opset: int) -> Written:
        file = f"{graph.name}.onnx"
        shutil.copy(exported.folder / file, work / file)
        change(work / file)
        return Written(graph.name, file, 1, 0.0, exported.programs[graph.name])

    return copy
