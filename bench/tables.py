"""Results of an evaluation as Markdown, LaTeX, CSV and JSON."""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

# What the figures depend on besides the pictures.
LIBRARIES = ("torch", "torchvision", "pyiqa", "diffusers", "numpy", "Pillow")
_FORMULAS = (r"$\downarrow$", r"$\uparrow$")


@dataclass(frozen=True)
class Figure:
    """One metric over the pictures of one degradation.

    Attributes:
        degradation: a group of pairs, or the data set.
        n: pictures that it was computed for.
        damaged: the same of the pictures as they came, None where not asked for.
        paper: published figures by method.
    """

    degradation: str
    metric: str
    variant: str
    lower_is_better: bool
    n: int
    ours: float
    damaged: float | None = None
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """An evaluation: figures, and all that is needed to tell what they are.

    Attributes:
        settings: of the restoration. versions: of libraries. missing: why metrics are left out.
        failures: a sentence for each picture that has no figures.
        inter: mean weights of the expert groups by kind of damage; routing: a table of them.
    """

    dataset: str
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    figures: Sequence[Figure]
    missing: Mapping[str, str] = field(default_factory=dict)
    failures: Sequence[str] = ()
    inter: Mapping[str, Sequence[float]] = field(default_factory=dict)
    routing: str = ""

    @property
    def methods(self) -> list[str]:
        """Methods of the paper that the figures have, MiM-DiT first."""
        found = list(dict.fromkeys(name for figure in self.figures for name in figure.paper))
        return sorted(found, key=lambda name: name != "MiM-DiT")


def versions() -> dict[str, str]:
    """Versions of the libraries that are installed, and of mimdit."""
    from mimdit import __version__

    found = {"mimdit": __version__}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def markdown(results: Results) -> str:
    """A table, and below it variants, versions, what is missing, and the routing."""
    head, rows = _cells(results, "↓", "↑")
    lines = [f"# {results.dataset}", "", _row(head), "|---" * len(head) + "|"]
    lines += [_row(row) for row in rows]
    lines += ["", *(f"- {line}" for line in _notes(results))]
    lines += [f"- without {name}: {reason}" for name, reason in results.missing.items()]
    lines += [f"- failed: {sentence}" for sentence in results.failures]
    if results.routing:
        lines += ["", "## Routing: mean weight of each group of experts", "", results.routing]
    return "\n".join(lines) + "\n"


def latex(results: Results) -> str:
    """A `table` of booktabs, with variants and versions in the caption."""
    head, rows = _cells(results, *_FORMULAS)
    rows = [[_escape(cell) for cell in row] for row in rows]
    lines = [
        r"\begin{table}",
        rf"\caption{{{_escape(results.dataset)}. {' '.join(map(_escape, _notes(results)))}}}",
        rf"\begin{{tabular}}{{ll{'r' * (len(head) - 2)}}}",
        r"\toprule",
        " & ".join(map(_escape, head)) + r" \\",
    ]
    before = ""
    for row in rows:
        lines += [r"\midrule"] if row[0] != before else []
        before = row[0]
        lines.append(" & ".join(row) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", r"\end{table}"]) + "\n"


def comma_separated(results: Results) -> str:
    """One line a figure; the columns of the paper last."""
    out = io.StringIO()
    head = ["dataset", "degradation", "metric", "variant", "better", "n", "ours", "damaged"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*head, *(_paper(name) for name in results.methods), "versions"])
    for f in results.figures:
        better = "lower" if f.lower_is_better else "higher"
        own = [results.dataset, f.degradation, f.metric, f.variant, better, f.n, f.ours, f.damaged]
        theirs = [f.paper.get(name) for name in results.methods]
        values = [*own, *theirs, _listed(results.versions)]
        writer.writerow(["" if value is None else value for value in values])
    return out.getvalue()


def as_json(results: Results) -> str:
    """Everything."""
    return json.dumps(asdict(results) | {"routing": dict(results.inter)}, indent=2) + "\n"


WRITERS = {
    "results.md": markdown,
    "results.tex": latex,
    "results.csv": comma_separated,
    "results.json": as_json,
}


def _cells(results: Results, lower: str, higher: str) -> tuple[list[str], list[list[str]]]:
    damaged = any(figure.damaged is not None for figure in results.figures)
    methods = results.methods
    head = ["degradation", "metric", "N", *["damaged"] * damaged, "ours", *map(_paper, methods)]
    rows = []
    for f in results.figures:
        values = [*[f.damaged] * damaged, f.ours, *(f.paper.get(name) for name in methods)]
        numbers = ["" if value is None else f"{value:.4f}" for value in values]
        arrow = lower if f.lower_is_better else higher
        rows.append([f.degradation, f"{f.metric} {arrow}", str(f.n), *numbers])
    return head, rows


def _notes(results: Results) -> list[str]:
    variants = {figure.metric: figure.variant for figure in results.figures}
    notes = ["N: pictures. Restored pictures were scored as saved PNGs of 8 bits."]
    if variants:
        notes.append(f"Metrics of pyiqa: {_listed(variants, ': ', '; ')}.")
    if results.methods:
        notes.append(
            "Columns of the paper are as published (arXiv 2603.02710); it names neither its "
            "CLIP-IQA variant nor the FoundIR types behind its five degradations."
        )
    notes.append(f"Settings: {_listed(results.settings)}.")
    notes.append(f"Versions: {_listed(results.versions)}.")
    return notes


def _listed(values: Mapping[str, Any], between: str = " ", after: str = ", ") -> str:
    return after.join(f"{name}{between}{value}" for name, value in values.items())


def _paper(method: str) -> str:
    return f"{method} (paper)"


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _escape(text: str) -> str:
    """LaTeX's special characters, but for an arrow at the end."""
    for formula in _FORMULAS:
        if text.endswith(formula):
            return _escape(text.removesuffix(formula)) + formula
    text = text.replace("\\", "/")
    for sign in "&%#_{}$":
        text = text.replace(sign, "\\" + sign)
    return text.replace("~", r"\textasciitilde{}").replace("^", r"\textasciicircum{}")
