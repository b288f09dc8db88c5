"""Pictures of measured rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def latency_bars(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Median seconds a picture, one bar a variant, grouped by size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row["parity"]]
    labels = [f"{row['variant']}\n{row['height']}²" for row in shown]
    heights = [row["picture_p50_s"] for row in shown]
    figure, axes = pyplot.subplots(figsize=(2 + 1.4 * len(shown), 4), layout="constrained")
    bars = axes.bar(labels, heights)
    axes.bar_label(bars, fmt="%.2f s")
    first = shown[0] if shown else {"model": "", "device": "", "steps": ""}
    axes.set_title(f"{first['model']}, {first['steps']} steps, {first['device']}")
    axes.set_ylabel("seconds a picture (median)")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
