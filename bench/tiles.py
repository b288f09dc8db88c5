"""Large pictures, restored in tiles: `python -m bench.tiles`.

Time a megapixel and peak memory should not depend on the size. Every size is first restored in one
step with and without the engine; where the latents differ there is no speed. Pictures are timed
whole, encoding and decoding included. One JSON line a row, and a table.
"""

import math
import sys
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from bench import machine, measure
from bench.arguments import at_least, loading, parser
from bench.inputs import load, unit_of
from bench.latency import TOLERANCE
from bench.latency_times import failed, percentiles
from bench.rows import Row, RowFile
from export.checks import relative_error
from mimdit.engine import accelerate
from mimdit.pipeline import MiMDiTPipeline


def side_of(pipe: MiMDiTPipeline, megapixels: float) -> int:
    """Pixels a side of a square picture, a whole number of tokens."""
    unit = unit_of(pipe)
    return max(round(math.sqrt(megapixels * 1e6) / unit), 1) * unit


def measured(
    pipe: MiMDiTPipeline, side: int, steps: int, runs: int, warmup: int, until: float
) -> Row:
    """Errors, memory and times of one size."""
    device, dtype = pipe.transformer.device, pipe.transformer.dtype
    picture = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))

    def restored(count: int, output: str) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": count, "output_type": output, "generator": generator}
        return pipe(picture, **options).images  # pyright: ignore[reportCallIssue]

    accelerate(pipe, enabled=False)
    wanted = restored(1, "latent")
    accelerate(pipe)
    relative = relative_error(restored(1, "latent"), wanted)
    plan = pipe.plan(side, side, num_inference_steps=steps)
    row: Row = {
        "rel_err": relative,
        "parity": relative <= TOLERANCE[dtype],
        "tile": [n * plan.factor for n in plan.tiling.size],
        "tiles": len(plan.tiling.corners),
        "tile_batch": plan.batch,
    }
    if not row["parity"]:
        return row
    peaks = measure.peak_memory_mb(lambda: restored(steps, "pt"), device)
    calls = {"": lambda: restored(steps, "pt")}
    times = measure.interleaved(calls, device, warmup, runs, until=until)[""]
    row |= percentiles("picture", times, 1) | machine.gpu_state(device) | {"runs": len(times)}
    row["seconds_per_megapixel"] = row["picture_p50_s"] / (side * side / 1e6)
    return row | {"peak_allocated_mb": peaks[0], "peak_reserved_mb": peaks[1]}


def table(rows: Sequence[Row]) -> str:
    """Markdown: time a megapixel and memory by size."""
    lines = ["| picture | tiles | picture | a megapixel | × the first | peak memory | rel. error |"]
    lines.append("|---" * 7 + "|")
    first = next((r["seconds_per_megapixel"] for r in rows if "picture_p50_s" in r), None)
    for row in rows:
        head = f"| {row['height']}² ({row['megapixels']:.2f} MP) |"
        error = "" if row["rel_err"] is None else f"{row['rel_err']:.1e}"
        if first is None or "picture_p50_s" not in row:
            lines.append(f"{head} | no speed: {row.get('reason', 'differs')} | | | | {error} |")
            continue
        high, wide = row["tile"]
        each, tiles = row["seconds_per_megapixel"], f"{row['tiles']} of {wide}×{high}"
        lines.append(
            f"{head} {tiles} | {row['picture_p50_s']:.2f} s | {each:.3f} s | {each / first:.2f} "
            f"| {row['peak_allocated_mb']:.0f} MB | {error} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    p = parser("tiles", __doc__)
    sizes = [1, 4, 16] if gpu else [0.25, 1]
    p.add_argument("--megapixels", type=float, nargs="+", default=sizes, help=f"(default {sizes})")
    p.add_argument("--steps", type=int, default=40 if gpu else 1)
    p.add_argument("--runs", type=int, default=5, help="timed runs of each size (default 5)")
    p.add_argument("--warmup", type=int, default=0, help="beside the run for memory (default 0)")
    enough = "after which only three runs of a size are taken (default: no limit)"
    p.add_argument("--seconds", type=float, default=math.inf, help=enough)
    args = p.parse_args(argv)
    for value in args.megapixels:
        # Written so that NaN fails.
        if not 0 < value < math.inf:
            p.error(f"--megapixels: expected numbers above 0, got {value:g}")
    at_least(p, args, steps=1, runs=1, warmup=0)
    until, file = time.perf_counter() + args.seconds, RowFile(args.out)
    with loading(p, args):
        pipe = load(args.model, args.device, args.precision)
    pipe.set_progress_bar_config(disable=True)
    fixed = {"bench": "tiles", "model": args.model, "steps": args.steps, "batch": 1}
    fixed |= {"dtype": str(pipe.transformer.dtype).removeprefix("torch.")}
    fixed |= machine.environment(pipe.transformer.device)
    rows: list[Row] = []
    for megapixels in args.megapixels:
        side = side_of(pipe, megapixels)
        row = fixed | {"height": side, "width": side, "megapixels": side * side / 1e6}
        row |= {"rel_err": None, "parity": None}
        try:
            row |= measured(pipe, side, args.steps, args.runs, args.warmup, until)
        # Whatever stops a size must not stop the others.
        except Exception as fault:
            failed(row, fault)
        rows.append(row)
        file.write(rows)
    print(table(rows), f"rows in {args.out}", sep="\n")
    return 1 if any(row["parity"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
