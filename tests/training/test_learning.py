"""What training must be able to do: learn eight pictures by heart, with kernels as without."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from mimdit.presets import build, pixel_codec
from mimkernels.backend import use_backend
from training.batches import DrawnPairs
from training.config import Settings
from training.loop import train
from training.step import FlowStep
from training.warm_start import align_positions_


class Eight(Dataset[dict[str, Any]]):
    """The same eight pairs again and again, each with one kind of damage or a mixture."""

    def __init__(self, seed: int = 6) -> None:
        drawn = DrawnPairs(32, seed=seed, mixtures=0.2)
        self.pairs = [drawn[i] for i in range(8)]

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.pairs[index % 8]


@pytest.mark.parametrize(
    ("steps", "least"), [(60, -2.2), pytest.param(120, -2.8, marks=pytest.mark.slow)]
)
def test_eight_pictures_are_learned_by_heart(tmp_path: Path, steps: int, least: float) -> None:
    """The loss, the mean logarithm of the squared error, falls below −2.2 in 60 steps.

    A fresh model returns the damaged pictures, so the first loss, about −0.6, is theirs.
    """
    losses, share = learn(Eight(), tmp_path, steps)
    assert -0.9 < losses[0] < -0.4
    assert sum(losses[-5:]) / 5 < least
    assert share > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_any_eight_pictures_use_all_experts(tmp_path: Path, seed: int) -> None:
    losses, share = learn(Eight(seed), tmp_path, 60)
    assert sum(losses[-5:]) / 5 < losses[0] - 0.2
    assert share > 0.05


def learn(pairs: Eight, folder: Path, steps: int) -> tuple[list[float], float]:
    """The losses of a fresh model, and the least sub-expert's share of the last 20 steps.

    That is the mean of each step's least: the least of all 20 together is no less.
    """
    torch.manual_seed(0)
    model = align_positions_(build("debug"))
    settings = Settings(
        output=str(folder),
        steps=steps,
        stages=((32, 8, 1.0),),
        learning_rate=4e-3,
        matrix_learning_rate=6e-3,
        warmup=5,
        pure_noise=1.0,
        balance=0.05,
        mixed_precision="no",
        workers=0,
        checkpointing_steps=steps,
        log_steps=1,
    )
    train(model, pixel_codec(), settings, source=pairs)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    shares = [row["least_expert_share"] for row in rows[-20:]]
    return [row["loss"] for row in rows], sum(shares) / 20


@pytest.mark.slow
def test_a_step_with_kernels_equals_one_without() -> None:
    """Loss and all gradients, in Triton's interpreter; gradients relative to each one's largest."""
    pytest.importorskip("triton")
    model = build("debug", num_layers=1, dual_attention_layers=(), experts=2).randomize_(0)
    step = FlowStep(model, 0.02, False, lambda share: share).train()
    generator = torch.Generator().manual_seed(0)
    x0, z_lq, noise = torch.randn(3, 1, 48, 8, 8, generator=generator) * 0.5
    found = {}
    for backend in ("torch", "triton"):
        model.zero_grad()
        with use_backend(backend):
            loss = step(x0, z_lq, torch.tensor([0.7]), noise, 1, 2)[0]
            loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[backend] = loss.item(), grads
    (a, eager), (b, fused) = found["torch"], found["triton"]
    assert a == pytest.approx(b, rel=1e-5)
    assert eager.keys() == fused.keys() and len(eager) > 40
    for name, grad in eager.items():
        scale = grad.abs().max() + 1e-6
        assert (fused[name] - grad).abs().max() / scale < 2e-4, name


def test_frozen_backbones_are_kept_in_bfloat16_and_trained_parts_are_not(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = build("debug")
    before = {n: p.detach().bfloat16().clone() for n, p in model.named_parameters()}
    settings = Settings(
        output=str(tmp_path),
        steps=2,
        stages=((32, 2, 1.0),),
        optimizer="adamw",
        train_backbone=False,
        warmup=1,
        workers=0,
    )
    model.enable_gradient_checkpointing()
    train(model, pixel_codec(), settings, source=Eight())
    for name, parameter in model.named_parameters():
        trained = name.startswith("mim.")
        assert parameter.dtype == (torch.float32 if trained else torch.bfloat16)
        if not trained:
            assert torch.equal(parameter, before[name])
    # The zero layer moves first: nothing else has a gradient before it has.
    assert not torch.equal(model.mim.zero_weight.bfloat16(), before["mim.zero_weight"])


def test_eight_bit_adam_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", None)
    wanted = {"output": str(tmp_path), "steps": 1, "stages": ((64, 1, 1.0),)}
    settings = replace(Settings(), optimizer="adam8bit", **wanted)
    with pytest.raises(ValueError, match="needs bitsandbytes: pip install bitsandbytes"):
        train(build("debug"), pixel_codec(), settings)
