"""Runs that are stopped at random moments, and runs that are long."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimdit.cli.arguments import build_parser
from mimdit.cli.jobs import collect, plan
from mimdit.cli.work import Restorer
from mimdit.loading import assemble
from mimdit.transformer import MiMDiTTransformer2DModel

ROOT = str(Path(__file__).parents[2])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forks")
@pytest.mark.parametrize("stops", [4, pytest.param(50, marks=pytest.mark.slow)])
def test_stopped_runs_leave_whole_files_and_resume_finishes_them(
    tmp_path: Path, stops: int
) -> None:
    env = {**os.environ, "PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.mimdit.stopped_runs", str(stops)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["stops"] == stops and found["SIGINT"] == found["SIGKILL"] == stops // 2
    # Some were stopped when they had written something.
    assert stops < 50 or found["whole"] > 50


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
@pytest.mark.usefixtures("one_thread")
def test_memory_stays_flat_over_many_pictures(
    debug_model: MiMDiTTransformer2DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    count, sizes = 500, ((40, 60), (64, 64), (150, 70), (33, 90), (128, 128))
    monkeypatch.chdir(tmp_path)
    assemble(debug_model, 1).save_pretrained("model")
    rng = np.random.default_rng(0)
    Path("in").mkdir()
    for i in range(count):
        pixels = rng.integers(0, 256, (*sizes[i % len(sizes)], 3), np.uint8)
        Image.fromarray(pixels).save(f"in/{i:03}.png")
    args = build_parser().parse_args(
        ["-i", "in", "-o", "out", "--model", "model", "--device", "cpu", "--report", "--compare"]
    )
    assert isinstance(args, argparse.Namespace)
    args.index = False
    jobs, failures = plan(collect(args.input, args.output)[0], args)
    assert len(jobs) == count and not failures
    restorer, held = Restorer(args, {"disable": True}, silent=True), []
    for job in jobs:
        assert restorer(job).failure is None
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        held.append(pages * os.sysconf("SC_PAGE_SIZE"))
    # Buffers of the five shapes are made in the first rounds.
    settled = np.array(held[100:]) / 1e3
    slope = float(np.polyfit(np.arange(len(settled)), settled, 1)[0])
    print(f"{count} pictures: {held[-1] / 1e6:.0f} MB held, {slope:.2f} kB more a picture")
    assert abs(slope) < 20
