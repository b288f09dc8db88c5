"""Times of the variants of `bench.latency`, and what follows from them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from bench import machine, measure
from bench.inputs import Inputs
from bench.rows import Row, said
from bench.variants import Sampled, Variant, variants_of
from mimdit import codec
from mimdit.pipeline import MiMDiTPipeline

# PSNR in dB of an exact variant's picture to the reference's, in float32, after all steps.
PICTURE = 60.0
# What a row without parity must not have.
_SPEEDS = ("step_p", "picture_p", "tflops", "peak_s", "runs")


def failed(row: Row, fault: Exception) -> None:
    """Note an error; that memory ran out says nothing of the results."""
    row["reason"] = said(fault)
    row["parity"] = None if isinstance(fault, torch.OutOfMemoryError) else False
    for key in [key for key in row if key.startswith(_SPEEDS)]:
        del row[key]


def time_variants(
    pipe: MiMDiTPipeline,
    given: Inputs,
    passed: Sequence[tuple[Variant, Row]],
    steps: int,
    turns: tuple[int, int, float, measure.Clock],
    save: Callable[[], None],
) -> None:
    """Add times, rates and the pictures' PSNR to the rows of variants whose results are right.

    turns: of warm-up, timed ones, the time after which no more begin, and what they are timed by.
    """
    model, device, x, z, t = pipe.transformer, given.x.device, given.x, given.z, given.t
    seen = given.seen.to(model.dtype)
    conditions = {v.name: v.encode(z) for v, _ in passed}
    pictures: dict[str, Sampled] = {}
    rows = {v.name: row for v, row in passed}
    warmup, runs, until, clock = turns

    def step(v: Variant) -> None:
        v.step(seen, t, conditions[v.name] if v.cached else v.encode(z))

    def picture(v: Variant) -> None:
        pictures[v.name] = v.picture(model, x, z, steps)

    def conclude(times: dict[str, list[float]]) -> None:
        # Asking takes long enough to let the clocks fall.
        turn = max(map(len, times.values()), default=0)
        state = machine.gpu_state(device) if turn % 10 == 1 else {}
        for name, found in times.items():
            rows[name] |= percentiles("picture", found, 1) | {"runs": len(found)} | state
        timed = [(v, row) for v, row in passed if v.name in times]
        _conclude(pipe, given, timed, pictures, steps)
        save()

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
    faults: dict[str, Exception] = {}
    for part, calls in (shared | own).items():
        calls = {name: call for name, call in calls.items() if name not in faults}
        options: dict[str, Any] = {"until": until, "faults": faults, "clock": clock}
        if part == "picture":
            options["after"] = conclude
        found = measure.interleaved(calls, device, warmup, runs, **options)
        for name, times in found.items() if part != "picture" else ():
            for row in [rows[name]] if name else rows.values():
                row |= percentiles(part, times, 1e3)
    for name, fault in faults.items():
        if name:
            failed(rows[name], fault)
            continue
        for row in rows.values():
            row["vae_reason"] = said(fault)
    save()


def _conclude(
    pipe: MiMDiTPipeline,
    given: Inputs,
    timed: Sequence[tuple[Variant, Row]],
    pictures: dict[str, Sampled],
    steps: int,
) -> None:
    """Add to rows with times what follows from them, and the pictures' PSNR."""
    model = pipe.transformer
    if not timed:
        return
    exact = next((pictures[n] for n in ("engine", "engine-no-graph") if n in pictures), None)
    if exact is None:
        engine = variants_of(model, given.z, ["engine"])[0][0]
        exact = pictures["engine"] = engine.picture(model, given.x, given.z, steps)
    reference = pictures.get("reference", exact)
    for v, row in timed:
        if v.skipped is not None:
            # The mean over a picture.
            for share in (50, 90, 99):
                rest = row[f"picture_p{share}_s"] * 1e3 - row["condition_p50_ms"]
                row[f"step_p{share}_ms"] = rest / steps
        skipped, blocks = pictures[v.name].skipped, len(model.transformer_blocks)
        row["steps_skipped"] = skipped
        done = row["step_tflop"] * (1 - skipped / steps * (blocks - 1) / blocks)
        if v.equal:
            against = exact if v.approximate else reference
            row["psnr_to"] = "engine" if v.approximate else "reference"
            row["psnr_db"] = given.psnr(pipe, pictures[v.name].latents, against.latents)
        warm = (row["condition_p50_ms"] + row["step_p50_ms"]) / 1e3
        row["capture_s"] = max(row["cold_s"] - warm, 0.0)
        row["tflops"] = done / (row["step_p50_ms"] / 1e3)
        row["peak_share"] = row["tflops"] / row["matrix_peak_tflops"]
        quality = row.get("psnr_db")
        drifted = not v.approximate and quality is not None and quality < PICTURE
        if drifted and model.dtype == torch.float32:
            row["parity"] = False
            row["reason"] = f"its picture differs from the reference's: {quality:.1f} dB"
        if not row["parity"]:
            for key in [key for key in row if key.startswith(_SPEEDS)]:
                del row[key]


def percentiles(part: str, times: list[float], scale: float) -> Row:
    """Fields of a row: p50, p90 and p99 of seconds; scale: 1, or 1000 for milliseconds."""
    unit = "s" if part == "picture" else "ms"
    shares = (50, 90, 99)
    return {f"{part}_p{s}_{unit}": measure.percentile(times, s / 100) * scale for s in shares}
