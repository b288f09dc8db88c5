"""How long a restoration takes: `python -m bench.latency`.

With no argument it measures what is there: on a GPU sd35-medium with random weights, on a CPU the
shipped tiny. All variants run side by side and interleaved, on random data; a variant whose result
differs from the reference gets no speed. One JSON line a row, and a plot.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.plots import latency_bars
from mimdit.condition import Condition
from mimdit.engine import Engine
from mimdit.loading import PRECISIONS, WEIGHTS, load_pipeline
from mimdit.mim import Routing
from mimdit.presets import PRESETS, build
from mimdit.transformer import MiMDiTTransformer2DModel

# Relative error of a step's raw output (root mean square) that a variant may have.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}
Row = dict[str, Any]


@dataclass(frozen=True)
class Variant:
    """One way to run the model: `encode(z_lq)` → condition, `step(x, t, condition)` → raw output.

    cached: whether all steps share one condition. equal: whether its results should be the
    reference's; the bare backbone, which sees no condition, is there to compare with.
    """

    name: str
    encode: Callable[[Tensor], Condition]
    step: Callable[[Tensor, Tensor, Condition], Tensor]
    cached: bool
    equal: bool = True

    def picture(self, x: Tensor, z: Tensor, steps: int) -> Tensor:
        """Euler steps of equal length from noise x to a latent; both [B,c,h,w].

        Raw outputs (their first c channels) stand in for velocities.
        """
        condition = self.encode(z) if self.cached else None
        for i in range(steps):
            t = x.new_full((len(x),), 1000 * (1 - i / steps))
            given = condition if condition is not None else self.encode(z)
            x = x - self.step(x, t, given)[:, : x.shape[1]] / steps
        return x


def variants_of(model: MiMDiTTransformer2DModel) -> list[Variant]:
    """The reference as the equations say and with the conditioning computed once, the engine with
    and without a graph, and the bare backbone of diffusers."""

    def step(literal: bool) -> Callable[[Tensor, Tensor, Condition], Tensor]:
        def run(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
            model.use_literal_attention(literal)
            return model.predict(x, t, condition)

        return run

    def accelerated(name: str, graph: bool) -> Variant:
        engine = Engine(model, graph)

        def through(call: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                model.engine = engine
                try:
                    return call(*arguments)
                finally:
                    model.engine = None

            return run

        return Variant(name, through(model.encode_condition), through(model.predict), cached=True)

    def bare(x: Tensor, t: Tensor, _: Condition) -> Tensor:
        return model.predict(x, t, None)

    found = [
        Variant("reference", model.encode_condition, step(literal=True), cached=False),
        Variant("reference-cached", model.encode_condition, step(literal=False), cached=True),
        accelerated("engine-no-graph", graph=False),
    ]
    if model.device.type == "cuda":
        found.append(accelerated("engine", graph=True))
    nothing = Condition(torch.empty(0), (), Routing(*[torch.empty(0)] * 4))
    found.append(Variant("backbone-eager", lambda _: nothing, bare, cached=True, equal=False))
    if model.device.type == "cuda":
        # What a user of diffusers would run; not the blocks of the model itself, which all share.
        compiled = torch.compile(bare, mode="max-autotune-no-cudagraphs")
        found.append(Variant("backbone-compiled", lambda _: nothing, compiled, True, False))
    return found


def load(name: str, device: str, precision: str) -> MiMDiTTransformer2DModel:
    """A trained model by name or folder, or a preset with random weights."""
    if name in PRESETS and not (WEIGHTS / name).is_dir():
        with torch.device(device):
            model = build(name, PRECISIONS[precision]).randomize_(0)
    else:
        model = load_pipeline(name, device, precision).transformer
    return model.requires_grad_(False).eval()


@torch.no_grad()
def run(
    model: MiMDiTTransformer2DModel, label: str, size: int, steps: int, runs: int, warmup: int
) -> list[Row]:
    """Rows of all variants for one size in pixels; without times where parity fails."""
    device, dtype = next(model.parameters()).device, model.dtype
    factor = 4 if model.config["in_channels"] == 48 else 8
    generator = torch.Generator().manual_seed(0)
    shape = (1, model.config["in_channels"], size // factor, size // factor)
    x, z = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(2))
    t = torch.full((1,), 500.0, device=device, dtype=dtype)
    variants = variants_of(model)
    cold = {v.name: measure.seconds(lambda v=v: v.picture(x, z, 1), device) for v in variants}
    wanted = variants[0].step(x, t, variants[0].encode(z)).float()
    fixed = {
        "bench": "latency",
        "model": label,
        "dtype": str(dtype).removeprefix("torch."),
        "height": size,
        "width": size,
        "batch": 1,
        "steps": steps,
        "seed": 0,
    } | measure.environment(device)
    peak = measure.matrix_peak(device, dtype)
    rows: list[Row] = []
    for variant in variants:
        condition = variant.encode(z)
        error = variant.step(x, t, condition).float() - wanted
        relative = (error.square().mean() / wanted.square().mean()).sqrt().item()
        if not variant.equal:
            relative, error = None, None
        memory = measure.peak_memory_mb(lambda v=variant: v.picture(x, z, 1), device)
        flops = measure.floating_point_operations(
            lambda v=variant, c=condition: v.step(x, t, c if v.cached else v.encode(z))
        )
        row = fixed | {
            "variant": variant.name,
            "rel_err": relative,
            "max_err": None if error is None else error.abs().max().item(),
            "parity": relative is None or relative <= TOLERANCE[dtype],
            "cold_s": cold[variant.name],
            "peak_allocated_mb": memory[0],
            "peak_reserved_mb": memory[1],
            "step_tflop": flops / 1e12,
        }
        rows.append(row)
    equal = [v for v, row in zip(variants, rows, strict=True) if row["parity"]]
    conditions = {v.name: v.encode(z) for v in equal}
    timed = {
        "encode": {v.name: lambda v=v: v.encode(z) for v in equal},
        "step": {
            v.name: lambda v=v: v.step(x, t, conditions[v.name] if v.cached else v.encode(z))
            for v in equal
        },
        "picture": {v.name: lambda v=v: v.picture(x, z, steps) for v in equal},
    }
    for part, calls in timed.items():
        scale, unit = (1, "s") if part == "picture" else (1e3, "ms")
        for name, times in measure.interleaved(calls, device, warmup, runs).items():
            row = next(row for row in rows if row["variant"] == name)
            for share in (50, 90, 99):
                value = measure.percentile(times, share / 100) * scale
                row[f"{part}_p{share}_{unit}"] = value
    for row in rows:
        if row["parity"]:
            row["tflops"] = row["step_tflop"] / (row["step_p50_ms"] / 1e3)
            row["peak_share"] = row["tflops"] * 1e12 / peak
    return rows


def table(rows: Sequence[Row]) -> str:
    """Markdown: medians, and ratios to the reference of the same model and size."""
    lines = [
        "| model | size | variant | step | picture | × reference | of matrix peak | rel. error |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['model']} | {row['height']}² × {row['steps']} steps | {row['variant']} |"
        if not row["parity"]:
            lines.append(
                f"{head} no speed: differs from the reference | | | | {row['rel_err']:.1e} |"
            )
            continue
        error = "–" if row["rel_err"] is None else f"{row['rel_err']:.1e}"
        same = [r for r in rows if (r["model"], r["height"]) == (row["model"], row["height"])]
        ratio = same[0]["picture_p50_s"] / row["picture_p50_s"]
        lines.append(
            f"{head} {row['step_p50_ms']:.1f} ms | {row['picture_p50_s']:.3f} s | {ratio:.2f} | "
            f"{row['peak_share']:.0%} | {error} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    p = argparse.ArgumentParser(prog="python -m bench.latency", description=__doc__)
    p.add_argument("--model", default="sd35-medium" if gpu else "tiny", help="preset or folder")
    p.add_argument("--sizes", type=int, nargs="+", default=[512, 1024] if gpu else [256])
    p.add_argument("--steps", type=int, default=40, help="of a picture (default 40)")
    p.add_argument("--runs", type=int, default=30 if gpu else 5, help="timed runs of each variant")
    p.add_argument("--warmup", type=int, default=10 if gpu else 1)
    p.add_argument("--device", default="cuda" if gpu else "cpu")
    p.add_argument("--precision", default="bf16" if gpu else "fp32", choices=list(PRECISIONS))
    default = Path("bench/results") / f"latency-{date.today().isoformat()}.jsonl"
    p.add_argument("--out", type=Path, default=default, help=f"JSON lines (default {default})")
    args = p.parse_args(argv)
    model = load(args.model, args.device, args.precision)
    rows: list[Row] = []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for size in args.sizes:
        found = run(model, args.model, size, args.steps, args.runs, args.warmup)
        rows += found
        with args.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in found)
    print(table(rows))
    latency_bars(rows, args.out.with_suffix(".png"))
    print(f"rows in {args.out}, plot in {args.out.with_suffix('.png')}")
    return 0 if all(row["parity"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
