"""Layouts of SD3.5 with a VAE, half precision and later opsets; each traces anew."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from export.cli import main
from export.runtime import ExportedPipeline
from mimdit.loading import load_pipeline
from mimdit.metrics import psnr
from tests.export.conftest import pipeline, sd35
from tests.export.test_graphs import ABLATIONS

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("layout", "precision"),
    [
        ("medium", "fp32"),
        ("large", "fp32"),
        ("plain", "fp32"),
        ("medium", "fp16"),
        ("large", "fp16"),
    ],
)
def test_sd35_layouts(layout: str, precision: str, tmp_path: Path) -> None:
    pipe = sd35(layout)
    pipe.save_pretrained(tmp_path / "model")
    target = tmp_path / "onnx"
    options = ["--out", str(target), "--batch", "1..3", "--precision", precision]
    assert main([str(tmp_path / "model"), *options]) == 0
    passes(target, precision)
    runtime = ExportedPipeline(target, "cpu")
    assert set(runtime.graphs) == {
        *("pool", "conditioner", "denoiser"),
        *("vae_encoder", "vae_decoder"),
    }
    if precision == "fp16":
        return
    x = np.random.default_rng(0).random((1, 150, 300, 3), dtype=np.float32)
    for given in ({"tile": 256}, {"guidance_scale": 3.0}):
        ours, theirs = (
            call(x, 2, generator=torch.Generator().manual_seed(1), output_type="np", **given)
            for call in (runtime, pipe)
        )
        assert psnr(torch.from_numpy(ours.images), torch.from_numpy(theirs.images)) > 60


def passes(folder: Path, precision: str) -> None:
    """Each output within its gate, at two sizes never traced and batches of 1 and 3."""
    checks = json.loads((folder / "parity.json").read_text())["checks"]
    gate = {"fp32": 1e-5, "fp16": 5e-3}[precision]
    plain = [c for c in checks if c["graph"] in ("pool", "conditioner", "denoiser")]
    for check in plain:
        if check["output"] not in ("velocity", "weights") and "fp32" not in check["output"]:
            assert check["error"] <= gate, check
    # The first of all sizes is the one that was traced.
    traced, *unseen = dict.fromkeys(c["size"] for c in plain if c["size"])
    assert {size.split("×")[0] for size in unseen} >= {"1", "3"}
    assert len({size.partition("×")[2] for size in unseen} - {traced.partition("×")[2]}) >= 2
    several = [c["note"] for c in plain if c["output"] == "routing" and c["size"].startswith("3")]
    assert any("2 different" in note or "3 different" in note for note in several), several


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_tiny(precision: str, tmp_path: Path) -> None:
    """The shipped model: gates, and eight steps of a picture."""
    target = tmp_path / "onnx"
    assert main(["--out", str(target), "--precision", precision, "--batch", "1..3"]) == 0
    passes(target, precision)
    if precision == "fp16":
        return
    pipe, runtime = load_pipeline("tiny"), ExportedPipeline(target, "cpu")
    with Image.open(Path(__file__).parents[2] / "examples/degraded/rain.png") as file:
        picture = np.asarray(file.convert("RGB").crop((0, 0, 300, 270)))
    # Several tiles.
    options: dict[str, Any] = {"tile": 256, "output_type": "np"}
    ours, theirs = (
        call(picture, 8, generator=torch.Generator().manual_seed(1), **options)
        for call in (runtime, pipe)
    )
    assert psnr(torch.from_numpy(ours.images), torch.from_numpy(theirs.images)) >= 55


@pytest.mark.parametrize(
    "options",
    [["--precision", "fp16"], ["--opset", "20"], ["--opset", "23"], ["--sizes", "128x128"]],
    ids=str,
)
def test_variants(options: list[str], tmp_path: Path) -> None:
    pipeline().save_pretrained(tmp_path / "model")
    target = tmp_path / "onnx"
    assert main([str(tmp_path / "model"), "--out", str(target), *options]) == 0
    report = json.loads((target / "parity.json").read_text())
    assert report["passed"]
    if "fp16" in options:
        assert {"tokens to fp32", "output to fp32"} <= {c["output"] for c in report["checks"]}


@pytest.mark.parametrize("settings", ABLATIONS, ids=lambda s: " ".join(map(str, s.values())))
def test_ablations(settings: dict[str, Any], tmp_path: Path) -> None:
    pipeline(**settings).save_pretrained(tmp_path / "model")
    # Of these torch traces one size only.
    size = ["--sizes", "64x64"] if settings.get("patch_size") == 1 else []
    assert main([str(tmp_path / "model"), "--out", str(tmp_path / "onnx"), *size]) == 0
