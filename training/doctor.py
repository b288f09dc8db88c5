"""Check a data set before training or evaluating on it: `mimdit-data doctor PATH`.

Compares the number of pairs with what the authors published, and finds files without a partner,
pairs of different sizes, files that cannot be read, and copies. Exits with 0 where all is well, 1
where something is not, and 2 where the folder has none of the known layouts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mimdit.image_io import PictureError, read_picture
from training.datasets.layouts import LAYOUTS, SPLITS, detect, read
from training.datasets.pairs import Fault, Listing

# Faults of a kind that the table prints before it counts the rest; --json has all.
_SHOWN = 10


@dataclass(frozen=True)
class Facts:
    """What a file holds: (height, width) or None, a hash of its pixels, and what is wrong."""

    size: tuple[int, int] | None
    digest: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """The result of an examination.

    Attributes:
        groups: for each group of pairs, how many there are and how many there should be (None
            where nothing is published).
        files: pictures looked at.
    """

    dataset: str
    path: str
    groups: dict[str, tuple[int, int | None]]
    faults: tuple[Fault, ...]
    files: int

    @property
    def sound(self) -> bool:
        return not self.faults

    def as_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return {
            "dataset": self.dataset,
            "path": self.path,
            "sound": self.sound,
            "files": self.files,
            "groups": [
                {"name": name, "pairs": found, "published": published}
                for name, (found, published) in self.groups.items()
            ],
            "faults": [asdict(fault) for fault in self.faults],
        }


def facts(path: Path) -> Facts:
    """Decode a file whole."""
    try:
        rgb = read_picture(path).rgb
    except PictureError as error:
        return Facts(None, "", str(error).removeprefix(f"{path}: "))
    # 16 bits tell apart what 8 would not.
    digest = hashlib.blake2b(np.rint(rgb * 65535).astype(np.uint16).tobytes(), digest_size=16)
    return Facts((rgb.shape[0], rgb.shape[1]), digest.hexdigest())


def examine(
    name: str, path: str | Path, split: str | None = None, workers: int = 1, progress: bool = False
) -> Report:
    """Examine the data set at `path`; every picture is decoded, `workers` at a time.

    Raises ValueError where nothing fits the layout, as `training.datasets.layouts.read`.
    """
    listing = read(name, path, split)
    found = Counter(pair.group for pair in listing.pairs)
    groups: dict[str, tuple[int, int | None]] = {
        group: (found[group], listing.published.get(group))
        for group in dict.fromkeys([*listing.published, *found])
    }
    if listing.singles:
        groups["pictures"] = (len(listing.singles), None)
    faults = [
        Fault("count", group, f"expected {expected} pairs as published, got {count}")
        for group, (count, expected) in groups.items()
        if expected is not None and count != expected
    ]
    faults += listing.faults
    files = _files(listing)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        results = pool.map(facts, files)
        bar = tqdm(results, total=len(files), unit="picture", disable=not progress)
        seen = dict(zip(files, bar, strict=True))
    faults += [Fault("unreadable", str(p), each.reason) for p, each in seen.items() if each.reason]
    faults += _pair_faults(listing, seen)
    singles = [*(pair.damaged for pair in listing.pairs), *listing.singles]
    faults += _copies(singles, seen)
    return Report(name, str(path), groups, tuple(faults), len(files))


def _files(listing: Listing) -> list[Path]:
    """All pictures, each once, those without a partner too."""
    paired = [p for pair in listing.pairs for p in (pair.clean, pair.damaged) if p is not None]
    lonely = [Path(fault.path) for fault in listing.faults if fault.kind == "unmatched"]
    return list(dict.fromkeys([*paired, *listing.singles, *lonely]))


def _pair_faults(listing: Listing, seen: dict[Path, Facts]) -> Iterable[Fault]:
    for pair in listing.pairs:
        if pair.clean is None:
            continue
        clean, damaged = seen[pair.clean], seen[pair.damaged]
        if clean.size is None or damaged.size is None:
            continue
        if clean.size != damaged.size:
            a, b = (f"{size[1]}×{size[0]}" for size in (clean.size, damaged.size))
            yield Fault("size", str(pair.damaged), f"expected {a} as {pair.clean} has, got {b}")
        elif clean.digest == damaged.digest:
            yield Fault(
                "identical", str(pair.damaged), f"has the pixels of its original {pair.clean}"
            )


def _copies(paths: Iterable[Path], seen: dict[Path, Facts]) -> Iterable[Fault]:
    """Damaged or single pictures with the pixels of an earlier one; originals may well recur."""
    first: dict[tuple[object, str], Path] = {}
    for path in dict.fromkeys(paths):
        key = (seen[path].size, seen[path].digest)
        if seen[path].size is not None and first.setdefault(key, path) != path:
            yield Fault("duplicate", str(path), f"has the pixels of {first[key]}")


def table(report: Report) -> str:
    """The report for people: counts by group, then faults by kind."""
    width = max(len(name) for name in report.groups)
    lines = [f"{report.dataset} in {report.path}", f"{'group':{width}}   pairs  published"]
    for name, (found, published) in report.groups.items():
        note = "" if published in (None, found) else "  differs"
        lines.append(
            f"{name:{width}}  {found:6d}  {'–' if published is None else published:>9}{note}"
        )
    kinds = Counter(fault.kind for fault in report.faults)
    for kind, count in kinds.items():
        lines.append(f"\n{kind}: {count}")
        some = [fault for fault in report.faults if fault.kind == kind]
        lines += [f"  {fault.path}: {fault.message}" for fault in some[:_SHOWN]]
        if count > _SHOWN:
            lines.append(f"  … and {count - _SHOWN} more (--json lists all)")
    verdict = f"{len(report.faults)} faults" if report.faults else "no faults"
    lines.append(f"\n{report.files} pictures looked at, {verdict}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="mimdit-data", description="Look after data sets.")
    doctor = p.add_subparsers(dest="command", required=True).add_parser(
        "doctor", help="find what is wrong with a data set", description=__doc__
    )
    doctor.add_argument("path", type=Path, metavar="PATH", help="folder of the data set")
    doctor.add_argument("--dataset", choices=list(LAYOUTS), help="its layout (default: recognised)")
    doctor.add_argument("--split", choices=SPLITS, help="only this part (default: all)")
    doctor.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="threads")
    doctor.add_argument("--json", action="store_true", help="print the whole report as JSON")
    args = p.parse_args(argv)
    try:
        name = args.dataset or detect(args.path)
        progress = sys.stderr.isatty()
        report = examine(name, args.path, args.split, args.workers, progress)
    except (ValueError, OSError) as error:
        print(f"mimdit-data: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report.as_dict(), indent=2) if args.json else table(report))
    return 0 if report.sound else 1


if __name__ == "__main__":
    sys.exit(main())
