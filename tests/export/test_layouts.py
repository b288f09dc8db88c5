"""Layouts of SD3.5 with a VAE, half precision and later opsets; each traces anew."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from export.cli import main
from export.runtime import ExportedPipeline
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


@pytest.mark.parametrize("layout", ["medium", "large", "plain"])
def test_sd35_layouts(layout: str, tmp_path: Path) -> None:
    pipe = sd35(layout)
    pipe.save_pretrained(tmp_path / "model")
    assert main([str(tmp_path / "model"), "--out", str(tmp_path / "onnx"), "--batch", "1..2"]) == 0
    runtime = ExportedPipeline(tmp_path / "onnx", "cpu")
    assert set(runtime.graphs) == {
        *("pool", "conditioner", "denoiser"),
        *("vae_encoder", "vae_decoder"),
    }
    x = np.random.default_rng(0).random((1, 150, 300, 3), dtype=np.float32)
    for options in ({"tile": 256}, {"guidance_scale": 3.0}):
        ours, theirs = (
            call(x, 2, generator=torch.Generator().manual_seed(1), **options)
            for call in (runtime, lambda *a, **o: pipe(*a, output_type="np", **o))
        )
        assert psnr(torch.from_numpy(ours.images), torch.from_numpy(theirs.images)) > 60


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
    assert "onnxruntime cannot load it" in capsys.readouterr().err.splitlines()[-1]
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize(
    "settings",
    [{"inter": "sparse", "intra": "dense"}, {"groups": ("se", "se"), "experts": 1, "top_k": 1}],
    ids=str,
)
def test_ablations(settings: dict[str, Any], tmp_path: Path) -> None:
    pipeline(**settings).save_pretrained(tmp_path / "model")
    assert main([str(tmp_path / "model"), "--out", str(tmp_path / "onnx")]) == 0
