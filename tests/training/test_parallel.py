"""Several processes do what one does: in float64, so that only the order of sums differs."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mimdit.presets import pixel_codec
from tests.training.processes import model32, model64, run_team
from training import loop
from training.config import Settings
from training.loop import train

TOLERANCE = {"rtol": 0.0, "atol": 1e-9}


def settings(folder: Path, batch: int = 2, steps: int = 20) -> Settings:
    return Settings(
        output=str(folder),
        steps=steps,
        stages=((32, batch, 1.0),),
        optimizer="adam",
        schedule="constant",
        learning_rate=1e-3,
        warmup=0,
        mixed_precision="no",
        balance=0.02,
        workers=0,
        checkpointing_steps=steps // 2,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process does with four pictures a step."""
    folder = tmp_path_factory.mktemp("alone")
    run = replace(settings(folder, batch=4), checkpointing_steps=4, keep_checkpoints=0)
    torch.set_num_threads(1)
    train(model64(), pixel_codec(), run)
    return folder


def assert_close(one: Path, two: Path) -> None:
    a, b = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], **TOLERANCE)


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path, alone: Path) -> None:
    averaged = run_team(tmp_path, "two", settings(tmp_path / "two"))
    assert_close(alone / "checkpoint-20", tmp_path / "two/checkpoint-20")
    own = load_file(alone / "checkpoint-20/ema.safetensors")
    before = model64().state_dict()
    assert max((own[n] - before[n]).abs().max() for n in own) > 1e-3
    for name, tensor in own.items():
        torch.testing.assert_close(averaged[name], tensor, **TOLERANCE)


def test_sharded_run_saves_and_goes_on_sharded_or_not(tmp_path: Path, alone: Path) -> None:
    """fully_shard with gloo."""
    run = replace(settings(tmp_path / "run", steps=4), sharded=True)
    run_team(tmp_path, "half", replace(run, steps=2))
    run_team(tmp_path, "whole", run, resume="latest")
    assert_close(alone / "checkpoint-4", tmp_path / "run/checkpoint-4")
    single = settings(tmp_path / "single", batch=4, steps=4)
    train(model64(), pixel_codec(), single, resume=str(tmp_path / "run/checkpoint-2"))
    assert_close(alone / "checkpoint-4", tmp_path / "single/checkpoint-4")


def test_passes_add_up_to_a_larger_batch(tmp_path: Path) -> None:
    one = replace(settings(tmp_path / "one", batch=4, steps=2), balance=0.0)
    more = replace(settings(tmp_path / "more", batch=2, steps=2), balance=0.0, total_batch=4)
    a, b = (train(model64(), pixel_codec(), s).state_dict() for s in (one, more))
    for name, tensor in a.items():
        torch.testing.assert_close(b[name], tensor, **TOLERANCE)


def test_crops_in_turn_are_the_same_for_two_processes(tmp_path: Path) -> None:
    """Also where the run goes on in the middle of a turn."""
    one = replace(settings(tmp_path / "one", steps=5), stages=(((32, 64), (4, 2), 1.0),))
    two = replace(one, output=str(tmp_path / "two"), stages=(((32, 64), (2, 1), 1.0),))
    train(model64(), pixel_codec(), one)
    run_team(tmp_path, "part", replace(two, steps=3))
    run_team(tmp_path, "rest", two, resume="latest")
    assert_close(tmp_path / "one/checkpoint-5", tmp_path / "two/checkpoint-5")


def losses(run: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run / "log.jsonl").read_text().splitlines()]


def test_frozen_backbones_are_sharded_in_bfloat16(tmp_path: Path) -> None:
    """As `paper` with `--fsdp`: both kinds of numbers in one model, passes that add up, validation
    by all processes, and another part of the run; the losses are those of one process."""
    Image.new("RGB", (40, 32), (90, 120, 60)).save(tmp_path / "one.png")
    single = replace(
        settings(tmp_path / "single", batch=4, steps=3),
        mixed_precision="bf16",
        train_backbone=False,
        log_steps=1,
    )
    train(model32(), pixel_codec(), single)
    shared = replace(
        single,
        output=str(tmp_path / "run"),
        stages=((32, 1, 1.0),),
        total_batch=4,
        sharded=True,
        validation_steps=2,
        validation_size=32,
        validation_data=str(tmp_path),
    )
    run_team(tmp_path, "part", replace(shared, steps=2), make=model32)
    final = run_team(tmp_path, "rest", shared, resume="latest", make=model32)
    assert losses(tmp_path / "run") == pytest.approx(
        losses(tmp_path / "single"), rel=5e-3, abs=5e-3
    )
    own = model32().state_dict()
    for name, tensor in final.items():
        if not name.startswith("mim.") and own[name].is_floating_point():
            assert torch.equal(tensor.float(), own[name].bfloat16().float()) or "pos" in name, name
    assert (final["mim.zero_weight"] - own["mim.zero_weight"]).abs().max() > 1e-4
    rows = (tmp_path / "run/validation.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows] == [2, 3]


def test_sharding_names_what_it_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = replace(settings(tmp_path), sharded=True)
    expected = "--fsdp: expected several processes .*without --cpu, .* got one alone$"
    with pytest.raises(ValueError, match=expected):
        train(model64(), pixel_codec(), alone)
    # A launch or configuration of accelerate with FSDP, but of one process.
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=expected):
        train(model64(), pixel_codec(), replace(alone, sharded=False))
    with pytest.raises(ValueError, match=r"multiple of 6 \(3 processes × 2 pictures\), got 4"):
        loop.Schedule(replace(settings(tmp_path), total_batch=4), 3)
