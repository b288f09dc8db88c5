"""Scores of saved pictures: one by one, and over the pictures of a degradation."""

import math
import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from bench import paper
from bench.tables import Figure
from mimdit.errors import first_line
from mimdit.image_io import read_picture
from mimdit.metrics import Metric
from training.datasets.pairs import Pair

Row = dict[str, Any]
Where = Callable[[Pair], Path]


def score(
    pairs: Sequence[Pair], where: Where, metrics: Mapping[str, Metric], device: str = "cpu"
) -> tuple[list[Row], list[str]]:
    """Scores of each pair's picture at `where(pair)` as `metrics.name` in a row with its `name` and
    `group`, and sentences about pictures that have none.

    A metric that fails for a picture, as some do for small ones, is left out of its row.
    """
    single = {name: metric for name, metric in metrics.items() if not metric.of_folders}
    rows: list[Row] = []
    failures: list[str] = []
    for pair in tqdm(pairs, unit="picture", desc="scores", disable=None):
        try:
            picture = _tensor(where(pair), device)
            clean = None if pair.clean is None else _tensor(pair.clean, device)
            if clean is not None and clean.shape != picture.shape:
                a, b = (f"{x.shape[2]}×{x.shape[1]}" for x in (clean, picture))
                raise ValueError(f"expected {a} pixels, as {pair.clean} has, got {b}")
        except (ValueError, OSError) as error:
            failures.append(f"{pair.name}: {first_line(error)}")
            continue
        row: Row = {"name": pair.name, "group": pair.group}
        for name, metric in single.items():
            if clean is None and metric.needs_original:
                continue
            try:
                value = metric(picture, clean)
                # One would make the mean of all pictures the same.
                if not math.isfinite(value):
                    raise ValueError(f"expected a finite number, got {value}")
                row[name] = value
            # What a network of pyiqa raises for a size it cannot take is not known beforehand.
            except Exception as error:
                failures.append(f"{pair.name}: no {name}: {first_line(error)}")
        rows.append(row)
    return rows, failures


def figures(
    dataset: str,
    pairs: Sequence[Pair],
    rows: Sequence[Row],
    where: Where,
    metrics: Mapping[str, Metric],
    before: tuple[Sequence[Row], Where] | None = None,
) -> tuple[list[Figure], dict[str, str]]:
    """Means by degradation and over all, beside the paper's, and why metrics have none at all.

    The degradations come first, in order, then the data set; a data set of one degradation has one
    row a metric. before: rows and places of the damaged pictures.
    """
    groups = list(dict.fromkeys(pair.group for pair in pairs))
    whole = paper.NAMES.get(dataset, groups[0] if len(groups) == 1 else "all")
    scored = {row["name"] for row in rows}
    found: list[Figure] = []
    missing: dict[str, str] = {}
    parts = [(whole, list(pairs))]
    if len(groups) > 1:
        parts = [(group, [p for p in pairs if p.group == group]) for group in groups] + parts
    for title, part in parts:
        part = [pair for pair in part if pair.name in scored]
        # Only FoundIR's folders are the paper's, however others are called.
        key = title if dataset == "foundir" else dataset if title == whole else ""
        for name, metric in metrics.items():
            try:
                n, ours = _value(metric, part, rows, where)
                damaged = None if before is None else _value(metric, part, *before)[1]
            # FID of one picture, or a data set without originals.
            except Exception as error:
                missing[name] = first_line(error)
                continue
            theirs = paper.figures(key, name)
            found.append(
                Figure(
                    title, name, metric.variant, metric.lower_is_better, n, ours, damaged, theirs
                )
            )
    return found, {name: why for name, why in missing.items() if not _has(found, name)}


def _value(
    metric: Metric, part: Sequence[Pair], rows: Sequence[Row], where: Where
) -> tuple[int, float]:
    """Number of pictures and value of a metric over the pairs; ValueError where it has none."""
    if not metric.of_folders:
        names = {pair.name for pair in part}
        values = [row[metric.name] for row in rows if row["name"] in names and metric.name in row]
        if not values:
            raise ValueError(
                "no picture has this figure, see the failures or the lack of originals"
            )
        return len(values), statistics.fmean(values)
    with_clean = [pair for pair in part if pair.clean is not None]
    if len(with_clean) < 2:
        raise ValueError(f"expected at least two pairs with originals, got {len(with_clean)}")
    with tempfile.TemporaryDirectory() as folder:
        ours, theirs = Path(folder, "ours"), Path(folder, "clean")
        _gather(ours, [where(pair) for pair in with_clean])
        _gather(theirs, [pair.clean for pair in with_clean if pair.clean is not None])
        return len(with_clean), metric.compare_folders(ours, theirs)


def _gather(folder: Path, files: Sequence[Path]) -> None:
    """Links to the files, each once, in a new folder."""
    folder.mkdir()
    for i, file in enumerate(dict.fromkeys(files)):
        link = folder / f"{i:06}{file.suffix.lower()}"
        try:
            os.symlink(file.resolve(), link)
        # File systems and accounts without links.
        except OSError:
            shutil.copyfile(file, link)


def _has(found: Sequence[Figure], name: str) -> bool:
    return any(figure.metric == name for figure in found)


def _tensor(path: Path, device: str) -> Tensor:
    """[3,H,W] float32 in [0,1]."""
    return torch.from_numpy(read_picture(path).rgb).movedim(-1, 0).to(device)
