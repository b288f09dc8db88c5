"""How much a model improves held-out photographs: `python -m bench.quality --model tiny`.

Damages the four photographs that training never sees, restores them with several numbers of steps,
and prints PSNR (RGB, data range 1, dB) before and after, averaged over pictures and seeds.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mimdit.loading import load_pipeline
from mimdit.metrics import psnr
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
}


def pictures(size: int) -> dict[str, np.ndarray]:
    """Central squares of the held-out photographs, float32 [size,size,3] in [0,1]."""
    found = {}
    for name, array in held_out().items():
        side = min(array.shape[:2])
        top, left = ((n - side) // 2 for n in array.shape[:2])
        square = Image.fromarray(array[top : top + side, left : left + side])
        small = square.resize((size, size), Image.Resampling.LANCZOS)
        found[name] = np.asarray(small, dtype=np.float32) / 255
    return found


def measure(
    pipe: MiMDiTPipeline, size: int, steps: Sequence[int], seeds: int, damages: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """One row for each damage, picture, seed and number of steps."""
    for damage in damages:
        kinds, pinned = DAMAGES[damage]
        for name, clean in pictures(size).items():
            for seed in range(seeds):
                damaged, _ = degrade(clean, kinds, np.random.default_rng(seed), **pinned)
                damaged = np.round(damaged * 255) / np.float32(255)
                before = psnr(torch.from_numpy(damaged), torch.from_numpy(clean))
                for count in steps:
                    out = pipe(
                        damaged,
                        num_inference_steps=count,
                        generator=torch.Generator().manual_seed(seed),
                        output_type="np",
                    )
                    saved = np.round(out.images[0] * 255) / np.float32(255)
                    yield {
                        "damage": damage,
                        "picture": name,
                        "seed": seed,
                        "steps": count,
                        "psnr_before": before,
                        "psnr_after": psnr(torch.from_numpy(saved), torch.from_numpy(clean)),
                        "inter": out.routing.inter.mean((0, 1)).tolist(),
                    }


def table(rows: Sequence[dict[str, Any]], steps: Sequence[int]) -> str:
    """Markdown: mean PSNR of the damaged pictures, and of the restored ones by number of steps."""
    head = " | ".join(f"{n} step{'s' * (n > 1)}" for n in steps)
    lines = [f"| damage | damaged | {head} |", "|---" * (len(steps) + 2) + "|"]
    for damage in dict.fromkeys(row["damage"] for row in rows):
        some = [row for row in rows if row["damage"] == damage]
        after = [np.mean([r["psnr_after"] for r in some if r["steps"] == n]) for n in steps]
        before = np.mean([r["psnr_before"] for r in some])
        lines.append(f"| {damage} | {before:.2f} | " + " | ".join(f"{x:.2f}" for x in after) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.quality", description=__doc__)
    p.add_argument("--model", default="tiny", help="shipped model, folder or hub id")
    p.add_argument("--size", type=int, default=384, help="pixels a side (default 384)")
    p.add_argument("--steps", type=int, nargs="+", default=[1, 8], help="(default 1 8)")
    p.add_argument("--seeds", type=int, default=1, help="draws of damage and noise (default 1)")
    p.add_argument("--damages", nargs="+", default=list(DAMAGES), choices=list(DAMAGES))
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--precision", choices=["bf16", "fp16", "fp32"])
    p.add_argument("--out", type=Path, help="JSON-lines file for all rows")
    args = p.parse_args(argv)
    pipe = load_pipeline(args.model, args.device, args.precision)
    pipe.set_progress_bar_config(disable=True)
    rows = []
    for row in measure(pipe, args.size, args.steps, args.seeds, args.damages):
        rows.append(row)
        if args.out:
            with args.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    print(table(rows, args.steps))
    return 0


if __name__ == "__main__":
    sys.exit(main())
