"""Runs in processes of their own, forked from a server that has imported torch once."""

import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mimdit.loading import assemble
from mimdit.presets import build, pixel_codec
from training import checkpoints, loop, train
from training.config import Settings
from training.validation import Validator

ROOT = Path(__file__).parents[2]


def server() -> ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    os.environ["PYTHONPATH"] = str(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    context.set_forkserver_preload(["tests.training.processes"])
    return context


def start(target: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    process = server().Process(target=target, args=arguments)
    process.start()
    return process


def finish(process: ForkServerProcess, seconds: float = 1800) -> int | None:
    """The exit code; the limit is for processes that hang, not for slow machines."""
    process.join(seconds)
    if process.is_alive():
        process.kill()
        raise AssertionError("the process did not end")
    return process.exitcode


def command(arguments: list[str], fault: str | None = None, begun: Any = None) -> None:
    """`mimdit-train`; its exit code becomes the process's. begun: an event, set after a step."""
    torch.set_num_threads(1)
    if fault is not None:
        FAULTS[fault]()
    if begun is not None:
        own = loop.Reports.step

        def step(*values: Any) -> None:
            own(*values)
            begun.set()

        loop.Reports.step = step
    raise SystemExit(train.main(arguments))


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(10)


def _in_a_step() -> None:
    """Gradients are there, and half of the optimisers have moved the weights."""
    own, count = torch.optim.AdamW.step, [0]

    def step(self: Any, *values: Any, **named: Any) -> Any:
        count[0] += 1
        if count[0] == 5:
            _die()
        return own(self, *values, **named)

    torch.optim.AdamW.step = step


def _while_writing() -> None:
    own, count = checkpoints.sync, [0]

    def sync(path: Path) -> None:
        count[0] += path.parent.name.startswith(".unfinished")
        if count[0] == 7:
            path.write_bytes(path.read_bytes()[:10])
            _die()
        own(path)

    checkpoints.sync = sync


def _while_dropping() -> None:
    own = shutil.rmtree

    def rmtree(folder: Path) -> None:
        if folder.name.startswith(".dropped"):
            (folder / "model.safetensors").unlink()
            _die()
        own(folder)

    checkpoints.shutil.rmtree = rmtree


FAULTS = {"step": _in_a_step, "write": _while_writing, "drop": _while_dropping}


def team(
    rank: int,
    processes: int,
    meeting: str,
    settings: Settings,
    result: str,
    resume: str | None,
    make: Callable[[], Any],
) -> None:
    """One of several processes that train a model; the first stores the final weights."""
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "ACCELERATE_USE_CPU": "true",
        "GLOO_SOCKET_IFNAME": "lo",
    }
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=rank, world_size=processes
    )
    model = make()
    validator = Validator(assemble(model, 1), settings) if settings.validation_steps else None
    trained = loop.train(model, pixel_codec(), settings, resume, validator)
    if rank == 0:
        torch.save(trained.state_dict(), result)
    dist.barrier()
    dist.destroy_process_group()


def run_team(
    folder: Path,
    name: str,
    settings: Settings,
    processes: int = 2,
    resume: str | None = None,
    make: Callable[[], Any] | None = None,
) -> Mapping[str, torch.Tensor]:
    """The final weights of a run in several processes; make: the model, by default `model64`."""
    meeting, result = str(folder / f"{name}-meeting"), str(folder / f"{name}-weights")
    members = [
        start(team, rank, processes, meeting, settings, result, resume, make or model64)
        for rank in range(processes)
    ]
    assert [finish(member) for member in members] == [0] * processes
    return torch.load(result, weights_only=True)


def model64() -> Any:
    """`debug` in float64; without qk norms, which round their variance to float32."""
    torch.manual_seed(0)
    return build("debug", qk_norm=None).randomize_(0).double()


def model32() -> Any:
    torch.manual_seed(0)
    return build("debug").randomize_(0)
