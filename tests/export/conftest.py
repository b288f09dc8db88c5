"""One exported folder for all tests: tracing takes longer than everything else together."""

import contextlib
import io
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
    """A model folder, its pipeline, and what `mimdit-export` made of it and printed."""

    model: Path
    pipe: MiMDiTPipeline
    folder: Path
    code: int
    out: str
    err: str


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
    from export.cli import main

    place = tmp_path_factory.mktemp("export")
    pipe = pipeline()
    pipe.save_pretrained(place / "model")
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(place / "model"), "--out", str(place / "onnx"), "--batch", "1..3"])
    # Its own copy, as the command had: memory alignment changes the last bits.
    read = load_pipeline(str(place / "model"))
    read.set_progress_bar_config(disable=True)
    return Exported(place / "model", read, place / "onnx", code, out.getvalue(), err.getvalue())
