"""Compile every kernel for every architecture, without a GPU: `python -m mimkernels.aot`.

Prints registers, stack, shared memory and matrix instructions of exactly what a call at typical
sizes would launch. Exits non-zero where a kernel spills or needs more shared memory than the
architecture has.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from mimkernels.tiles import ARCHITECTURES, SHARED_MEMORY, tiles_for

OPS = (
    "image_gate",
    "topk_route",
    "expert_linear",
    "expert_combine",
    "expert_depthwise3x3",
    "grouped_linear",
    "layernorm_modulate",
    "gated_residual_layernorm_modulate",
    "joint_qkv",
    "window_attention",
    "channel_attention",
    "squeeze_excite",
)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of one launch; registers and stack (bytes) None where unknown."""

    op: str
    kernel: str
    dtype: str
    architecture: str
    warps: int
    registers: int | None
    stack: int | None
    shared: int
    matrix: str

    @property
    def fault(self) -> str:
        """Why this must not ship, or nothing."""
        if self.shared > SHARED_MEMORY[self.architecture]:
            return f"shared memory over {SHARED_MEMORY[self.architecture]}"
        if self.stack is None and not self.architecture.startswith("gfx"):
            return "registers unknown, no cuobjdump"
        return "spills" if self.stack else ""


def compile_all(
    ops: Sequence[str], dtypes: Sequence[str], architectures: Sequence[str]
) -> Iterator[Compiled]:
    """One row for each op, kernel launch, type and architecture."""
    from mimkernels.launch import record

    for op in ops:
        module = import_module(f"mimkernels.{op}.kernel")
        for architecture in architectures:
            for dtype in dtypes:
                with tiles_for(architecture), record() as launches:
                    module.typical_launches(DTYPES[dtype])
                for launch in launches:
                    yield compile_launch(op, dtype, architecture, launch)


def compile_launch(op: str, dtype: str, architecture: str, launch: Any) -> Compiled:
    """Compile one recorded launch; op and dtype are labels of the row."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    hip = architecture.startswith("gfx")
    if hip:
        target = GPUTarget("hip", architecture, 64)
    else:
        target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    options = dict(launch.options)
    config = {k: options.pop(k) for k in ("num_warps", "num_stages")} | {"enable_fp_fusion": True}
    signature, constants, attributes = _signature(launch.kernel, launch.arguments, options)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    done = triton.compile(source, target=target, options=config)
    registers, stack = (None, None) if hip else _resources(done.asm["cubin"])
    code = done.asm["amdgcn"] if hip else done.asm["ptx"]
    found = re.search(r"wgmma|tcgen05\.mma|mma\.sync|v_mfma", code)
    return Compiled(
        op,
        launch.kernel.__name__,
        dtype,
        architecture,
        config["num_warps"],
        registers,
        stack,
        done.metadata.shared,
        found.group() if found else "none",
    )


def _signature(
    kernel: Any, arguments: Sequence[Any], options: dict[str, Any]
) -> tuple[dict[str, str], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Types, constants and alignments as Triton's own launcher would specialise them."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, name in enumerate(kernel.arg_names):
        value = arguments[i] if i < len(arguments) else options[name]
        # A stride or size of one becomes a constant.
        if i >= len(arguments) or value is None or (type(value) is int and value == 1):
            signature[name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name], attributes[(i,)] = "*" + _TYPES[value.dtype], _ALIGNED
        else:
            signature[name] = "fp32" if isinstance(value, float) else _integer(value)
            if isinstance(value, int) and value % 16 == 0:
                attributes[(i,)] = _ALIGNED
    return signature, constants, attributes


_ALIGNED = [["tt.divisibility", 16]]


def _integer(value: int) -> str:
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _resources(cubin: bytes) -> tuple[int | None, int | None]:
    """Registers of a thread, and bytes of stack, which spilled registers take."""
    tool = _cuobjdump()
    if tool is None:
        return None, None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        words = (tool, "-res-usage", file.name)
        text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (None, None)


def _cuobjdump() -> str | None:
    import triton

    inside = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return str(inside) if inside.is_file() else shutil.which("cuobjdump")


def line(row: Compiled) -> str:
    """A row of the table."""
    registers, stack = ("-" if x is None else x for x in (row.registers, row.stack))
    return (
        f"{row.op:<34}{row.kernel:<18}{row.dtype:<6}{row.architecture:<8}{row.warps:>5}"
        f"{registers:>10}{stack:>7}{row.shared:>9}  {row.matrix:<12}{row.fault}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m mimkernels.aot", description=__doc__)
    p.add_argument("--ops", nargs="+", default=OPS, choices=OPS)
    p.add_argument("--dtypes", nargs="+", default=list(DTYPES), choices=DTYPES)
    p.add_argument("--targets", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    args = p.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        p.error("Triton's interpreter is on; unset TRITON_INTERPRET to compile")
    head = f"{'op':<34}{'kernel':<18}{'type':<6}{'target':<8}{'warps':>5}"
    print(f"{head}{'registers':>10}{'stack':>7}{'shared':>9}  matrix")
    faults = 0
    for row in compile_all(args.ops, args.dtypes, args.targets):
        print(line(row), flush=True)
        faults += bool(row.fault)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
