"""How fast the kernels are, and next to what: `python -m bench.kernels`, on a GPU.

For each op and size first the check: results and gradients of every variant against the reference
in float64; a variant that differs gets no speed, and the command fails. Then microseconds a call,
forward and forward+backward, from replayed CUDA graphs of many calls, all variants in turn: shares
of the bandwidth and of the matrix peak measured here, and the kernel's speed relative to each
variant. On a CPU it only checks, at small sizes. One JSON line a row, and a plot; --resume leaves
out what --out has already.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.arguments import at_least
from bench.kernel_checks import PASSES, difference, forward, oracle
from bench.kernel_tables import table
from bench.rows import Row, RowFile, said

# Torch and what needs it are imported where they are used: --help is quick.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.kernel_cases import Case
    from mimkernels.costs import Cost

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
EMPTY = "empty kernel"
# What tells a case from others.
_NAMES = ("op", "dtype", "tokens", "channels", "experts", "slots", "layers", "pictures")


def measure_case(
    case: "Case", device: "torch.device", runs: int, peak: float, bandwidth: float
) -> Iterator[Row]:
    """Rows of all passes and variants; with times on a GPU only, and only of equal results.

    peak (FLOP/s) and bandwidth (bytes/s): measured on this device.
    """
    from bench.kernel_cases import TOLERANCE, variants

    tolerance = TOLERANCE[case.tensors[0].dtype]
    grads, wanted = oracle(case)
    candidates = variants(case)
    for pass_, call in PASSES.items():
        rows: dict[str, Row] = {}
        for name, variant in candidates.items():
            row = {"pass": pass_, "variant": name, "error": None, "parity": None, "reason": None}
            rows[name] = row
            if isinstance(variant, str):
                row["reason"] = variant
                continue
            try:
                error = difference(call(variant, case.tensors, grads), wanted[pass_])
            # Whatever stops a comparator must not stop the others.
            except Exception as fault:
                row |= {"reason": said(fault), "parity": False if name == "triton" else None}
                continue
            row["parity"] = error <= tolerance
            row["error"] = error if error < float("inf") else None
            if not row["parity"]:
                row["reason"] = f"differs from the reference by {error:.1e}, over {tolerance:.0e}"
        rows["triton"]["launches"] = _launches(case, call, grads)
        if device.type == "cuda":
            both = case.costs.forward + case.costs.backward
            least = case.costs.forward if call is forward else both
            timed = {name: candidates[name] for name, row in rows.items() if row["parity"]}
            _time(case, call, grads, timed, rows, least, device, runs)
            _relate(rows, least, peak, bandwidth)
        yield from rows.values()


def _launches(case: "Case", call: Callable[..., Any], grads: "list[Tensor]") -> int:
    """Kernels of this package that a call launches."""
    from mimkernels.explain import recorded, without_data
    from mimkernels.tiles import architecture

    shapes = [[without_data(x) for x in some] for some in (case.tensors, grads)]
    with recorded(architecture(grads[0].device)) as launches:
        call(case.kernel, *shapes)
    return len(launches)


def _time(
    case: "Case",
    call: Callable[..., Any],
    grads: "list[Tensor]",
    timed: dict[str, Any],
    rows: dict[str, Row],
    least: "Cost",
    device: "torch.device",
    runs: int,
) -> None:
    """Add the times of variants with equal results, and of an empty kernel, to the rows."""
    from bench import measure

    copies = min(32, 1 + 2 * measure.cache_bytes(device) // case.costs.forward.bytes)
    sets = [(case.tensors, grads)]
    for _ in range(copies - 1):
        sets.append(([x.clone() for x in case.tensors], [x.clone() for x in grads]))
    nothing = measure.empty_kernel(device)
    rows[EMPTY] = {"pass": rows["triton"]["pass"], "variant": EMPTY, "error": None, "parity": None}
    rows[EMPTY]["reason"] = None
    calls: dict[str, Callable[[int], Any]] = {EMPTY: lambda i: nothing()}
    for name, variant in timed.items():
        calls[name] = lambda i, variant=variant: call(variant, *sets[i])
    replays = {}
    for name, run in calls.items():
        try:
            replays[name] = measure.captured(run, copies, device)
        except Exception as fault:
            rows[name]["reason"] = said(fault)
            if name == "triton":
                rows[name]["parity"] = False
    for name, times in measure.replayed(replays, device, runs).items():
        row = rows[name] | {"runs": runs, "calls": replays[name].calls, "copies": copies}
        for share in (10, 50, 90):
            row[f"p{share}_us"] = measure.percentile(times, share / 100) * 1e6
        rows[name] = row


def _relate(rows: dict[str, Row], least: "Cost", peak: float, bandwidth: float) -> None:
    """Add to each row with a time what it says of the machine and of the kernel."""
    floor = least.floor(peak, bandwidth)
    for row in rows.values():
        if "p50_us" not in row or row["variant"] == EMPTY:
            continue
        seconds = row["p50_us"] / 1e6
        row |= {
            "flops": least.flops,
            "bytes": least.bytes,
            "matrix_share": least.flops / seconds / peak,
            "bandwidth_share": least.bytes / seconds / bandwidth,
            "floor_us": floor * 1e6,
            "floor_share": floor / seconds,
        }
        if "p50_us" in rows["triton"]:
            row["kernel_speedup"] = row["p50_us"] / rows["triton"]["p50_us"]


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.kernels", description=__doc__)
    p.add_argument("--ops", nargs="+", metavar="OP", help="as expert_linear (default all)")
    p.add_argument("--dtype", choices=list(DTYPES), help="(default bf16, on a CPU fp32)")
    p.add_argument("--runs", type=int, default=30, help="replays of each graph (default 30)")
    default = Path("bench/results") / f"kernels-{date.today().isoformat()}.jsonl"
    where = f"JSON lines, with a plot beside them (default {default}, on a CPU none)"
    p.add_argument("--out", type=Path, help=where)
    p.add_argument("--quick", action="store_true", help="the smallest size, at most 10 replays")
    p.add_argument("--device", choices=["cuda", "cpu"], help="(default cuda if there is one)")
    p.add_argument("--resume", action="store_true", help="leave out what --out has already")
    args = p.parse_args(argv)
    at_least(p, args, runs=1)
    if args.resume and not args.out:
        p.error("--resume: expected --out, a file to go on with")

    import torch

    from bench import kernel_cases, machine, measure, plots
    from mimkernels.backend import interpreting

    unknown = [op for op in args.ops or [] if op not in kernel_cases.CASES]
    if unknown:
        known = ", ".join(kernel_cases.CASES)
        p.error(f"--ops: expected some of {known}, got {', '.join(unknown)}")
    gpu = (args.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    if gpu and not torch.cuda.is_available():
        p.error("--device: expected a GPU that torch can use, found none")
    if gpu and interpreting():
        p.error("Triton's interpreter is on; unset TRITON_INTERPRET to measure")
    device = torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu")
    dtype = getattr(torch, DTYPES[args.dtype or ("bf16" if gpu else "fp32")])
    out = args.out or (default if gpu else None)
    file = RowFile(out) if out else None
    before = file.before if file and args.resume else []
    done = {tuple(row[name] for name in _NAMES) for row in before}
    runs = min(args.runs, 10) if args.quick else args.runs
    peak, bandwidth = (
        (measure.matrix_peak(device, dtype), measure.memory_bandwidth(device)) if gpu else (0, 0)
    )
    fixed = {"bench": "kernels", "dtype": str(dtype).removeprefix("torch."), "seed": 0}
    fixed |= machine.environment(device)
    if gpu:
        fixed |= {"matrix_peak_tflops": peak / 1e12, "bandwidth_gb_s": bandwidth / 1e9}
    rows: list[Row] = []
    for op in args.ops or kernel_cases.CASES:
        sizes = kernel_cases.SIZES[op] if gpu else kernel_cases.SMALL
        for size in sizes[:1] if args.quick else sizes:
            named = fixed | {"op": op} | vars(size)
            if tuple(named[name] for name in _NAMES) in done:
                continue
            # Each size is compiled anew; the compiler keeps only a few for one function.
            torch.compiler.reset()
            found: list[Row] = []
            try:
                case = kernel_cases.make(op, size, dtype, device)
                for row in measure_case(case, device, runs, peak, bandwidth):
                    found.append(row)
            # Whatever stops a size must not stop the others; a GPU may have no memory for it.
            except Exception as fault:
                short = isinstance(fault, torch.OutOfMemoryError)
                row = {"pass": "forward", "variant": "triton", "error": None}
                found.append(row | {"parity": None if short else False, "reason": said(fault)})
            case = None
            if gpu:
                torch.cuda.empty_cache()
            state = machine.gpu_state(device)
            rows += [named | row | state for row in found]
            if file:
                file.write(rows)
    rows = before + rows
    print(table(rows))
    if out and any("p50_us" in row for row in rows):
        plots.kernel_bars(rows, out.with_suffix(".png"))
        print(f"rows in {out}, plot in {out.with_suffix('.png')}")
    if not gpu:
        print("This only checked results: kernel speeds need a GPU.")
    return 1 if any(row["parity"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
