"""What the commands that measure a model have in common."""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import date
from pathlib import Path

from mimdit.errors import first_line


def at_least(p: argparse.ArgumentParser, args: argparse.Namespace, **least: int) -> None:
    """End the command where a flag's number, or one of its numbers, is below `least`; None is not
    given."""
    for name, low in least.items():
        given = getattr(args, name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and value < low:
                p.error(f"--{name}: expected at least {low}, got {value}")


def multiples(
    p: argparse.ArgumentParser, args: argparse.Namespace, name: str, unit: int, what: str = "pixels"
) -> None:
    """End the command where a flag's number, or one of its numbers, is no multiple of `unit`."""
    given = getattr(args, name)
    sizes = given if isinstance(given, list) else [given]
    if wrong := [size for size in sizes if size < 1 or size % unit]:
        p.error(f"--{name}: expected multiples of {unit} {what}, got {wrong}")


@contextmanager
def loading(p: argparse.ArgumentParser, args: argparse.Namespace) -> Iterator[None]:
    """End the command where there is no such model, folder or device."""
    try:
        yield
    except (ValueError, OSError, RuntimeError, AssertionError) as error:
        p.error(f"--model {args.model} --device {args.device}: {first_line(error)}")


def parser(
    name: str, description: str | None, presets: Sequence[str] | None = None
) -> argparse.ArgumentParser:
    """Of `python -m bench.NAME`: --model, --device, --precision and --out.

    Unasked it measures the paper's model on a GPU, and on a CPU the shipped one. presets: all that
    may be named; without them folders may, too.
    """
    # Not above: `bench.kernels --help` is quick.
    import torch

    from mimdit.loading import PRECISIONS

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
