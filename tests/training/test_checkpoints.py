"""Going on from checkpoints: what is taken over, noted, made up for, and never written."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mimdit.loading import assemble
from mimdit.presets import build, pixel_codec
from tests.training.short_runs import quick, settings
from training import checkpoints
from training.loop import train
from training.train import main
from training.validation import Validator


def test_resume_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint-N folder"):
        train(build("debug"), pixel_codec(), settings(tmp_path, 2), resume="latest")


def test_a_run_goes_on_with_other_rates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As after a loss that was not finite; those of the checkpoint must not come back."""
    train(build("debug"), pixel_codec(), quick(tmp_path, 2))
    still = quick(tmp_path, 4, learning_rate=0.0, matrix_learning_rate=0.0)
    train(build("debug"), pixel_codec(), still, resume="latest")
    assert "note: goes on with another setting, learning_rate: 0.0008 → 0.0" in (
        capsys.readouterr().out
    )
    two, four = (load_file(tmp_path / f"checkpoint-{n}/model.safetensors") for n in (2, 4))
    assert all(torch.equal(two[n], four[n]) for n in two if "running" not in n)
    for name in ("optimizer.bin", "optimizer_1.bin"):
        state = torch.load(tmp_path / "checkpoint-4" / name, weights_only=True)
        assert [group["lr"] for group in state["param_groups"]] == [0.0]


def test_going_back_leaves_later_checkpoints_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = quick(tmp_path, 3)
    train(build("debug"), pixel_codec(), run)
    # A copy with a name of its own is not a checkpoint of the run.
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-2-good")
    train(build("debug"), pixel_codec(), replace(run, steps=2), resume="checkpoint-1")
    names = {"checkpoint-1", "checkpoint-2", "checkpoint-2-good", "left-checkpoint-3"}
    assert {p.name for p in tmp_path.glob("*checkpoint-*")} == names
    assert [checkpoints.step_of(p) for p in checkpoints.found(tmp_path)] == [1, 2]
    assert f"is now {tmp_path / 'left-checkpoint-3'}" in capsys.readouterr().out
    with pytest.raises(ValueError, match="expected a checkpoint-N folder, got checkpoint-9"):
        train(build("debug"), pixel_codec(), run, resume="checkpoint-9")
    weights = tmp_path / "checkpoint-2/ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"resume: .*checkpoint-2 is broken: ") as error:
        train(build("debug"), pixel_codec(), run, resume="latest")
    assert "\n" not in str(error.value)


def test_another_number_of_processes_is_noted(tmp_path: Path) -> None:
    run = quick(tmp_path, 1)
    train(build("debug"), pixel_codec(), run)
    folder = tmp_path / "checkpoint-1"
    assert checkpoints.changes(folder, run, 1) == []
    assert checkpoints.changes(folder, run, 2) == ["processes: 1 → 2"]
    held = replace(run, total_batch=2)
    assert checkpoints.changes(folder, held, 2) == ["total_batch: 0 → 2"]


def test_other_routing_of_the_model_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tensors have the same shapes, so nothing else would tell."""
    train(build("debug"), pixel_codec(), quick(tmp_path, 1))
    train(build("debug", top_k=1), pixel_codec(), quick(tmp_path, 2), resume="latest")
    said = capsys.readouterr().out
    assert "another setting, top_k: 2 → 1" in said and said.count("note: ") == 2


def test_a_validation_that_a_kill_cut_off_is_made_up_for(tmp_path: Path) -> None:
    Image.new("RGB", (40, 32), (90, 120, 60)).save(tmp_path / "one.png")
    run = quick(tmp_path / "run", 2, validation_steps=2, validation_size=32)
    run = replace(run, validation_data=str(tmp_path))

    class Killed(Validator):
        def __call__(self, step: int, write: bool = True) -> tuple:
            raise RuntimeError(f"at {step}")

    model = build("debug")
    with pytest.raises(RuntimeError, match="at 2"):
        train(model, pixel_codec(), run, None, Killed(assemble(model, 1), run))
    for _ in range(2):
        model = build("debug")
        train(model, pixel_codec(), run, "latest", Validator(assemble(model, 1), run))
        rows = (tmp_path / "run/validation.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == [2]


def test_a_full_disk_is_one_sentence_and_leaves_whole_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = torch.save

    def full(state: object, path: Path) -> None:
        if path.parent.name == ".unfinished-2":
            raise RuntimeError("PytorchStreamWriter failed writing file data.pkl\nmore")
        own(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="checkpoint-2 cannot be written: PytorchStream") as error:
        train(build("debug"), pixel_codec(), quick(tmp_path, 3))
    assert "\n" not in str(error.value)
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == ["checkpoint-1"]


def test_weights_that_are_not_finite_are_no_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after a gradient that overflowed: the loss of its step was still finite."""
    train(build("debug"), pixel_codec(), quick(tmp_path, 1))

    def overflow(parameters: list[torch.nn.Parameter], norm: float) -> None:
        parameters[0].grad = torch.full_like(parameters[0], torch.inf)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", overflow)
    with pytest.raises(ValueError, match=r"weights: expected finite numbers, .* step 2;"):
        train(build("debug"), pixel_codec(), quick(tmp_path, 2), resume="latest")
    assert [p.name for p in checkpoints.found(tmp_path)] == ["checkpoint-1"]


def test_two_runs_do_not_share_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if sys.platform == "win32":
        pytest.skip("no locks of this kind")
    hold = (
        "import sys, time\nfrom pathlib import Path\nfrom training.lock import locked\n"
        "with locked(Path(sys.argv[1])):\n    print('in', flush=True)\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", hold, str(tmp_path / "run")]
    other = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    run = ["--preset", "debug", "--output", str(tmp_path / "run"), "--max-train-steps", "1"]
    run += ["--resolution", "64", "--train-batch-size", "1", "--mixed-precision", "no"]
    try:
        assert other.stdout is not None and other.stdout.readline() == "in\n"
        assert main(run) == 1
        assert f"error: output: {tmp_path}/run is in use by another run" in capsys.readouterr().err
        assert not (tmp_path / "run/settings.json").exists()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert main(run) == 0 and (tmp_path / "run/model").is_dir()
