"""What `bench.latency` prints of its rows."""

from collections.abc import Sequence

from bench.rows import Row


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
            reason = row.get("reason", "differs from the reference")
            lines.append(f"{head} no speed: {reason} | | | | {error} | {quality} |")
            continue
        ratio = _ratio(rows, row, "reference")
        lines.append(
            f"{head} {row['step_p50_ms']:.1f} ms | {row['picture_p50_s']:.3f} s | {ratio} | "
            f"{row['peak_share']:.0%} | {error} | {quality} |"
        )
    return "\n".join(lines)


def stages(rows: Sequence[Row]) -> str:
    """One line for each variant: where the time of a picture goes, and how it starts."""
    lines = []
    for row in rows:
        if "capture_s" not in row:
            continue
        parts = {
            name: f"{name}_p50_ms" for name in ("vae_encode", "condition", "step", "vae_decode")
        }
        times = ", ".join(f"{name} {row[key]:.1f} ms" for name, key in parts.items() if key in row)
        lines.append(
            f"{row['variant']} at {row['height']}²: {times}; cold {row['cold_s']:.2f} s, of which "
            f"capture and compilation {row['capture_s']:.2f} s; peak "
            f"{row['peak_allocated_mb']:.0f} MB allocated, {row['peak_reserved_mb']:.0f} reserved"
        )
    return "\n".join(lines)


def thresholds(rows: Sequence[Row]) -> str:
    """Markdown: what the first-block cache gives and what it takes, by threshold and size."""
    lines = [
        "| size | threshold | × engine | steps skipped | PSNR to the engine |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        if row.get("threshold") is None or not row["parity"]:
            continue
        share, quality = row["steps_skipped"] / row["steps"], row["psnr_db"]
        psnr = "–" if quality is None else f"{quality:.1f} dB"
        lines.append(
            f"| {row['height']}² × {row['steps']} steps | {row['threshold']:g} "
            f"| {_ratio(rows, row, 'engine')} | {share:.0%} | {psnr} |"
        )
    return "\n".join(lines)


def _ratio(rows: Sequence[Row], row: Row, name: str) -> str:
    """How many times faster than a variant of the same model and size."""
    same = ("model", "height", "batch")
    other = [
        r["picture_p50_s"]
        for r in rows
        if r["variant"] == name and all(r[key] == row[key] for key in same)
        if "picture_p50_s" in r
    ]
    return f"{other[0] / row['picture_p50_s']:.2f}" if other else "–"
