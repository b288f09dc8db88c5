"""How long a restoration takes: `python -m bench.latency`.

With no argument it measures what is there: on a GPU sd35-medium with random weights, on a CPU the
shipped tiny. All variants run side by side and interleaved, on the same damaged picture and noise;
a variant whose result differs from the reference gets no speed, and an approximate one is labelled
so and has the PSNR of its picture to the exact engine's beside its speed. A picture is timed from
latents to latents, conditioning included; encoding and decoding it are stages of their own. One
JSON line a row, which is there as soon as it is measured, and a plot.
"""

import math
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from bench import machine, measure
from bench.arguments import at_least, loading, multiples, parser
from bench.inputs import Inputs, load, make_inputs, unit_of
from bench.latency_tables import stages, table, thresholds
from bench.latency_times import failed, time_variants
from bench.plots import latency_plot
from bench.rows import Row, RowFile
from bench.variants import CACHED, MAKERS, Variant, variants_of
from export.checks import GATES, relative_error
from mimdit.loading import PRECISIONS
from mimdit.pipeline import MiMDiTPipeline

# Relative error of a step's raw output that a variant may have.
TOLERANCE = {PRECISIONS[name]: gate for name, gate in GATES.items()}
# Compiling for a CPU takes minutes; only where it is asked for.
COMPILED = ("engine-compile", "backbone-compiled")


def default_variants(device: str) -> tuple[list[str], dict[str, str]]:
    """Names of the variants that run unasked, and why the others do not."""
    if device != "cpu":
        return list(MAKERS), {}
    reason = "compiling for a CPU takes minutes; ask for it with --variants"
    return [n for n in MAKERS if n not in COMPILED], dict.fromkeys(COMPILED, reason)


@torch.no_grad()
def run(
    pipe: MiMDiTPipeline,
    label: str,
    size: int,
    steps: int,
    runs: int,
    warmup: int,
    names: Sequence[str] = tuple(MAKERS),
    batch: int = 1,
    seconds: float = math.inf,
    save: Callable[[Sequence[Row]], None] = lambda _: None,
    clock: measure.Clock = time.perf_counter,
) -> tuple[list[Row], dict[str, str]]:
    """Rows of variants for one size in pixels, without times where parity fails; and which were
    left out, and why.

    seconds: after which no further run of each variant begins, but for the first few. save: called
    with all rows whenever they became more or know more. clock: what the variants are timed by.
    """
    model = pipe.transformer
    device, dtype = next(model.parameters()).device, model.dtype
    given = make_inputs(pipe, size, batch)
    seen, t = given.seen.to(dtype), given.t
    judge = variants_of(model, given.z, ["reference"])[0][0]
    wanted = judge.step(seen, t, judge.encode(given.z)).float()
    fixed = {
        "bench": "latency",
        "model": label,
        "dtype": str(dtype).removeprefix("torch."),
        "height": size,
        "width": size,
        "batch": batch,
        "steps": steps,
        "seed": 0,
        "clock": clock.__name__,
    } | machine.environment(device)
    fixed["matrix_peak_tflops"] = measure.matrix_peak(device, dtype, clock) / 1e12
    fixed["bandwidth_gbs"] = measure.memory_bandwidth(device, clock) / 1e9
    fixed["step_gb"] = given.step_bytes / 1e9
    until = time.perf_counter() + seconds
    passed, rows, missing = [], [], {}
    own = measure.held_memory_mb(device)
    for name in names:
        made: list[Variant] = []

        def first(name: str = name, made: list[Variant] = made) -> None:
            found, reasons = variants_of(model, given.z, [name])
            made += found
            missing.update(reasons)
            for variant in found:
                variant.picture(model, given.x, given.z, 1)

        # Of the variants before, which stay.
        others = [b - a for a, b in zip(own, measure.held_memory_mb(device), strict=True)]
        row = fixed | {"variant": name, "approximate": False, "rel_err": None, "parity": None}
        try:
            cold = measure.seconds(first, device)
            if not made:
                continue
            row |= {"approximate": made[0].approximate, "cold_s": cold}
            row |= _checked(pipe, made[0], given, seen, wanted, others)
        # Whatever stops a variant must not stop the others.
        except Exception as fault:
            failed(row, fault)
        rows.append(row)
        if row["parity"]:
            passed.append((made[0], row))
        save(rows)
    time_variants(pipe, given, passed, steps, (warmup, runs, until, clock), lambda: save(rows))
    return rows, missing


