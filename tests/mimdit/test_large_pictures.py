"""Memory and time of large pictures, each in a process of its own: peaks do not come down again."""

import json
import subprocess
import sys
from typing import Any

import pytest

# Prints seconds and the growth of the peak over that of a first, small picture, in bytes.
RUN = """
import json, resource, sys, time
import torch
from mimdit import accelerate
from mimdit.loading import assemble, load_pipeline
from mimdit.presets import build

name, side, overlap = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)
if name == "debug":
    pipe = assemble(build("debug").randomize_(0).eval(), 1)
else:
    pipe = load_pipeline(name)
pipe = accelerate(pipe)
pipe.set_progress_bar_config(disable=True)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
options = {"num_inference_steps": 1, "shifts": 1, "tile_overlap": overlap, "output_type": "pt"}
pipe(torch.rand(3, 300, 300), **options)
picture = torch.rand(3, side, side)
before, start = peak(), time.perf_counter()
pipe(picture, **options)
seconds = time.perf_counter() - start
planned = pipe.plan(side, side, num_inference_steps=1, tile_overlap=overlap)
print(json.dumps({"seconds": seconds, "grown": peak() - before, "planned": planned.host}))
"""


def measured(name: str, side: int, overlap: int) -> dict[str, Any]:
    command = [sys.executable, "-c", RUN, name, str(side), str(overlap)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
def test_memory_and_time_grow_with_copies_of_the_picture_alone() -> None:
    small, large = (measured("debug", side, 16) for side in (1024, 2048))
    copy = 3 * 4 * 2048**2
    # Five float copies, and nothing for every tile.
    assert large["grown"] < 5 * copy
    assert large["grown"] <= large["planned"] + 2**26
    assert large["seconds"] / 4 < 1.4 * small["seconds"]
