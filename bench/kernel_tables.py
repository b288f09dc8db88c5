"""What `bench.kernels` prints of its rows."""

from collections.abc import Sequence

from bench.rows import Row


def size_of(row: Row) -> str:
    """T×C, or how many pictures of all layers together before it."""
    count = row["layers"] * row["pictures"]
    return (f"{count}×" if count > 1 else "") + f"{row['tokens']}×{row['channels']}"


def table(rows: Sequence[Row]) -> str:
    """Markdown: medians and what they are shares of, or why there is no speed."""
    lines = [
        "| op | size | pass | variant | error | µs (p10–p90) | of matrix peak | of bandwidth | "
        "kernel is × faster |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        error = "" if row["error"] is None else f"{row['error']:.1e}"
        head = f"| {row['op']} | {size_of(row)} | {row['pass']} | "
        head += f"{row['variant']} | {error} |"
        if "p50_us" not in row:
            lines.append(f"{head} {row['reason'] or 'agrees'} | | | |")
            continue
        cells = f" {row['p50_us']:.1f} ({row['p10_us']:.1f}–{row['p90_us']:.1f}) |"
        shares = [row.get(key) for key in ("matrix_share", "bandwidth_share")]
        cells += "".join(" |" if share is None else f" {share:.0%} |" for share in shares)
        ratio = row.get("kernel_speedup")
        lines.append(f"{head}{cells} {'' if ratio is None else f'{ratio:.2f}'} |")
    return "\n".join(lines)
