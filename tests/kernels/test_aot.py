"""Compilation for GPUs that are not there, in a process without Triton's interpreter."""

import os
import subprocess
import sys

import pytest

from mimkernels.aot import OPS
from mimkernels.tiles import ARCHITECTURES


def table(*command: str) -> list[list[str]]:
    """Rows of `python -m mimkernels.aot`, which must succeed: no spills, no overflow."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, "-m", "mimkernels.aot", *command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [line.split() for line in done.stdout.splitlines()[1:]]


def test_matrix_kernels_use_matrix_instructions() -> None:
    rows = table("--ops", "expert_linear", "--dtypes", "bf16", "--targets", "sm_90", "sm_86")
    assert len(rows) == 6
    assert {row[-1] for row in rows if row[3] == "sm_90"} == {"wgmma"}
    assert {row[-1] for row in rows if row[3] == "sm_86"} == {"mma.sync"}


@pytest.mark.slow
@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles_without_spills(op: str, target: str) -> None:
    assert table("--ops", op, "--targets", target)
