"""All checks and benchmarks that fit this machine, most important first: `python -m bench.suite`.

Every stage is a command of its own with a time limit under nine minutes, so that one that hangs
costs no more; each writes its rows as it measures them. Cut off, `--resume` goes on with the stages
that have not finished.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

# Seconds that a stage may take.
LIMIT = 530


@dataclass(frozen=True)
class Stage:
    """A command, `python -m` before it; {out} is the folder of results."""

    name: str
    command: str
    gpu: bool = True


STAGES = (
    Stage("kernels-check", "pytest -q -m gpu tests/kernels"),
    Stage("engine-check", "pytest -q tests/mimdit/test_engine.py tests/mimdit/test_equations.py"),
    Stage(
        "latency-512",
        "bench.latency --sizes 512 --warmup 3 --variants reference reference-cached "
        "engine-no-graph engine engine-fp8 engine-int8 engine-first-block-cache backbone-eager "
        "--out {out}/latency-512.jsonl",
    ),
    Stage(
        "latency-512-compiled",
        "bench.latency --sizes 512 --runs 10 --warmup 3 --variants reference engine "
        "engine-compile backbone-compiled --out {out}/latency-512-compiled.jsonl",
    ),
    Stage("kernels-quick", "bench.kernels --quick --out {out}/kernels-quick.jsonl"),
    Stage("latency-1024", "bench.latency --sizes 1024 --runs 10 --out {out}/latency-1024.jsonl"),
    Stage("kernels", "bench.kernels --out {out}/kernels.jsonl"),
    Stage("latency-tiny", "bench.latency --model tiny --sizes 256 --out {out}/latency-tiny.jsonl"),
    Stage("ablation", "bench.ablation --runs 5 --warmup 2 --out {out}/ablation.jsonl"),
    Stage("data", "bench.data --out {out}/data.jsonl", gpu=False),
    Stage("kernels-cpu", "bench.kernels --device cpu --out {out}/kernels-cpu.jsonl", gpu=False),
    Stage(
        "latency-cpu",
        "bench.latency --model tiny --device cpu --precision fp32 --sizes 256 --runs 3 "
        "--out {out}/latency-cpu.jsonl",
        gpu=False,
    ),
)


def run(stage: Stage, out: Path, limit: float = LIMIT) -> dict[str, object]:
    """Run a stage; its output goes to a log beside the rows. Returns what became of it."""
    command = [sys.executable, "-m", *stage.command.format(out=out).split()]
    began = time.perf_counter()
    with (out / f"{stage.name}.log").open("w") as log:
        try:
            code: int | None = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = None
    return {"code": code, "seconds": round(time.perf_counter() - began, 1)}


def main(argv: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    names = [stage.name for stage in stages]
    p = argparse.ArgumentParser(prog="python -m bench.suite", description=__doc__)
    default = Path("bench/results") / f"suite-{date.today().isoformat()}"
    p.add_argument("--out", type=Path, default=default, help=f"folder (default {default})")
    p.add_argument("--stages", nargs="+", choices=names, metavar="STAGE", help=", ".join(names))
    p.add_argument("--resume", action="store_true", help="leave out stages that succeeded before")
    p.add_argument("--limit", type=float, default=LIMIT, help=f"seconds a stage (default {LIMIT})")
    args = p.parse_args(argv)

    import torch

    gpu = torch.cuda.is_available()
    args.out.mkdir(parents=True, exist_ok=True)
    state_file = args.out / "suite.json"
    state = json.loads(state_file.read_text()) if args.resume and state_file.is_file() else {}
    chosen = [stage for stage in stages if args.stages is None or stage.name in args.stages]
    for stage in chosen:
        if stage.gpu and not gpu:
            print(f"{stage.name}: left out, it needs a GPU")
            continue
        if state.get(stage.name, {}).get("code") == 0:
            print(f"{stage.name}: done before")
            continue
        print(f"{stage.name}: running …", flush=True)
        state[stage.name] = run(stage, args.out, args.limit)
        state_file.write_text(json.dumps(state, indent=1))
        code, seconds = state[stage.name]["code"], state[stage.name]["seconds"]
        verdict = {0: "done", None: "stopped at the time limit"}.get(code, f"failed ({code})")
        print(f"{stage.name}: {verdict} after {seconds:.0f} s, see {args.out / stage.name}.log")
    ran = [state[stage.name]["code"] for stage in chosen if stage.name in state]
    return 0 if all(code == 0 for code in ran) else 1


if __name__ == "__main__":
    sys.exit(main())
