"""Pictures of measured rows."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def latency_plot(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Left: median seconds a picture, one bar a variant, grouped by size. Right: the roofline.

    Approximate variants are hatched. The roof is what a large matrix product and a large copy reach
    on the same machine; a step moves at least its weights and joint buffers.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row["parity"] and "picture_p50_s" in row]
    figure, (axes, roof) = pyplot.subplots(
        1, 2, figsize=(8 + 1.2 * len(shown), 5), layout="constrained",
        width_ratios=(max(len(shown), 1), 5),
    )  # fmt: skip
    labels = [f"{row['variant'].replace('-', chr(10))}\n{row['height']}²" for row in shown]
    bars = axes.bar(
        labels,
        [row["picture_p50_s"] for row in shown],
        hatch=["//" if row["approximate"] else "" for row in shown],
    )
    axes.bar_label(bars, fmt="%.2f s")
    first = shown[0] if shown else {"model": "", "device": "", "steps": ""}
    axes.set_title(f"{first['model']}, {first['steps']} steps, {first['device']}")
    axes.set_ylabel("seconds a picture (median); hatched: approximate")
    if shown:
        _roofline(roof, shown)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _roofline(axes: Any, rows: Sequence[Mapping[str, Any]]) -> None:
    """TFLOP/s over FLOP a byte, both logarithmic."""
    peak, bandwidth = rows[0]["matrix_peak_tflops"], rows[0]["bandwidth_gbs"] / 1e3
    places = [row["step_tflop"] * 1e3 / row["step_gb"] for row in rows]
    ends = (min(*places, peak / bandwidth) / 4, max(*places, peak / bandwidth) * 4)
    axes.plot(
        (ends[0], peak / bandwidth, ends[1]), (ends[0] * bandwidth, peak, peak), "k-", linewidth=1
    )
    for i, (place, row) in enumerate(zip(places, rows, strict=True)):
        label = f"{row['variant']} {row['height']}²"
        axes.plot(place, row["tflops"], "os^vD*"[i // 10 % 6], color=f"C{i % 10}", label=label)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("FLOP a byte")
    axes.set_ylabel("TFLOP/s")
    axes.set_title("a step under the measured roof")
    axes.legend(fontsize="small")


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
        sizes = list(dict.fromkeys(_size(row) for row in some))
        for row in some:
            x = sizes.index(_size(row))
            if "floor_us" not in row:
                axes.hlines(row["p50_us"], x - 0.45, x + 0.45, colors="gray", linestyles="dotted")
                continue
            place = variants.index(row["variant"])
            x += 0.9 * ((place + 0.5) / len(variants) - 0.5)
            axes.bar(x, row["p50_us"], 0.85 / len(variants), color=f"C{place}")
            axes.plot(x, row["floor_us"], "k_")
        axes.set_xticks(range(len(sizes)), [f"{n}×{t}×{c}" for n, t, c in sizes])
        axes.set_yscale("log")
        axes.set_title(f"{op}, {name}")
        axes.set_ylabel("µs (median)")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{i}") for i in range(len(variants))]
    figure.legend(handles, variants, loc="outside lower center", ncols=len(variants) or 1)
    figure.suptitle(f"{shown[0]['dtype']}, {shown[0]['device']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _size(row: Mapping[str, Any]) -> tuple[int, int, int]:
    """Pictures of all layers, tokens, channels."""
    return row["layers"] * row["pictures"], row["tokens"], row["channels"]
