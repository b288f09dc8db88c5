"""What engine and kernels are meant to reach, beside what was measured.

`python -m bench.targets PATH …` reads the rows that `bench.suite` and other commands left in files
and folders. Only rows whose results agreed with the reference count, ratios are of rows of one
file, and of an op that was measured at several sizes the worst one decides.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.kernels import EMPTY
from bench.rows import Row

# Below this floor, in µs, a launch decides, and shares of a peak mean nothing.
_SMALL = 30.0
_COMPILED = ("compile", "Restormer's, compile")
_SD35: dict[str, Any] = {"model": "sd35-medium", "steps": 40, "batch": 1}


@dataclass(frozen=True)
class Results:
    """The rows of each file; the last ones are those of the last file by name."""

    files: Sequence[Sequence[Row]]

    def rows(self, bench: str, **known: object) -> Iterator[Row]:
        """Those of a benchmark that agreed with the reference and have these values."""
        wanted = {"bench": bench, "parity": True, **known}
        for row in (row for rows in self.files for row in rows):
            if all(row.get(key) == value for key, value in wanted.items()):
                yield row

    def latency(self, variant: str, side: int, key: str = "picture_p50_s", **known: object) -> Any:
        """The last figure of a way to run the model, or None."""
        known = {**_SD35, "variant": variant, "height": side, "width": side, **known}
        found = [row[key] for row in self.rows("latency", **known) if key in row]
        return found[-1] if found else None

    def ratio(self, over: str, under: str, side: int, **known: Any) -> float | None:
        """How many times the picture of a variant takes as long as another's, beside it."""
        for file in reversed(self.files):
            times = [Results([file]).latency(name, side, **known) for name in (over, under)]
            if None not in times:
                return times[0] / times[1]
        return None

    def spread(self, key: str) -> float | None:
        """The largest figure of `bench.tiles` over the smallest, of one model's sizes."""
        found = [row[key] for row in self.rows("tiles", model="sd35-medium") if key in row]
        return max(found) / min(found) if len(found) > 2 else None

    def kernels(self, ops: str, key: str, small: bool | None = False, **known: object) -> list[Any]:
        """Figures of ops, forward unless another pass is named; small: of which sizes, by floor."""
        known = {"pass": "forward", "variant": "triton", **known}
        found = [row for op in ops.split() for row in self.rows("kernels", op=op, **known)]
        timed = [row for row in found if key in row and "floor_us" in row]
        return [row[key] for row in timed if small in (None, row["floor_us"] < _SMALL)]

    def launches(self) -> list[float]:
        """In empty kernels, what each launch of a small call takes."""
        found = []
        for file in self.files:
            own = Results([file])
            nothing = own.rows("kernels", variant=EMPTY, parity=None)
            empty = [row["p50_us"] for row in nothing if "p50_us" in row]
            for row in own.rows("kernels", variant="triton", **{"pass": "forward"}):
                if empty and row.get("launches") and row.get("floor_us", _SMALL) < _SMALL:
                    found.append(row["p50_us"] / row["launches"] / min(empty))
        return found


@dataclass(frozen=True)
class Target:
    """what: in words. sign: "≤" or "≥". bound: of what `of` finds, None where nothing was measured.
    form: of numbers.
    """

    what: str
    sign: str
    bound: float
    form: str
    of: Callable[[Results], float | None]

    def line(self, results: Results) -> str:
        """A row of the table."""
        found = self.of(results)
        wanted = f"{self.sign} {self.form.format(self.bound)}"
        if found is None:
            return f"| {self.what} | {wanted} | not measured | |"
        met = found <= self.bound if self.sign == "≤" else found >= self.bound
        shown = self.form.format(found)
        return f"| {self.what} | {wanted} | {shown} | {'met' if met else 'missed'} |"


def _least(values: Iterable[float]) -> float | None:
    return min(values, default=None)


def _condition_share(results: Results) -> float | None:
    spent = results.latency("engine", 512, "condition_p50_ms")
    picture = results.latency("engine", 512)
    return None if spent is None or picture is None else spent / 1e3 / picture


def _times(
    what: str, sign: str, bound: float, over: str, under: str, side: int, **known: Any
) -> Target:
    """A picture's time by one variant over that by another."""
    return Target(what, sign, bound, "{:.2f} ×", lambda r: r.ratio(over, under, side, **known))


def _peak(what: str, bound: float, side: int, batch: int) -> Target:
    return Target(
        f"{what}, share of the matrix peak",
        "≥",
        bound,
        "{:.0%}",
        lambda r: r.latency("engine", side, "peak_share", batch=batch),
    )


def _flat(what: str, key: str) -> Target:
    text = f"tiles: {what}, largest over smallest"
    return Target(text, "≤", 1.1, "{:.2f} ×", lambda r: r.spread(key))


