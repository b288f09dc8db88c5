"""Training data a second and core: `python -m bench.data`.

For every damage, how many finished pairs a core makes: a clean crop from a photograph in memory,
damaged, rounded to 8 bits, as tensors; and of the pairs that `mimdit-train` draws without data,
nearly half of which are drawn scenes. Then what a crop costs out of large files, beside decoding
them whole. CPU time of one thread is counted, so other work on the machine does not matter, and
as many loader workers as cores make that many times more. Exits with 1 where a damage is slower
than --least.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench.arguments import at_least
from training.batches import DrawnPairs
from training.data import clean_crop, photographs, stored, tensor
from training.datasets.reading import PictureFile
from training.degrade import FOUNDIR_TYPES, KINDS, degrade, kinds_of, sample_kinds
from training.scenes import procedural

# Height and width of the files that crops are read from.
_LARGE = (2160, 3840)
Row = dict[str, Any]


def rate(make: Callable[[np.random.Generator], object], seconds: float, least: int = 20) -> float:
    """Calls a second of CPU time, over at least `least` calls and `seconds`."""
    rng = np.random.default_rng(0)
    make(rng)
    count, began = 0, time.process_time()
    while (spent := time.process_time() - began) < seconds or count < least:
        make(rng)
        count += 1
    return count / spent


def damages(size: int, seconds: float, types: Sequence[str] | None = None) -> list[Row]:
    """Pairs a second by damage, and those of the training mixture and of drawn scenes."""
    pictures = [Image.fromarray(each) for each in photographs()]

    def crop(rng: np.random.Generator) -> np.ndarray:
        if not pictures:
            return procedural(size, rng)
        return clean_crop(pictures[int(rng.integers(len(pictures)))], size, rng)

    def pair(kinds: Sequence[str], rng: np.random.Generator) -> object:
        clean = crop(rng)
        return tensor(clean), tensor(stored(degrade(clean, kinds, rng)[0]))

    rows: list[Row] = []
    for name in types or (*KINDS, *FOUNDIR_TYPES):
        kinds = kinds_of(name)
        rows.append({"what": name, "rate": rate(lambda rng, k=kinds: pair(k, rng), seconds)})
    if types is None:
        mixture = rate(lambda rng: pair(sample_kinds(rng), rng), 4 * seconds, 100)
        rows.append({"what": "training mixture", "rate": mixture})
        drawn = DrawnPairs(size)
        mixture = rate(lambda rng: drawn[int(rng.integers(1 << 31))], 4 * seconds, 100)
        rows.append({"what": "training mixture with drawn scenes", "rate": mixture})
        rows.append({"what": "clean crops alone", "rate": rate(crop, seconds)})
        scenes = rate(lambda rng: procedural(size, rng), seconds)
        rows.append({"what": "drawn scenes alone", "rate": scenes})
    return rows


def reading(size: int, seconds: float) -> list[Row]:
    """Crops a second out of large files by format: at native scale, and as wide as the picture,
    beside decoding the whole file."""
    source = photographs() or [np.zeros((8, 8, 3), np.uint8)]
    height, width = _LARGE
    large = Image.fromarray(source[0]).resize((width, height), Image.Resampling.BICUBIC)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in ("large.png", "large.jpg"):
            path = Path(folder, name)
            # PNG has no quality.
            large.save(path, quality=92)

            def native(rng: np.random.Generator, path: Path = path) -> object:
                file = PictureFile(path)
                top, left = (int(rng.integers(n - size + 1)) for n in file.size)
                return file.crop(top, left, size, size)

            def wide(rng: np.random.Generator, path: Path = path) -> object:
                return PictureFile(path).resized((0, 0, height, height), size)

            def whole(rng: np.random.Generator, path: Path = path) -> object:
                with Image.open(path) as image:
                    return np.asarray(image.convert("RGB"))

            row: Row = {"what": f"{path.suffix[1:]} of {width}×{height}"}
            for key, run in (("native", native), ("wide", wide), ("whole", whole)):
                row[key] = rate(run, seconds, 5)
            rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.data", description=__doc__)
    p.add_argument("--size", type=int, default=128, help="pixels a side (default 128)")
    p.add_argument("--types", nargs="+", help="FoundIR's names or kinds joined by + (default: all)")
    p.add_argument("--seconds", type=float, default=0.5, help="CPU time of each (default 0.5)")
    p.add_argument("--least", type=float, default=0, help="pairs a second that each must reach")
    p.add_argument("--out", type=Path, help="JSON-lines file for all rows")
    args = p.parse_args(argv)
    at_least(p, args, size=1)
    try:
        for name in args.types or ():
            kinds_of(name)
    except ValueError as error:
        p.error(f"--types: {error}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    rows = damages(args.size, args.seconds, args.types)
    print(f"| pairs of {args.size}×{args.size} | a second and core |\n|---|---|")
    for row in rows:
        print(f"| {row['what']} | {row['rate']:.0f} |")
    slow = [row["what"] for row in rows if row["rate"] < args.least and "alone" not in row["what"]]
    if args.types is None:
        files = reading(args.size, args.seconds)
        print("\n| crops from | at native scale | as wide as it | files decoded whole |")
        print("|---|---|---|---|")
        for row in files:
            print(
                f"| {row['what']} | {row['native']:.1f} | {row['wide']:.1f} | {row['whole']:.1f} |"
            )
        rows += files
    if args.out:
        with args.out.open("a") as file:
            file.writelines(json.dumps({"size": args.size} | row) + "\n" for row in rows)
    if slow:
        print(f"slower than {args.least:g}: {', '.join(slow)}", file=sys.stderr)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
