"""What `bench.suite` runs, most important first."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stage:
    """A command, `python -m` before it; {out} is the folder of results.

    gpu: whether it needs one. small: further arguments that make a trial of it. under: a program
    that runs it, with its options. resumes: whether it goes on by itself with what {out} has.
    """

    name: str
    command: str
    gpu: bool = True
    small: str = ""
    under: str = ""
    resumes: bool = False

    def words(self, python: str, out: Path, small: bool = False) -> list[str]:
        """The command line."""
        more = f" {self.small}" if small else ""
        command = f"{self.command}{more}".format(out=out / self.name)
        return [*self.under.split(), python, "-m", *command.split()]


# Compilers cannot be tried in a moment, so trials have no compiled variants.
_TRIAL = "--model debug --device cpu --precision fp32 --runs 1 --warmup 0"
_LATENCY = f"{_TRIAL} --sizes 64 --steps 2 --variants reference engine engine-int8"
# Deprecations in the libraries of another machine are no failures.
_PYTEST = "pytest -q -W default -p no:cacheprovider"
_EXACT = "reference reference-cached engine-no-graph engine"
_APPROXIMATE = "engine-fp8 engine-int8 engine-first-block-cache"


def _latency(name: str, options: str, variants: str) -> Stage:
    command = f"bench.latency {options} --variants {variants} --out {{out}}.jsonl"
    return Stage(name, command, small=_LATENCY)


def _kernels(name: str, options: str) -> Stage:
    command = f"bench.kernels {options} --resume --out {{out}}.jsonl"
    small = "--device cpu --quick --ops image_gate layernorm_modulate"
    return Stage(name, command, small=small, resumes=True)


STAGES = (
    # The first that runs the engine: its cold start is one.
    _latency(
        "first-look", "--sizes 512 --runs 10 --warmup 3 --seconds 60", "engine backbone-eager"
    ),
    Stage("kernels-check", f"{_PYTEST} -m gpu tests/kernels", small="--collect-only"),
    Stage(
        "engine-check",
        f"{_PYTEST} -m gpu tests/mimdit/test_engine_gpu.py tests/mimdit/test_engine_contract.py",
        small="--collect-only",
    ),
    _latency(
        "latency-512",
        "--sizes 512 --warmup 3 --seconds 300",
        f"{_EXACT} {_APPROXIMATE} backbone-eager",
    ),
    # Compilation takes minutes; what it found is kept, so that a second attempt takes less.
    _latency(
        "latency-512-backbone",
        "--sizes 512 --warmup 3 --seconds 60",
        "engine backbone-compiled",
    ),
    Stage(
        "trace",
        "bench.trace --out {out}.jsonl",
        small=f"{_TRIAL} --sizes 64",
    ),
    _latency(
        "latency-1024",
        "--sizes 1024 --runs 10 --warmup 1 --seconds 300",
        f"{_EXACT} {_APPROXIMATE} backbone-eager",
    ),
    _latency(
        "latency-1024-backbone",
        "--sizes 1024 --runs 10 --warmup 1 --seconds 60",
        "engine backbone-compiled",
    ),
    _kernels("kernels-quick", "--quick"),
    _latency(
        "latency-512-batch",
        "--sizes 512 --batch 4 --runs 10 --warmup 1 --seconds 240",
        "reference engine engine-fp8 engine-int8 backbone-eager",
    ),
    Stage(
        "tiles",
        "bench.tiles --runs 3 --seconds 300 --out {out}.jsonl",
        small=f"{_TRIAL} --steps 1 --megapixels 0.02 0.04",
    ),
    Stage(
        "ablation",
        "bench.ablation --runs 10 --warmup 1 --seconds 240 --out {out}.jsonl",
        small=f"{_TRIAL} --size 64 --steps 2",
    ),
    Stage(
        "thresholds",
        "bench.latency --sizes 512 --runs 10 --warmup 1 --seconds 120 "
        "--thresholds 0.02 0.05 0.1 0.2 --out {out}.jsonl",
        small=f"{_TRIAL} --sizes 64 --steps 2",
    ),
    _kernels("kernels", ""),
    _latency(
        "latency-1024-batch",
        "--sizes 1024 --batch 4 --runs 5 --warmup 1 --seconds 240",
        "reference engine engine-fp8 backbone-eager",
    ),
    _latency(
        "latency-512-batch-backbone",
        "--sizes 512 --batch 4 --runs 10 --warmup 1 --seconds 60",
        "engine backbone-compiled",
    ),
    _latency(
        "latency-1024-batch-backbone",
        "--sizes 1024 --batch 4 --runs 5 --warmup 1 --seconds 60",
        "engine backbone-compiled",
    ),
    _latency(
        "latency-512-compiled",
        "--sizes 512 --runs 10 --warmup 3 --seconds 60",
        "engine engine-compile",
    ),
    _latency(
        "latency-tiny",
        "--model tiny --sizes 256 --seconds 120",
        f"{_EXACT} {_APPROXIMATE} backbone-eager onnxruntime tensorrt",
    ),
    # The default tests of the kernels run on a GPU where there is one.
    Stage("kernels-tests", f"{_PYTEST} tests/kernels", small="--collect-only"),
    Stage(
        "memcheck",
        f"{_PYTEST} -v -m gpu tests/kernels/test_gpu.py -k same_input",
        small="--collect-only",
        under="compute-sanitizer --tool memcheck --error-exitcode 9",
    ),
    Stage(
        "racecheck",
        f"{_PYTEST} -v -m gpu tests/kernels/test_gpu.py -k same_input",
        small="--collect-only",
        under="compute-sanitizer --tool racecheck --error-exitcode 9",
    ),
    Stage("data", "bench.data --out {out}.jsonl", gpu=False, small="--seconds 0.01 --types rain"),
    Stage(
        "kernels-cpu",
        "bench.kernels --device cpu --out {out}.jsonl",
        gpu=False,
        small="--quick --ops image_gate",
    ),
    Stage(
        "latency-cpu",
        "bench.latency --model tiny --device cpu --precision fp32 --sizes 256 --runs 3 "
        "--seconds 240 --out {out}.jsonl",
        gpu=False,
        small=_LATENCY,
    ),
)
