"""What the commands that measure a model have in common."""

import argparse
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch

from mimdit.loading import PRECISIONS


def parser(
    name: str, description: str | None, presets: Sequence[str] | None = None
) -> argparse.ArgumentParser:
    """Of `python -m bench.NAME`: --model, --device, --precision and --out.

    Unasked it measures the paper's model on a GPU, and on a CPU the shipped one. presets: all that
    may be named; without them folders may, too.
    """
    gpu = torch.cuda.is_available()
    p = argparse.ArgumentParser(prog=f"python -m bench.{name}", description=description)
    named = "preset or folder" if presets is None else "preset"
    default = "sd35-medium" if gpu else "tiny"
    p.add_argument("--model", default=default, choices=presets, help=named)
    p.add_argument("--device", default="cuda" if gpu else "cpu")
    p.add_argument("--precision", default="bf16" if gpu else "fp32", choices=list(PRECISIONS))
    out = Path("bench/results") / f"{name}-{date.today().isoformat()}.jsonl"
    p.add_argument("--out", type=Path, default=out, help=f"JSON lines (default {out})")
    return p