def _checked(
    pipe: MiMDiTPipeline,
    variant: Variant,
    given: Inputs,
    seen: Tensor,
    wanted: Tensor,
    others: Sequence[float],
) -> Row:
    """Errors, memory and FLOPs of one step; others: MB that belong to other variants."""
    model, z, t = pipe.transformer, given.z, given.t
    condition = variant.encode(z)
    found = variant.step(seen, t, condition).float()
    relative = relative_error(found, wanted)
    largest = (found - wanted).abs().max().item()
    exact = variant.equal and not variant.approximate
    within = relative <= TOLERANCE[model.dtype]
    counted = variant.counted or variant.step
    plain = condition if variant.counted is None else model.encode_condition(z)

    def once() -> None:
        variant.picture(model, given.x, z, 1)

    memory = measure.peak_memory_mb(once, given.x.device)
    flops = measure.floating_point_operations(
        lambda: counted(seen, t, plain if variant.cached else variant.encode(z)), given.x.device
    )
    return {
        "rel_err": relative if variant.equal else None,
        "max_err": largest if variant.equal else None,
        "parity": within if exact else bool(found.isfinite().all()),
        "peak_allocated_mb": memory[0] - others[0],
        "peak_reserved_mb": memory[1] - others[1],
        "step_tflop": flops / 1e12,
        "threshold": variant.threshold,
    }


def main(argv: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    p = parser("latency", __doc__)
    p.add_argument("--sizes", type=int, nargs="+", default=[512, 1024] if gpu else [256])
    p.add_argument("--steps", type=int, default=40, help="of a picture (default 40)")
    p.add_argument("--batch", type=int, default=1, help="pictures at once (default 1)")
    p.add_argument("--runs", type=int, default=30 if gpu else 5, help="timed runs of each variant")
    p.add_argument("--warmup", type=int, default=10 if gpu else 1)
    names = ", ".join(MAKERS)
    p.add_argument("--variants", nargs="+", choices=list(MAKERS), metavar="NAME", help=names)
    wanted = "of the first-block cache: each beside the engine, in a table of their own"
    p.add_argument("--thresholds", type=float, nargs="+", default=[], metavar="X", help=wanted)
    enough = "of a size, after which only three runs of each variant are taken (default: no limit)"
    p.add_argument("--seconds", type=float, default=math.inf, help=enough)
    cpu = "count CPU time instead, on a CPU with one thread: other work there matters less"
    p.add_argument("--cpu-time", action="store_true", help=cpu)
    args = p.parse_args(argv)
    names, missing = default_variants(args.device)
    if args.variants or args.thresholds:
        names, missing = args.variants or ["engine"], {}
    if wrong := [value for value in args.thresholds if not value >= 0]:
        p.error(f"--thresholds: expected numbers of at least 0, got {wrong}")
    if args.cpu_time and (args.device != "cpu" or torch.get_num_threads() > 1):
        found = f"{args.device} and {torch.get_num_threads()}"
        p.error(
            f"--cpu-time: expected --device cpu and one thread (OMP_NUM_THREADS=1), got {found}"
        )
    at_least(p, args, batch=1, steps=1, runs=1, warmup=0)
    names = [*names, *(f"{CACHED}={value:g}" for value in args.thresholds)]
    with loading(p, args):
        pipe = load(args.model, args.device, args.precision)
    multiples(p, args, "sizes", unit_of(pipe))
    rows: list[Row] = []
    for size in args.sizes:
        found, reasons = run(
            pipe,
            args.model,
            size,
            args.steps,
            args.runs,
            args.warmup,
            names,
            args.batch,
            args.seconds,
            RowFile(args.out).write,
            time.process_time if args.cpu_time else time.perf_counter,
        )
        missing |= reasons
        rows += found
    for name, reason in missing.items():
        print(f"{name}: left out, {reason}")
    print(stages(rows), table(rows), sep="\n\n")
    if args.thresholds:
        print(thresholds(rows), end="\n\n")
    latency_plot(rows, args.out.with_suffix(".png"))
    print(f"rows in {args.out}, plot in {args.out.with_suffix('.png')}")
    return 1 if any(row["parity"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
