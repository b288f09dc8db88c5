"""Compilation for GPUs that are not there, in a process without Triton's interpreter."""

import os
import subprocess
import sys

import pytest

from mimkernels.aot import OPS
from mimkernels.tiles import ARCHITECTURES
from tests.kernels.calls import NAMES


def printed(*command: str) -> list[str]:
    """Lines of a Python command that must succeed."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [sys.executable, *command]
    done = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def table(*command: str) -> list[list[str]]:
    """Rows of `python -m mimkernels.aot`: no spills, no overflow."""
    return [line.split() for line in printed("-m", "mimkernels.aot", *command)[1:]]


def test_matrix_kernels_use_matrix_instructions() -> None:
    rows = table("--ops", "expert_linear", "--dtypes", "bf16", "--targets", "sm_90", "sm_86")
    assert len(rows) == 6
    assert {row[-1] for row in rows if row[3] == "sm_90"} == {"wgmma"}
    assert {row[-1] for row in rows if row[3] == "sm_86"} == {"mma.sync"}


COMPILE = """
import sys
import torch
from mimkernels.aot import compile_launch
from mimkernels.explain import recorded
from tests.kernels.calls import SMALLEST, calls, tensors

name = sys.argv[1]
op, usual = calls("meta")[name]
given = [x.new_empty(s) for x, s in zip(usual, SMALLEST[name], strict=True)]
leaves = [x.requires_grad_(x.is_floating_point()) for x in given]
with recorded("sm_90") as launches:
    out = [x for x in tensors(op(*leaves)) if x.is_floating_point()]
    torch.autograd.grad(out, [x for x in leaves if x.requires_grad], out, allow_unused=True)
for launch in launches:
    print(compile_launch(name, "fp32", "sm_90", launch).kernel)
"""


@pytest.mark.parametrize(
    "name", [n if n == "grouped_linear" else pytest.param(n, marks=pytest.mark.slow) for n in NAMES]
)
def test_sizes_of_one_are_constants_that_compile(name: str) -> None:
    """The interpreter keeps them numbers at run time, and finds nothing."""
    assert printed("-c", COMPILE, name)


@pytest.mark.slow
@pytest.mark.parametrize("target", ARCHITECTURES)
@pytest.mark.parametrize("op", OPS)
def test_every_kernel_compiles_without_spills(op: str, target: str) -> None:
    assert table("--ops", op, "--targets", target)
