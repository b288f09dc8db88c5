"""A run that is interrupted anywhere and goes on ends with the weights of one that never was."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.training.processes import command as train_command
from tests.training.processes import finish, server, start
from training import checkpoints
from training.interrupt import Stopped, StopRequests

STEPS = 9


def arguments(folder: Path, steps: int = STEPS) -> list[str]:
    flags = f"--preset debug --output {folder} --max-train-steps {steps} --lr-warmup-steps 2"
    flags += " --checkpointing-steps 2 --logging-steps 1 --balance 0.01"
    # The crops of the second stage take turns; checkpoints 4, 6 and 8 are in the middle of one.
    stages = "32:3:0.25;64:1+32:2:0.75"
    return [*flags.split(), "--stages", stages, "--dataloader-num-workers", "0"]


RESUME = ["--resume-from-checkpoint", "latest"]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "run"
    assert finish(start(train_command, arguments(folder))) == 0
    return folder


def assert_equal_runs(one: Path, two: Path, steps: int = STEPS) -> None:
    """Weights, averages, optimisers, and what was logged but for times."""
    names = [f"checkpoint-{steps}/model.safetensors", f"checkpoint-{steps}/ema.safetensors"]
    for name in (*names, "model/transformer/diffusion_pytorch_model.safetensors"):
        a, b = load_file(one / name), load_file(two / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    for name in ("optimizer.bin", "optimizer_1.bin"):
        a, b = (
            torch.load(run / f"checkpoint-{steps}" / name, weights_only=True) for run in (one, two)
        )
        assert a["param_groups"] == b["param_groups"]
        torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    losses = [
        {
            row["step"]: row["loss"]
            for row in map(json.loads, (run / "log.jsonl").read_text().splitlines())
        }
        for run in (one, two)
    ]
    assert losses[0] == losses[1]


def test_killed_in_a_step_in_a_save_and_in_a_clean_up(tmp_path: Path, undisturbed: Path) -> None:
    run = tmp_path / "run"
    for fault, kept in (("step", {2, 4}), ("write", {4, 6}), ("drop", {6, 8}), (None, {8, 9})):
        code = finish(start(train_command, [*arguments(run), *RESUME], fault))
        assert code == (-signal.SIGKILL if fault else 0)
        steps = {checkpoints.step_of(folder) for folder in checkpoints.found(run)}
        assert steps == kept, fault
    assert not list(run.glob(".*"))
    assert_equal_runs(undisturbed, run)


def test_sigterm_saves_and_ends_well(tmp_path: Path, undisturbed: Path) -> None:
    run, begun = tmp_path / "run", server().Event()
    process = start(train_command, arguments(run), None, begun)
    assert begun.wait(900)
    os.kill(process.pid or 0, signal.SIGTERM)
    assert finish(process) == 0
    stopped = checkpoints.step_of(checkpoints.found(run)[-1])
    assert 0 < stopped < STEPS and not (run / "model").exists()
    assert finish(start(train_command, [*arguments(run), *RESUME])) == 0
    assert_equal_runs(undisturbed, run)


def test_a_run_in_the_background_ignores_ctrl_c_but_not_a_scheduler() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopRequests() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.asked
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
            assert stop.asked
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_ctrl_c_stops_between_steps_and_the_second_at_once() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopRequests() as stop:
            stop.check(2, "run")
            signal.raise_signal(signal.SIGINT)
            with pytest.raises(Stopped, match="stopped after step 3 of run"):
                stop.check(3, "run")
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.slow
def test_killed_twenty_times_at_random(tmp_path: Path) -> None:
    """Kills at times drawn from as long as a run takes, import and saving included."""
    whole, run, steps = tmp_path / "whole", tmp_path / "run", 20
    # The server of processes imports torch before the first one starts, which is not timed.
    assert finish(start(int)) == 0
    began = time.perf_counter()
    assert finish(start(train_command, arguments(whole, steps))) == 0
    seconds = time.perf_counter() - began
    draw, kills, ended = random.Random(0), 0, 0
    while kills < 20:
        process = start(train_command, [*arguments(run, steps), *RESUME])
        process.join(draw.uniform(0.02, 0.35) * seconds)
        if process.is_alive():
            process.kill()
            kills += 1
            assert finish(process) == -signal.SIGKILL
        else:
            # It came to its end; the next one starts anew.
            assert process.exitcode == 0
            assert_equal_runs(whole, run, steps)
            run.rename(tmp_path / f"ended-{ended}")
            ended += 1
    assert finish(start(train_command, [*arguments(run, steps), *RESUME])) == 0
    assert_equal_runs(whole, run, steps)
