"""Evaluation on a data set: restore its damaged pictures, score the saved PNGs, write tables.

`mimdit-eval --dataset foundir --data PATH`; the results are in `--output`:

- `restored/NAME.png`: pictures that are there are not restored again, so a run that was stopped
  goes on, and pictures of any other method can be scored;
- `routing/NAME.json`: the experts that were chosen;
- `results.md`, `.tex`, `.csv`, `.json`, and `pictures.csv` with the scores of each picture.
"""

import argparse
import csv
import hashlib
import io
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from bench import routing
from bench.evaluate_scores import Row, figures, score
from bench.tables import WRITERS, Results, markdown, versions
from mimdit.errors import first_line
from mimdit.image_io import read_picture, write_bytes, write_picture
from mimdit.metrics import STANDARD, load_metrics
from mimdit.pipeline import MiMDiTPipeline
from training.datasets.layouts import SPLITS, paired, prefer
from training.datasets.pairs import Listing, Pair

PRESETS = ("foundir", "4krd", "hazerd", "realrain", "uhdll", "folder")


def add_arguments(p: argparse.ArgumentParser) -> None:
    """The flags that an evaluation on a data set has besides those of `bench.quality`."""
    g = p.add_argument_group("data sets", "restore and score a data set instead")
    g.add_argument("--dataset", choices=PRESETS, help="its layout; folder: anyone's pictures")
    g.add_argument("--data", type=Path, help="its folder")
    g.add_argument("--originals", type=Path, help="clean pictures of the same names, for `folder`")
    g.add_argument("--split", choices=SPLITS, help="(default: test, where there is one)")
    g.add_argument("--limit", type=int, help="at most this many pictures a degradation")
    g.add_argument("--output", type=Path, help="folder (default: evaluation/DATASET-MODEL)")
    g.add_argument("--overwrite", action="store_true", help="restore again what is there")
    g.add_argument("--score-damaged", action="store_true", help="score the damaged pictures, too")
    g.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    g.add_argument("-t", "--tile", type=int, default=0, help="pixels; 0: the model's (default)")
    g.add_argument("--tile-overlap", type=int, default=64, help="pixels (default 64)")


def shifts_of(pipe: MiMDiTPipeline, steps: int) -> int:
    """Grids of patches to average: as recommended with the recommended steps, else one."""
    return pipe.config["default_shifts"] if steps == pipe.config["default_steps"] else 1


def run(args: argparse.Namespace, load: Callable[[], MiMDiTPipeline]) -> int:
    """Evaluate as parsed; 1 if some picture failed, else 0. load: called if something is to be
    restored.

    Raises ValueError for a folder of another layout or for other settings than those of what is
    in the output folder.
    """
    pairs = _pairs(args)
    out = args.output or Path("evaluation") / f"{args.dataset}-{Path(args.model).name}"
    out.mkdir(parents=True, exist_ok=True)
    settings, failures = restore(pairs, out, args, load)

    def where(pair: Pair) -> Path:
        return out / "restored" / f"{pair.name}.png"

    metrics, missing = load_metrics(STANDARD if args.metrics is None else args.metrics, args.device)
    done = [pair for pair in pairs if where(pair).is_file()]
    rows, more = score(done, where, metrics, args.device)
    before = None
    if args.score_damaged:
        before = (score(done, _damaged, metrics, args.device)[0], _damaged)
    found, absent = figures(args.dataset, done, rows, where, metrics, before)
    inter, table = _routing(done, out)
    failures += more
    results = Results(
        args.dataset, settings, versions(), found, missing | absent, failures, inter, table
    )
    for name, write in WRITERS.items():
        write_bytes(out / name, write(results).encode())
    write_bytes(out / "pictures.csv", _listed(rows, list(metrics)).encode())
    print(markdown(results))
    print(f"written to {out}", file=sys.stderr)
    return 1 if failures else 0


def restore(
    pairs: Sequence[Pair],
    out: Path,
    args: argparse.Namespace,
    load: Callable[[], MiMDiTPipeline],
) -> tuple[dict[str, Any], list[str]]:
    """Restore the pictures that are not there; their settings, and a sentence for each failure."""
    place = out / "settings.json"
    # Settings of which nothing has come, since all pictures failed, bind nobody.
    some = any((out / "restored").rglob("*.png"))
    known = json.loads(place.read_text()) if some and place.is_file() else None
    asked: dict[str, Any] = {
        "model": args.model,
        "seed": args.seed,
        "tile": args.tile,
        "tile_overlap": args.tile_overlap,
        "precision": args.precision or "fp32",
    }
    if not args.overwrite:
        _same(out, known, asked | ({"steps": args.steps[0]} if args.steps else {}))
    wanted = [
        p for p in pairs if args.overwrite or not (out / "restored" / f"{p.name}.png").exists()
    ]
    if not wanted:
        return known or {"pictures": "found, settings unknown"}, []
    if known is None and len(wanted) < len(pairs) and not args.overwrite:
        raise ValueError(
            f"{out} has {len(pairs) - len(wanted)} of {len(pairs)} pictures, restored elsewhere: "
            "expected all or none; use another --output, or --overwrite"
        )
    pipe = load()
    steps = args.steps[0] if args.steps else pipe.config["default_steps"]
    settings = asked | {
        "weights": fingerprint(pipe),
        "steps": steps,
        "shifts": shifts_of(pipe, steps),
    }
    if not args.overwrite:
        _same(out, known, settings)
    write_bytes(place, (json.dumps(settings, indent=1) + "\n").encode())
    failures = []
    for pair in tqdm(wanted, unit="picture", desc="restored", disable=None):
        # One broken picture must not end a long run, whatever breaks.
        try:
            _restore_one(pipe, pair, out, settings)
        except Exception as error:
            text = first_line(error)
            failures.append(f"{pair.name}: {text.removeprefix(f'{pair.damaged}: ')}")
    return settings, failures


