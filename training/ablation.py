"""Tables 3 to 5 of the paper at a small size: `python -m training.ablation --max-train-steps 300`.

Trains every variant of the tables for the same steps on the same pictures, restores the held-out
photographs with every kind of damage, and prints PSNR and SSIM beside the paper's figures, which
are of SD3.5-medium on FoundIR. Goes on where it was interrupted. A budget this small ranks how fast
variants learn, not how good they become.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mimdit.errors import first_line
from training import checkpoints
from training.config import ABLATIONS
from training.flags import resolve
from training.interrupt import Stopped
from training.train import start

# Rows: label, variant, and the paper's LPIPS and MUSIQ.
TABLES: dict[str, tuple[tuple[str, str, float, float], ...]] = {
    "Table 3: Intra-MoE": (
        ("w/o Intra-MoE", "no-intra", 0.1873, 50.5890),
        ("w/ Intra-MoE", "full", 0.1636, 53.4975),
    ),
    "Table 4: heterogeneous groups": (
        ("Spatial-only", "spatial-only", 0.1924, 52.4738),
        ("Channel-only", "channel-only", 0.1801, 53.4217),
        ("Swin-only", "swin-only", 0.2199, 51.6261),
        ("SE-only", "se-only", 0.2577, 49.1557),
        ("Heterogeneity", "full", 0.1636, 53.4975),
    ),
    "Table 5: routers": (
        ("Sparse Inter + Sparse Intra", "sparse-sparse", 0.2457, 48.8349),
        ("Sparse Inter + Dense Intra", "sparse-dense", 0.2348, 46.4920),
        ("Dense Inter + Sparse Intra", "full", 0.1636, 53.4975),
    ),
}
Result = dict[str, Any]


def run_variant(base: str, name: str, out: Path, given: dict[str, Any]) -> Result:
    """Train a variant, or read what it came to; figures by damage and the least share of a
    sub-expert in its last rows."""
    folder = out / name
    done = folder / "result.json"
    if done.is_file():
        return json.loads(done.read_text())
    from training.loop import train
    from training.validation import Validator

    values = {"preset": f"{base}-ablation-{name}", "output": str(folder), **given}
    settings, model = resolve(values)
    pipe = start(model, settings.seed)
    validator = Validator(pipe, settings)
    resume = "latest" if checkpoints.found(folder) else None
    # The averaged weights stay in the pipeline's transformer.
    train(pipe.transformer, pipe.vae, settings, resume)
    figures, _ = validator(settings.steps)
    rows = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    result = {
        "steps": settings.steps,
        "parameters": sum(p.numel() for p in pipe.transformer.parameters()),
        "figures": figures,
        "least_expert_share": rows[-1]["least_expert_share"],
    }
    checkpoints.replace_text(done, json.dumps(result, indent=1))
    return result


def _claim(out: Path, asked: dict[str, Any]) -> None:
    """Note what a folder's runs are; ValueError where it has those of other settings."""
    place = out / "asked.json"
    before = json.loads(place.read_text()) if place.is_file() else asked
    other = [name for name in asked if before.get(name) != asked[name]]
    if other:
        expected, got = (", ".join(f"{n} {x.get(n)}" for n in other) for x in (before, asked))
        raise ValueError(
            f"{out} has runs of other settings: expected {expected}, got {got}; "
            "use another --output"
        )
    out.mkdir(parents=True, exist_ok=True)
    checkpoints.replace_text(place, json.dumps(asked, indent=1))


def table(title: str, results: dict[str, Result]) -> str:
    """Markdown: mean PSNR and SSIM over damages, by damage PSNR, beside the paper's figures."""
    rows = [row for row in TABLES[title] if row[1] in results]
    damages = list(results[rows[0][1]]["figures"])
    head = ["variant", "M", "PSNR", "SSIM", *damages, "paper: LPIPS ↓", "MUSIQ ↑"]
    lines = [f"**{title}**", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for label, name, lpips, musiq in rows:
        figures = results[name]["figures"]
        psnr, ssim = (np.mean([figures[d][key] for d in damages]) for key in ("psnr", "ssim"))
        cells = [label, f"{results[name]['parameters'] / 1e6:.1f}", f"{psnr:.2f}", f"{ssim:.3f}"]
        cells += [f"{figures[damage]['psnr']:.2f}" for damage in damages]
        lines.append(f"| {' | '.join([*cells, f'{lpips:.4f}', f'{musiq:.2f}'])} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m training.ablation", description=__doc__)
    p.add_argument("--output", type=Path, default=Path("runs/ablation"))
    p.add_argument("--base", choices=["tiny", "debug"], default="tiny", help="size of the models")
    p.add_argument("--variants", nargs="+", choices=list(ABLATIONS), default=list(ABLATIONS))
    p.add_argument("--max-train-steps", type=int, default=300, help="of each variant")
    p.add_argument("--stages", help="crop:batch:share;… (default: one stage of 64:8)")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--validation-size", type=int, default=256, help="pixels a side")
    args = p.parse_args(argv)
    given = {
        "max_train_steps": args.max_train_steps,
        "stages": args.stages or "64:8:1",
        "seed": args.seed,
        "validation_size": args.validation_size,
        "checkpointing_steps": max(args.max_train_steps // 4, 1),
        "lr_warmup_steps": min(50, args.max_train_steps // 4),
    }
    results: dict[str, Result] = {}
    try:
        _claim(args.output, given | {"base": args.base})
        for name in args.variants:
            results[name] = run_variant(args.base, name, args.output, given)
    except Stopped as stopped:
        print(f"stopped after step {stopped.step} of {stopped.output}; the same command goes on")
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    text = "\n\n".join(
        table(title, results)
        for title, rows in TABLES.items()
        if {r[1] for r in rows} & set(results)
    )
    notes = (
        f"`{args.base}`, {args.max_train_steps} steps each, seed {args.seed}; PSNR (RGB, dB) and "
        f"SSIM (Y) of the held-out photographs, {args.validation_size} pixels a side, means over "
        "the kinds of damage that the columns name; M: million parameters. The paper's "
        "figures are of SD3.5-medium on FoundIR."
    )
    print(f"{text}\n\n{notes}")
    checkpoints.replace_text(args.output / "tables.md", f"{text}\n\n{notes}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
