"""How much a model improves pictures: `mimdit-eval` or `python -m bench.quality`.

Damages the four photographs that training never sees, restores them with several numbers of steps,
and compares with the best classical method for the damage. Prints Markdown tables of PSNR and SSIM,
and of the routing; rows with all figures go to a JSON-lines file, a before/after picture to a file.
With --dataset it restores and scores a data set instead (`bench.evaluate`).
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from bench import evaluate, routing
from bench.arguments import at_least
from bench.evaluate import shifts_of
from mimdit.engine import accelerate
from mimdit.errors import first_line
from mimdit.loading import load_pipeline
from mimdit.metrics import OFFLINE, SSIM_WINDOW, scorer
from mimdit.pipeline import MiMDiTPipeline
from training.data import held_out
from training.degrade import degrade

# Kinds and pinned parameters; what is not pinned is drawn anew for each picture and seed.
DAMAGES: dict[str, tuple[tuple[str, ...], dict[str, dict[str, Any]]]] = {
    "haze": (("haze",), {}),
    "low_light": (("low_light",), {}),
    "noise": (("noise",), {"noise": {"model": "gaussian", "sigma": 25 / 255, "gray": 0}}),
    "rain": (("rain",), {}),
    "blur": (("blur",), {}),
    "low_light+noise": (("low_light", "noise"), {}),
    "rain+haze": (("rain", "haze"), {}),
    "clean": ((), {}),
}
Row = dict[str, Any]


def pictures(size: int) -> dict[str, np.ndarray]:
    """Central squares of the held-out photographs, float32 [size,size,3] in [0,1]."""
    # Data sets need neither this, with the packages of training, nor the classical methods'.
    from training.validation import centre_square

    return {name: centre_square(array / 255, size) for name, array in held_out().items()}


def damaged(damage: str, clean: np.ndarray, seed: int) -> np.ndarray:
    """The picture as a damaged 8-bit file would hold it."""
    kinds, pinned = DAMAGES[damage]
    out, _ = degrade(clean, kinds, np.random.default_rng(seed), **pinned)
    return np.round(out * 255) / np.float32(255)


def restore(pipe: MiMDiTPipeline, image: np.ndarray, steps: int, seed: int) -> tuple[Any, Any]:
    """The restored picture [H,W,3], rounded to 8 bits, and the routing taken."""
    generator = torch.Generator().manual_seed(seed)
    out = pipe(image, steps, shifts_of(pipe, steps), generator=generator, output_type="np")
    return np.round(out.images[0] * 255) / np.float32(255), out.routing


def measure(
    pipe: MiMDiTPipeline,
    size: int,
    steps: Sequence[int],
    seeds: int,
    damages: Sequence[str],
    score: Callable[..., dict[str, float]],
) -> Iterator[Row]:
    """One row for each damage, picture, seed and variant: damaged, classical methods, ours."""
    from bench import classical

    def figures(image: np.ndarray, clean: np.ndarray) -> dict[str, float]:
        return score(*(torch.from_numpy(x).movedim(-1, 0) for x in (image, clean)))

    for damage in damages:
        for name, clean in pictures(size).items():
            for seed in range(seeds):
                row = {"damage": damage, "picture": name, "seed": seed}
                image = damaged(damage, clean, seed)
                yield row | {"variant": "damaged"} | figures(image, clean)
                for method, run in classical.METHODS[damage].items():
                    variant = {"variant": "classical", "method": method}
                    yield row | variant | figures(classical.restore(run, image), clean)
                for count in steps:
                    shifts = shifts_of(pipe, count)
                    out, taken = restore(pipe, image, count, seed)
                    chosen = routing.picks(taken, pipe.transformer.mim.experts)
                    yield (
                        row
                        | {"variant": "restored", "steps": count, "shifts": shifts}
                        | figures(out, clean)
                        | {"inter": taken.inter.mean((0, 1)).tolist(), "picks": chosen.tolist()}
                    )


def summary(rows: Sequence[Row], damage: str, figure: str = "psnr") -> dict[str, float]:
    """Means of a figure by column; of the classical methods the one with the best PSNR."""
    some = [row for row in rows if row["damage"] == damage]

    def mean(key: str, **match: Any) -> float:
        return float(np.mean([r[key] for r in some if all(r.get(k) == match[k] for k in match)]))

    columns = {"damaged": mean(figure, variant="damaged")}
    methods = dict.fromkeys(row["method"] for row in some if row["variant"] == "classical")
    if methods:
        best = max(methods, key=lambda method: mean("psnr", method=method))
        columns[best] = mean(figure, method=best)
    ours = [(r["steps"], r["shifts"]) for r in some if r["variant"] == "restored"]
    for count, shifts in dict.fromkeys(ours):
        name = f"{count} step{'s' * (count > 1)}" + f", {shifts} grids" * (shifts > 1)
        columns[name] = mean(figure, steps=count)
    return columns


def table(rows: Sequence[Row]) -> str:
    """Markdown: mean PSNR / SSIM of the damaged pictures, the best classical method, and ours."""
    lines: list[str] = []
    for damage in dict.fromkeys(row["damage"] for row in rows):
        psnr, ssim = (summary(rows, damage, figure) for figure in ("psnr", "ssim"))
        if not lines:
            ours = list(psnr)[2:]
            lines = ["| damage | damaged | best classical | " + " | ".join(ours) + " |"]
            lines.append("|---" * (len(ours) + 3) + "|")
        cells = [f"{psnr[name]:.2f} / {ssim[name]:.3f}" for name in psnr]
        method = next(name for name in psnr if name != "damaged")
        cells[1] += f" ({method})"
        lines.append(f"| {damage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def routing_report(rows: Sequence[Row], groups: Sequence[str]) -> str:
    """`routing.report` of the restored pictures."""
    restored = [row for row in rows if row["variant"] == "restored"]
    inter, picks = (torch.tensor([row[key] for row in restored]) for key in ("inter", "picks"))
    return routing.report([row["damage"] for row in restored], inter, picks, groups)


def before_after(
    pipe: MiMDiTPipeline, damages: Sequence[str], size: int, steps: int
) -> Image.Image:
    """Columns: damages. Rows: damaged, restored, original."""
    originals = list(pictures(size).values())
    columns = []
    for i, damage in enumerate(damages):
        clean = originals[i % len(originals)]
        image = damaged(damage, clean, seed=0)
        columns.append(np.concatenate([image, restore(pipe, image, steps, seed=0)[0], clean]))
    sheet = np.concatenate(columns, axis=1)
    return Image.fromarray(np.round(sheet * 255).astype(np.uint8))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="mimdit-eval", description=__doc__)
    p.add_argument("--model", default="tiny", help="shipped model, folder or hub id")
    p.add_argument("--size", type=int, help="pixels a side (default 384)")
    p.add_argument(
        "--steps", type=int, nargs="+", help="(default 1 8 40; of data sets: the model's)"
    )
    p.add_argument("--seeds", type=int, help="draws of damage and noise (default 3)")
    p.add_argument("--damages", nargs="+", choices=list(DAMAGES), help="(default: all but clean)")
    p.add_argument("--metrics", nargs="*", help="of pyiqa, besides PSNR and SSIM")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=["bf16", "fp16", "fp32"])
    p.add_argument("--out", type=Path, help="JSON-lines file for all rows")
    p.add_argument("--picture", type=Path, help="file for a before/after picture")
    evaluate.add_arguments(p)
    return p


def main(argv: Sequence[str] | None = None) -> int:
    p = parser()
    args = p.parse_args(argv)

    def load() -> MiMDiTPipeline:
        try:
            pipe = load_pipeline(args.model, args.device, args.precision)
        except (ValueError, OSError) as error:
            raise ValueError(f"--model {args.model}: {first_line(error)}") from error
        pipe = accelerate(pipe)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    if args.dataset is None:
        _check_held_out(args, p)
    else:
        _check_dataset(args, p)
    try:
        return _held_out(args, load()) if args.dataset is None else evaluate.run(args, load)
    except (ValueError, OSError) as error:
        print(f"mimdit-eval: {first_line(error)}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(
            f"mimdit-eval: {first_line(error)}; it needs: pip install 'mimdit[eval,train]'",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        more = "; the same command goes on" if args.dataset else ""
        print(f"mimdit-eval: stopped{more}", file=sys.stderr)
        return 130


_OF_DATASETS = ("originals", "split", "limit", "output", "overwrite", "score_damaged", "seed")
_OF_DATASETS += ("tile", "tile_overlap")


def _check_held_out(args: argparse.Namespace, p: argparse.ArgumentParser) -> None:
    """End the command where flags of data sets are given without one, or do not fit."""
    at_least(p, args, size=SSIM_WINDOW, seeds=1, steps=1)
    kinds = {end for end, kind in Image.registered_extensions().items() if kind in Image.SAVE}
    if args.picture is not None and args.picture.suffix.lower() not in kinds:
        p.error(f"--picture: expected a kind of picture, such as .jpg, got {args.picture}")
    if args.data is not None:
        p.error("--data needs --dataset, such as --dataset folder")
    for name in _OF_DATASETS:
        if getattr(args, name) != p.get_default(name):
            p.error(f"--{name.replace('_', '-')} goes with --dataset only")


def _check_dataset(args: argparse.Namespace, p: argparse.ArgumentParser) -> None:
    """End the command where flags do not fit a data set."""
    if args.data is None:
        p.error(f"--dataset {args.dataset} needs --data, its folder")
    for name in ("size", "seeds", "damages", "out", "picture"):
        if getattr(args, name) is not None:
            p.error(f"--{name} is of the held-out photographs, it does not go with --dataset")
    if args.originals is not None and args.dataset != "folder":
        p.error("--originals goes with --dataset folder only")
    if args.steps is not None and len(args.steps) > 1:
        p.error(f"--steps: expected one number with --dataset, got {args.steps}")
    at_least(p, args, steps=1, limit=1)


def _held_out(args: argparse.Namespace, pipe: MiMDiTPipeline) -> int:
    """Measure and print as parsed."""
    for path in (args.out, args.picture):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    size, seeds = args.size or 384, args.seeds or 3
    steps, damages = (
        args.steps or [1, 8, 40],
        args.damages or [name for name in DAMAGES if name != "clean"],
    )
    score = scorer(OFFLINE if args.metrics is None else args.metrics, args.device)
    for name, reason in score.missing.items():  # pyright: ignore[reportFunctionMemberAccess]
        print(f"note: without {name}: {reason}", file=sys.stderr)
    rows = []
    for row in measure(pipe, size, steps, seeds, damages, score):
        rows.append(row)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table(rows) + "\n\n" + routing_report(rows, pipe.transformer.config["groups"]))
    if args.picture:
        single = [damage for damage in damages if "+" not in damage]
        sheet = before_after(pipe, single or damages, size, pipe.config["default_steps"])
        sheet.save(args.picture, quality=90)
    return 0


if __name__ == "__main__":
    sys.exit(main())