def _share(what: str, bound: float, ops: str, key: str, **known: Any) -> Target:
    """The least share of a floor or a peak that ops reach; known: as of `Results.kernels`."""
    return Target(what, "≥", bound, "{:.0%}", lambda r: _least(r.kernels(ops, key, **known)))


def _faster(what: str, bound: float, ops: str, others: Sequence[str], **known: Any) -> Target:
    """How many times kernels are as fast as the fastest of other ways to compute the same."""

    def of(results: Results) -> float | None:
        found = (results.kernels(ops, "kernel_speedup", variant=v, **known) for v in others)
        return _least(x for values in found for x in values)

    return Target(what, "≥", bound, "{:.2f} ×", of)


_PRODUCTS, _ATTENTIONS = "expert_linear expert_combine", "window_attention channel_attention"
_NORMS = "layernorm_modulate gated_residual_layernorm_modulate"
_OTHERS = ("eager", "compile", "cuBLAS loop", "grouped_mm")
_WIDE: dict[str, Any] = {"channels": 1536, "small": None}
_TINY: dict[str, Any] = {"model": "tiny", "dtype": "float32"}
_BACK: dict[str, Any] = {"pass": "forward+backward"}
TARGETS = (
    Target("512², one picture", "≤", 0.28, "{:.3f} s", lambda r: r.latency("engine", 512)),
    _peak("1024²", 0.55, 1024, 1),
    _peak("512², four pictures", 0.6, 512, 4),
    Target("512² with fp8", "≤", 0.2, "{:.3f} s", lambda r: r.latency("engine-fp8", 512)),
    _times("512² beside the compiled bare backbone", "≤", 1.1, "engine", "backbone-compiled", 512),
    _times(
        "1024² beside the compiled bare backbone", "≤", 1.3, "engine", "backbone-compiled", 1024
    ),
    _times("512² faster than the eager reference", "≥", 5.0, "reference", "engine", 512),
    _times("1024² faster than the eager reference", "≥", 2.5, "reference", "engine", 1024),
    Target("512², conditioning of a picture's time", "≤", 0.02, "{:.1%}", _condition_share),
    Target(
        "512², first picture of a process",
        "≤",
        10.0,
        "{:.1f} s",
        lambda r: r.latency("engine", 512, "cold_s"),
    ),
    _times(
        "`tiny` at 256², float32, faster than the eager reference",
        "≥",
        2.5,
        "reference",
        "engine",
        256,
        **_TINY,
    ),
    _flat("time a megapixel", "seconds_per_megapixel"),
    _flat("peak memory", "peak_allocated_mb"),
    _share(
        "expert products, 4096 tokens, 1536 channels: share of the matrix peak",
        0.8,
        _PRODUCTS,
        "matrix_share",
        tokens=4096,
        **_WIDE,
    ),
    _share(
        "expert products, 1024 tokens, 1536 channels: share of the matrix peak",
        0.55,
        _PRODUCTS,
        "matrix_share",
        tokens=1024,
        **_WIDE,
    ),
    _faster(
        "expert products, 384 channels: beside the fastest other",
        1.0,
        _PRODUCTS,
        _OTHERS,
        channels=384,
        small=None,
    ),
    _share("image_gate: floor of its time", 1 / 1.3, "image_gate", "floor_share"),
    _share(
        "window_attention: share of measured bandwidth", 0.7, "window_attention", "bandwidth_share"
    ),
    _share(
        "channel_attention: share of measured bandwidth",
        0.7,
        "channel_attention",
        "bandwidth_share",
    ),
    _share(
        "layernorm_modulate, gated_residual_layernorm_modulate: share of measured bandwidth",
        0.85,
        _NORMS,
        "bandwidth_share",
    ),
    _faster(
        "window_attention, channel_attention: forward beside compiled", 2.0, _ATTENTIONS, _COMPILED
    ),
    _faster(
        "window_attention, channel_attention: forward+backward beside compiled",
        1.5,
        _ATTENTIONS,
        ("compile",),
        **_BACK,
    ),
    Target(
        "small calls: a launch beside an empty kernel",
        "≤",
        2.0,
        "{:.2f} ×",
        lambda r: max(r.launches(), default=None),
    ),
)


def table(results: Results) -> str:
    """Markdown; sd35-medium in 40 steps where nothing else is said."""
    head = ["| target | wanted | measured | |", "|---|---|---|---|"]
    return "\n".join([*head, *(target.line(results) for target in TARGETS)])


def read(*paths: Path) -> Results:
    """The rows of files, and of all files in folders. Raises OSError, ValueError for no rows."""
    files = [file for path in paths for file in (_inside(path) if path.is_dir() else [path])]
    return Results([[json.loads(line) for line in file.read_text().splitlines()] for file in files])


def _inside(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.jsonl"))


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.targets", description=__doc__)
    p.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="rows, or a folder of them")
    args = p.parse_args(argv)
    try:
        print(table(read(*args.paths)))
    except (OSError, ValueError) as error:
        p.error(f"PATH: expected JSON lines, or a folder of them ({error})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
