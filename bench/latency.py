"""How long a restoration takes: `python -m bench.latency`.

With no argument it measures what is there: on a GPU sd35-medium with random weights, on a CPU the
shipped tiny. All variants run side by side and interleaved, on the same damaged picture and noise;
a variant whose result differs from the reference gets no speed, and an approximate one is labelled
so and has the PSNR of its picture to the exact engine's beside its speed. A picture is timed from
latents to latents, conditioning included; encoding and decoding it are stages of their own. One
JSON line a row, and a plot.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.inputs import Inputs, load, make_inputs
from bench.plots import latency_plot
from bench.variants import MAKERS, Sampled, Variant, variants_of
from mimdit import codec
from mimdit.loading import PRECISIONS
from mimdit.pipeline import MiMDiTPipeline

# Relative error of a step's raw output (root mean square) that a variant may have.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
# PSNR in dB of an exact variant's picture to the reference's, in float32, after all steps.
PICTURE = 60.0
# Compiling for a CPU takes minutes; only where it is asked for.
COMPILED = ("engine-compile", "backbone-compiled")
Row = dict[str, Any]


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
) -> tuple[list[Row], dict[str, str]]:
    """Rows of variants for one size in pixels, without times where parity fails; and which were
    left out, and why."""
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
    } | measure.environment(device)
    fixed["matrix_peak_tflops"] = measure.matrix_peak(device, dtype) / 1e12
    fixed["bandwidth_gbs"] = measure.memory_bandwidth(device) / 1e9
    fixed["step_gb"] = given.step_bytes / 1e9
    variants, rows, missing = [], [], {}
    for name in names:
        made: list[Variant] = []

        def first(name: str = name, made: list[Variant] = made) -> None:
            found, reasons = variants_of(model, given.z, [name])
            made += found
            missing.update(reasons)
            for variant in found:
                variant.picture(model, given.x, given.z, 1)

        cold = measure.seconds(first, device)
        for variant in made:
            variants.append(variant)
            row = fixed | {"variant": name, "approximate": variant.approximate, "cold_s": cold}
            rows.append(row | _checked(pipe, variant, given, seen, wanted))
    passed = [(v, row) for v, row in zip(variants, rows, strict=True) if row["parity"]]
    _time(pipe, given, passed, steps, runs, warmup)
    return rows, missing


def _checked(
    pipe: MiMDiTPipeline, variant: Variant, given: Inputs, seen: Tensor, wanted: Tensor
) -> Row:
    """Errors, memory and FLOPs of one step."""
    model, z, t = pipe.transformer, given.z, given.t
    condition = variant.encode(z)
    found = variant.step(seen, t, condition).float()
    error = found - wanted
    relative = (error.square().mean() / wanted.square().mean()).sqrt().item()
    largest = error.abs().max().item()
    exact = variant.equal and not variant.approximate
    within = relative <= TOLERANCE[model.dtype]
    counted = variant.counted or variant.step
    plain = condition if variant.counted is None else model.encode_condition(z)

    def once() -> None:
        variant.picture(model, given.x, z, 1)

    memory = measure.peak_memory_mb(once, given.x.device)
    flops = measure.floating_point_operations(
        lambda: counted(seen, t, plain if variant.cached else variant.encode(z))
    )
    return {
        "rel_err": relative if variant.equal else None,
        "max_err": largest if variant.equal else None,
        "parity": within if exact else bool(found.isfinite().all()),
        "peak_allocated_mb": memory[0],
        "peak_reserved_mb": memory[1],
        "step_tflop": flops / 1e12,
    }


def _time(
    pipe: MiMDiTPipeline,
    given: Inputs,
    passed: Sequence[tuple[Variant, Row]],
    steps: int,
    runs: int,
    warmup: int,
) -> None:
    """Add times, rates and the pictures' PSNR to the rows of variants whose results are right."""
    model, device, x, z, t = pipe.transformer, given.x.device, given.x, given.z, given.t
    seen = given.seen.to(model.dtype)
    conditions = {v.name: v.encode(z) for v, _ in passed}
    pictures: dict[str, Sampled] = {}

    def step(v: Variant) -> None:
        v.step(seen, t, conditions[v.name] if v.cached else v.encode(z))

    def picture(v: Variant) -> None:
        pictures[v.name] = v.picture(model, x, z, steps)

    shared = {
        "vae_encode": {"": lambda: codec.encode(pipe.vae, given.pixels)},
        "vae_decode": {"": lambda: codec.decode(pipe.vae, x)},
    }
    own = {
        "condition": {v.name: lambda v=v: v.encode(z) for v, _ in passed},
        # On the same inputs a cache would take its shortcut every time.
        "step": {v.name: lambda v=v: step(v) for v, _ in passed if v.skipped is None},
        "picture": {v.name: lambda v=v: picture(v) for v, _ in passed},
    }
    rows = {v.name: row for v, row in passed}
    for part, calls in (shared | own).items():
        for name, times in measure.interleaved(calls, device, warmup, runs).items():
            for row in [rows[name]] if name else rows.values():
                row |= _percentiles(part, times, 1 if part == "picture" else 1e3)
    if not passed:
        return
    exact = next((pictures[n] for n in ("engine", "engine-no-graph") if n in pictures), None)
    if exact is None:
        exact = variants_of(model, z, ["engine"])[0][0].picture(model, x, z, steps)
    reference = pictures.get("reference", exact)
    for v, row in passed:
        if v.skipped is not None:
            # The mean over a picture.
            for share in (50, 90, 99):
                rest = row[f"picture_p{share}_s"] * 1e3 - row["condition_p50_ms"]
                row[f"step_p{share}_ms"] = rest / steps
        skipped, blocks = pictures[v.name].skipped, len(model.transformer_blocks)
        row["steps_skipped"] = skipped
        row["step_tflop"] *= 1 - skipped / steps * (blocks - 1) / blocks
        if v.equal:
            against = exact if v.approximate else reference
            row["psnr_to"] = "engine" if v.approximate else "reference"
            row["psnr_db"] = given.psnr(pipe, pictures[v.name].latents, against.latents)
        warm = (row["condition_p50_ms"] + row["step_p50_ms"]) / 1e3
        row["capture_s"] = max(row["cold_s"] - warm, 0.0)
        row["tflops"] = row["step_tflop"] / (row["step_p50_ms"] / 1e3)
        row["peak_share"] = row["tflops"] / row["matrix_peak_tflops"]
        quality = row.get("psnr_db")
        drifted = not v.approximate and quality is not None and quality < PICTURE
        if drifted and model.dtype == torch.float32:
            row["parity"] = False
            for key in [
                k for k in row if k.startswith(("step_p", "picture_p", "tflops", "peak_s"))
            ]:
                del row[key]


