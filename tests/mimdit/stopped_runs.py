"""Stops `mimdit-restore` at random moments, again and again: `python -m tests.mimdit.stopped_runs`.

One process imports everything once; every run is a fork of it, so that a stop costs little.
"""

import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mimdit.cli.restore import main
from mimdit.loading import assemble
from mimdit.presets import build

# What a run says of its own duration.
_SECONDS = re.compile(rb'"seconds": [0-9.e-]+|\d+\.\d s')


def start(*arguments: str) -> int:
    """A run in a process of its own; returns its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    quiet = os.open("run.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    try:
        code = main(["-i", "in", "--model", "model", "--device", "cpu", *arguments])
    except KeyboardInterrupt:
        # Before the command was ready to say so.
        code = 130
    os._exit(code)


def finished(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def files(folder: str) -> dict[str, bytes]:
    """Files by relative path, without what a killed run may leave hidden, or a time."""
    found = {}
    for path in Path(folder).rglob("*"):
        if path.is_file() and not (path.name.startswith(".") and path.suffix == ".part"):
            data = path.read_bytes()
            if path.suffix in (".json", ".html"):
                data = _SECONDS.sub(b"", data).replace(f'"{folder}/'.encode(), b'"')
            found[str(path.relative_to(folder))] = data
    return found


def rounds(stops: int, seed: int) -> dict[str, int]:
    """Stop runs until `stops` were stopped while they worked; every file is compared after each."""
    rng = random.Random(seed)
    began = time.perf_counter()
    assert finished(start("-o", "whole", "--report", "--compare")) == 0
    usual = time.perf_counter() - began
    wanted = files("whole")
    done = {"stops": 0, "SIGINT": 0, "SIGKILL": 0, "folders": 0, "whole": 0, "parts": 0}
    while done["stops"] < stops:
        folder = f"cut{done['folders']}"
        done["folders"] += 1
        complete = False
        while not complete:
            child = start("-o", folder, "--report", "--compare", "--resume")
            sign = (signal.SIGINT, signal.SIGKILL)[done["stops"] % 2]
            stopping = done["stops"] < stops
            if stopping:
                time.sleep(rng.uniform(0.05, 0.8) * usual)
                os.kill(child, sign)
            code = finished(child)
            complete = code == 0
            if complete and stopping:
                # It was faster than the first run; the next stop comes sooner.
                usual *= 0.7
            if not complete:
                assert code in (130, -signal.SIGINT, -signal.SIGKILL), code
                done["stops"] += 1
                done[sign.name] += 1
            there = files(folder)
            done["whole"] += 0 if complete else len(there)
            for name, data in there.items():
                # The list of pages grows with the run.
                same = data == wanted[name] or (name == "compare.html" and not complete)
                assert same, (name, len(data), len(wanted[name]))
            if complete:
                assert set(there) == set(wanted)
                done["parts"] += len(list(Path(folder).rglob(".*.part")))
    return done


def prepare(pictures: int) -> None:
    """A model and pictures in the current folder."""
    torch.manual_seed(0)
    assemble(build("debug").randomize_(0).eval(), 1).save_pretrained("model")
    rng = np.random.default_rng(0)
    for i in range(pictures):
        path = Path("in", *["sub"] * (i % 2), f"{i}.{'jpg' if i % 5 == 0 else 'png'}")
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (50 + i, 60, 3), np.uint8)).save(path)


if __name__ == "__main__":
    # Processes are forked: threads of torch would not come along.
    torch.set_num_threads(1)
    prepare(8)
    print(json.dumps(rounds(int(sys.argv[1]), 0)))
