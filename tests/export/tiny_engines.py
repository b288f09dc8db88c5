"""TensorRT-RTX engines of the shipped model, made in a process of its own beside the tests.

Tracing and building take a minute and more of one core, which the tests before leave idle.
"""

import contextlib
import io
import multiprocessing
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

GPUS = ("80", "86", "89", "120")
GRAPHS = ("pool", "conditioner", "denoiser")


class Case(NamedTuple):
    """Engines of some graphs, for GPUs of some compute capabilities."""

    precision: str
    capabilities: tuple[str, ...]
    graphs: tuple[str, ...]


CASES = {
    "fp16": Case("fp16", GPUS, GRAPHS[1:]),
    # Tracing takes longest: the other type is left to the graph that runs in every step.
    "bf16-denoiser": Case("bf16", ("89",), GRAPHS[2:]),
    "bf16": Case("bf16", GPUS, GRAPHS),
}


def export(case: Case, target: Path) -> int:
    """`mimdit-export tiny`, without a comparison; its exit code."""
    from export import folder
    from export.cli import main
    from export.graphs import graphs_of

    folder.graphs_of = lambda pipe: [g for g in graphs_of(pipe) if g.name in case.graphs]
    options = ["--no-check", "--precision", case.precision]
    options += ["--trt-rtx", "--sm", ",".join(case.capabilities)]
    # Builders take twice as long for sides to 512.
    return main(["tiny", "--out", str(target), *options, "--sizes", "64x64,256x256"])


def _work(names: Sequence[str], place: Path, results: Connection) -> None:
    for name in names:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = export(CASES[name], place / name)
        results.send((name, code, said.getvalue()))


class Exports:
    """The exports of some cases, one after the other, from now on."""

    def __init__(self, names: Sequence[str], place: Path) -> None:
        self.place = place
        self._done: dict[str, tuple[int, str]] = {}
        context = multiprocessing.get_context("spawn")
        self._results, own = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(names, place, own), daemon=True)
        self._process.start()
        # The child's alone: that it died is seen.
        own.close()

    def folder(self, name: str) -> Path:
        """What was written for a case; waits for it."""
        while name not in self._done:
            case, *found = self._results.recv()
            self._done[case] = tuple(found)
        code, said = self._done[name]
        assert code == 0, said
        return self.place / name

    def stop(self) -> None:
        """Give up what is not done."""
        self._process.kill()
        self._process.join()