def _same(out: Path, known: dict[str, Any] | None, asked: dict[str, Any]) -> None:
    """Raise ValueError where pictures were restored with other settings."""
    other = [name for name in asked if known is not None and known.get(name) != asked[name]]
    if known is not None and other:
        expected = ", ".join(f"{name} {known.get(name)}" for name in other)
        got = ", ".join(f"{name} {asked[name]}" for name in other)
        raise ValueError(
            f"{out} has pictures of other settings: expected {expected}, got {got}; "
            "use another --output, or --overwrite"
        )


def fingerprint(pipe: MiMDiTPipeline) -> str:
    """Tells weights of one model from those of another, by a few values of each tensor."""
    digest = hashlib.blake2b(digest_size=6)
    for name, tensor in pipe.transformer.state_dict().items():
        some = tensor.detach().flatten()[:16].float().cpu()
        digest.update(name.encode() + some.numpy().tobytes())
    return digest.hexdigest()


def _pairs(args: argparse.Namespace) -> list[Pair]:
    """What is to be evaluated; notes on standard error what is left out."""
    if args.originals is not None:
        listing = paired(args.data, args.originals)
        if not listing.pairs:
            got = f"got none in {args.data} and {args.originals}"
            raise ValueError(f"folder: expected pictures of the same names, {got}")
    else:
        listing = prefer(args.dataset, args.data, "test", args.split)
    _note(listing)
    groups: dict[str, list[Pair]] = {}
    for pair in listing.pairs:
        groups.setdefault(pair.group, []).append(pair)
    return [pair for group in groups.values() for pair in group[: args.limit]]


def _note(listing: Listing) -> None:
    wanted, found = sum(listing.published.values()), len(listing.pairs)
    if wanted and found != wanted:
        print(
            f"note: {found} of {wanted} published pairs are here; mimdit-data doctor lists which",
            file=sys.stderr,
        )
    if listing.faults:
        first = listing.faults[0]
        print(
            f"note: {len(listing.faults)} files are left out, the first {first.path}: "
            f"{first.message}; mimdit-data doctor lists all",
            file=sys.stderr,
        )


def _restore_one(pipe: MiMDiTPipeline, pair: Pair, out: Path, settings: dict[str, Any]) -> None:
    """Write the restored picture last: where it is, its routing is, too."""
    result = pipe(
        read_picture(pair.damaged).rgb,
        settings["steps"],
        settings["shifts"],
        generator=torch.Generator().manual_seed(settings["seed"]),
        tile=settings["tile"],
        tile_overlap=settings["tile_overlap"],
        output_type="np",
    )
    groups = list(pipe.transformer.config["groups"])
    chosen = routing.picks(result.routing, pipe.transformer.mim.experts)
    taken = {
        "groups": groups,
        "inter": result.routing.inter.mean((0, 1)).tolist(),
        "picks": chosen.tolist(),
    }
    for path in (out / "routing" / f"{pair.name}.json", out / "restored" / f"{pair.name}.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(out / "routing" / f"{pair.name}.json", json.dumps(taken).encode())
    write_picture(out / "restored" / f"{pair.name}.png", result.images[0])


def _routing(pairs: Sequence[Pair], out: Path) -> tuple[dict[str, list[float]], str]:
    """Mean inter weights by kind of damage and the report on them, of pictures whose routing is
    known.
    """
    labels, rows, groups = [], [], []
    for pair in pairs:
        path = out / "routing" / f"{pair.name}.json"
        if path.is_file():
            taken = json.loads(path.read_text())
            labels.append("+".join(pair.kinds) or pair.group)
            rows.append(taken)
            groups = taken["groups"]
    if not rows:
        return {}, ""
    weights = torch.tensor([row["inter"] for row in rows])
    inter = routing.by_label(labels, weights)
    picks = torch.tensor([row["picks"] for row in rows])
    return {k: v.tolist() for k, v in inter.items()}, routing.report(labels, weights, picks, groups)


def _damaged(pair: Pair) -> Path:
    return pair.damaged


def _listed(rows: Sequence[Row], names: Sequence[str]) -> str:
    """The scores of each picture, comma-separated."""
    out = io.StringIO()
    writer = csv.DictWriter(out, ["name", "group", *names], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()
