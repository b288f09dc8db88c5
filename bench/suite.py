"""All checks and benchmarks that fit this machine, most important first: `python -m bench.suite`.

Every stage is a command of its own with a time limit under nine minutes, so that one that hangs
costs no more; each writes its rows as it measures them. Nothing that a stage started outlives it,
or the suite: it would hold the GPU beside what is measured next. Cut off, `--resume` goes on with
the stages that have not finished. At the end, what was reached of `bench.targets`.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from bench.rows import write_whole
from bench.stages import STAGES, Stage
from bench.targets import read, table
from mimdit.cli.interrupts import handling

# Seconds that a stage may take, and the least that is worth beginning one for.
LIMIT = 530
_LEAST = 20
# Lines of a stage's tables, and of the log of one that failed, that are shown.
_SHOWN = 40


@dataclass(frozen=True)
class Outcome:
    """code: of the command, None where its time was up."""

    code: int | None
    seconds: float

    def __str__(self) -> str:
        verdict = {0: "done", None: "stopped at the time limit"}
        return f"{verdict.get(self.code, f'failed ({self.code})')} after {self.seconds:.0f} s"


def run(stage: Stage, out: Path, small: bool, limit: float) -> Outcome:
    """Run a stage; its output goes to a log beside the rows."""
    command = stage.words(sys.executable, out, small)
    began = time.perf_counter()
    with (out / f"{stage.name}.log").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # All of its session: a sanitizer's program and a compiler's workers, too.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return Outcome(code, round(time.perf_counter() - began, 1))


def left_out(stage: Stage, gpu: bool) -> str:
    """Why a stage cannot run here, or nothing."""
    if stage.gpu and not gpu:
        return "it needs a GPU"
    if stage.under and shutil.which(program := stage.under.split()[0]) is None:
        return f"there is no {program}"
    return ""


def put_aside(stage: Stage, out: Path) -> None:
    """Files of an earlier run of a stage get another name, so that its rows are not doubled."""
    for file in out.glob(f"{stage.name}.*"):
        if file.suffix != ".before":
            file.replace(file.with_name(f"{file.name}.before"))


def shown(log: Path, failed: bool) -> str:
    """What a log says: its tables, and where something went wrong its end."""
    lines = log.read_text(errors="replace").splitlines()
    tables = [line for line in lines if line.startswith("|")]
    end = lines[-_SHOWN:] if failed else []
    cut = ["…"] if len(tables) > _SHOWN else []
    return "\n".join([*tables[:_SHOWN], *cut, *(line for line in end if line not in tables)])


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    names = [stage.name for stage in stages]
    p = argparse.ArgumentParser(prog="python -m bench.suite", description=__doc__)
    default = Path("bench/results") / f"suite-{date.today().isoformat()}"
    p.add_argument("--out", type=Path, default=default, help=f"folder (default {default})")
    p.add_argument("--stages", nargs="+", choices=names, metavar="STAGE", help=", ".join(names))
    p.add_argument("--resume", action="store_true", help="leave out stages that succeeded before")
    p.add_argument("--limit", type=float, default=LIMIT, help=f"seconds a stage (default {LIMIT})")
    total = "seconds in all; what does not fit is left to --resume (default: no limit)"
    p.add_argument("--total", type=float, default=float("inf"), help=total)
    small = "the same commands at sizes that only try them, on whatever is there"
    p.add_argument("--small", action="store_true", help=small)
    args = p.parse_args(argv)

    import torch

    gpu = torch.cuda.is_available() or args.small
    began = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    state_file = args.out / "suite.json"
    state = json.loads(state_file.read_text()) if state_file.is_file() else {}
    ran: list[int | None] = []
    for stage in stages:
        if args.stages is not None and stage.name not in args.stages:
            continue
        if reason := left_out(stage, gpu):
            print(f"{stage.name}: left out, {reason}")
            continue
        if args.resume and state.get(stage.name, {}).get("code") == 0:
            print(f"{stage.name}: done before")
            continue
        rest = args.total - (time.perf_counter() - began)
        if rest < _LEAST:
            print(f"{stage.name}: left to --resume, the time is up")
            ran.append(None)
            continue
        if not (args.resume and stage.resumes):
            put_aside(stage, args.out)
        print(f"{stage.name}: running …", flush=True)
        # An exception, so that the stage ends, too.
        with handling(lambda number, _: sys.exit(128 + number), signal.SIGTERM):
            outcome = run(stage, args.out, args.small, min(args.limit, rest))
        ran.append(outcome.code)
        state[stage.name] = vars(outcome)
        write_whole(state_file, json.dumps(state, indent=1))
        log = args.out / f"{stage.name}.log"
        print(f"{stage.name}: {outcome}, see {log}")
        print(shown(log, outcome.code != 0), flush=True)
    reached = table(read(args.out))
    write_whole(args.out / "targets.md", reached + "\n")
    print(reached)
    return 0 if all(code == 0 for code in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
