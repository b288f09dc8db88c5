"""Layouts of SD3.5 with a VAE, half precision and later opsets; each traces anew."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from export.cli import main
from export.runtime import ExportedPipeline
from mimdit.loading import load_pipeline
from mimdit.metrics import psnr
from mimdit.pipeline import MiMDiTPipeline
from mimdit.transformer import MiMDiTTransformer2DModel
from tests.export.conftest import pipeline
from tests.mimdit.sd35_folder import backbone, vae

pytestmark = pytest.mark.slow


def sd35(layout: str) -> MiMDiTPipeline:
    torch.manual_seed(0)
    prompts: dict[str, Any] = {
        "prompts": ("empty", "positive", "negative"),
        "prompt_embeds": torch.randn(3, 5, 32),
        "pooled_prompt_embeds": torch.randn(3, 64),
    }
    model = MiMDiTTransformer2DModel.from_backbone(backbone(layout), mim_dim=64, **prompts)
    # Otherwise its pictures would be encoded in diffusers' tiles from 128 pixels.
    codec = AutoencoderKL.from_config(dict(vae().config) | {"sample_size": 512}).eval()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = MiMDiTPipeline(model.randomize_(0), codec, scheduler, default_steps=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


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
            call(x, 2, generator=torch.Generator().manual_seed(1), **given)
            for call in (runtime, lambda *a, **o: pipe(*a, output_type="np", **o))
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
    ours, theirs = (
        call(picture, 8, generator=torch.Generator().manual_seed(1), output_type="np")
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


def test_no_bfloat16_on_this_device(tmp_path: Path, capsys: Any) -> None:
    """ONNX Runtime has few bfloat16 operators for CPUs: said in one line, and nothing is left."""
    assert main(["debug", "--out", str(tmp_path / "onnx"), "--precision", "bf16"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "onnxruntime cannot load it" in line and "--no-check" in line
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "settings",
    [{"inter": "sparse", "intra": "dense"}, {"groups": ("se", "se"), "experts": 1, "top_k": 1}],
    ids=str,
)
def test_ablations(settings: dict[str, Any], tmp_path: Path) -> None:
    pipeline(**settings).save_pretrained(tmp_path / "model")
    assert main([str(tmp_path / "model"), "--out", str(tmp_path / "onnx")]) == 0
