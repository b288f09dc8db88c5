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


def kernel_bars(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Median microseconds a call: a panel for each op and pass, one bar a variant, by size.

    Marks are the floors that bandwidth and matrix peak set, the line is an empty kernel.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if "p50_us" in row]
    ops, passes = (list(dict.fromkeys(row[key] for row in shown)) for key in ("op", "pass"))
    variants = list(dict.fromkeys(row["variant"] for row in shown if "floor_us" in row))
    figure, panels = pyplot.subplots(
        len(ops), len(passes), figsize=(7 * len(passes), 3 * len(ops)), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axes, (op, name) in zip(panels.flat, ((o, p) for o in ops for p in passes), strict=True):
        some = [row for row in shown if (row["op"], row["pass"]) == (op, name)]
        sizes = list(dict.fromkeys((row["tokens"], row["channels"]) for row in some))
        for row in some:
            x = sizes.index((row["tokens"], row["channels"]))
            if "floor_us" not in row:
                axes.hlines(row["p50_us"], x - 0.45, x + 0.45, colors="gray", linestyles="dotted")
                continue
            place = variants.index(row["variant"])
            x += 0.9 * ((place + 0.5) / len(variants) - 0.5)
            axes.bar(x, row["p50_us"], 0.85 / len(variants), color=f"C{place}")
            axes.plot(x, row["floor_us"], "k_")
        axes.set_xticks(range(len(sizes)), [f"T={t}, C={c}" for t, c in sizes])
        axes.set_yscale("log")
        axes.set_title(f"{op}, {name}")
        axes.set_ylabel("µs (median)")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(variants))]
    figure.legend(handles, variants, loc="outside lower center", ncols=len(variants) or 1)
    figure.suptitle(f"{shown[0]['dtype']}, {shown[0]['device']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