def _percentiles(part: str, times: list[float], scale: float) -> Row:
    unit = "s" if part == "picture" else "ms"
    shares = (50, 90, 99)
    return {f"{part}_p{s}_{unit}": measure.percentile(times, s / 100) * scale for s in shares}


def table(rows: Sequence[Row]) -> str:
    """Markdown: medians, and ratios to the reference of the same model and size."""
    lines = [
        "| model | size | variant | step | picture | × reference | of matrix peak | rel. error | "
        "PSNR |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        name = row["variant"] + (" (approximate)" if row["approximate"] else "")
        head = f"| {row['model']} | {row['height']}² × {row['steps']} steps | {name} |"
        error = "–" if row["rel_err"] is None else f"{row['rel_err']:.1e}"
        quality = "–"
        if row.get("psnr_db") is not None:
            quality = f"{row['psnr_db']:.1f} dB to the {row['psnr_to']}"
        if not row["parity"]:
            lines.append(
                f"{head} no speed: differs from the reference | | | | {error} | {quality} |"
            )
            continue
        same = [
            r["picture_p50_s"]
            for r in rows
            if (r["model"], r["height"], r["variant"]) == (row["model"], row["height"], "reference")
            and "picture_p50_s" in r
        ]
        ratio = f"{same[0] / row['picture_p50_s']:.2f}" if same else "–"
        lines.append(
            f"{head} {row['step_p50_ms']:.1f} ms | {row['picture_p50_s']:.3f} s | {ratio} | "
            f"{row['peak_share']:.0%} | {error} | {quality} |"
        )
    return "\n".join(lines)


def stages(rows: Sequence[Row]) -> str:
    """One line for each variant: where the time of a picture goes, and how it starts."""
    lines = []
    for row in rows:
        if not row["parity"]:
            continue
        lines.append(
            f"{row['variant']} at {row['height']}²: VAE encode {row['vae_encode_p50_ms']:.1f} ms, "
            f"conditioning {row['condition_p50_ms']:.1f} ms, step {row['step_p50_ms']:.1f} ms, "
            f"VAE decode {row['vae_decode_p50_ms']:.1f} ms; cold {row['cold_s']:.2f} s, of which "
            f"capture and compilation {row['capture_s']:.2f} s; peak "
            f"{row['peak_allocated_mb']:.0f} MB allocated, {row['peak_reserved_mb']:.0f} reserved"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    p = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    p.add_argument("--model", default="sd35-medium" if gpu else "tiny", help="preset or folder")
    p.add_argument("--sizes", type=int, nargs="+", default=[512, 1024] if gpu else [256])
    p.add_argument("--steps", type=int, default=40, help="of a picture (default 40)")
    p.add_argument("--batch", type=int, default=1, help="pictures at once (default 1)")
    p.add_argument("--runs", type=int, default=30 if gpu else 5, help="timed runs of each variant")
    p.add_argument("--warmup", type=int, default=10 if gpu else 1)
    p.add_argument("--device", default="cuda" if gpu else "cpu")
    p.add_argument("--precision", default="bf16" if gpu else "fp32", choices=list(PRECISIONS))
    names = ", ".join(MAKERS)
    p.add_argument("--variants", nargs="+", choices=list(MAKERS), metavar="NAME", help=names)
    default = Path("bench/results") / f"latency-{date.today().isoformat()}.jsonl"
    p.add_argument("--out", type=Path, default=default, help=f"JSON lines (default {default})")
    args = p.parse_args(argv)
    names, missing = default_variants(args.device)
    if args.variants:
        names, missing = args.variants, {}
    pipe = load(args.model, args.device, args.precision)
    rows: list[Row] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for size in args.sizes:
        found, reasons = run(
            pipe, args.model, size, args.steps, args.runs, args.warmup, names, args.batch
        )
        missing |= reasons
        rows += found
        with args.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
    for name, reason in missing.items():
        print(f"{name}: left out, {reason}")
    print(stages(rows), table(rows), sep="\n\n")
    latency_plot(rows, args.out.with_suffix(".png"))
    print(f"rows in {args.out}, plot in {args.out.with_suffix('.png')}")
    return 0 if all(row["parity"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
