"""The launchers of docs/training.md really start the command in several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mimdit.loading import load_pipeline

ROOT = Path(__file__).parents[2]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
# With --cpu accelerate starts one process only; without, --multi_gpu starts as many on a CPU, too.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
ACCELERATE += ["--main_process_port", "0"]


def launch(launcher: list[str], output: Path, *flags: str) -> None:
    command = [sys.executable, "-m", *launcher, "-m", "training.train", "--preset", "debug"]
    command += ["--max-train-steps", "3", "--optimizer", "adamw", "--logging-steps", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--output", str(output), *flags],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=3600,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # The main process alone.
    assert done.stdout.count("saved ") == 1


@pytest.mark.slow
def test_launchers_with_and_without_sharding_train_alike(tmp_path: Path) -> None:
    """Two processes on the CPU; the weights of both ways agree within float32's rounding."""
    launch(ACCELERATE, tmp_path / "shared")
    launch(TORCHRUN, tmp_path / "sharded", "--fsdp")
    runs = [tmp_path / name for name in ("shared", "sharded")]
    shared, sharded = (load_file(run / "checkpoint-3/ema.safetensors") for run in runs)
    assert shared.keys() == sharded.keys()
    for name, tensor in shared.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=0, atol=2e-3, msg=name)
    rows = [
        [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()] for run in runs
    ]
    for one, two in zip(*rows, strict=True):
        assert one["step"] == two["step"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-3)
        # Pictures of both processes: four each.
        assert one["pictures_s"] * one["seconds_step"] == pytest.approx(8)
    assert load_pipeline(str(runs[1] / "model")).transformer.config["num_layers"]
