"""What arguments may be: types for argparse, which say what was expected and what was got."""

import argparse
import math
import os
import re
from collections.abc import Callable

from mimdit.cli.places import is_url


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """An argparse type: an int or a float from `low` to `high`."""
    limits = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
    wanted = f"{'a whole number' if kind is int else 'a number'} {limits}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        # Written so that NaN fails.
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
        return value

    return parse


def device(text: str) -> str:
    """An argparse type: auto, cpu, mps, cuda or cuda:N."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected auto, cuda, cuda:N, cpu or mps, got {text!r}")
    return text


def experts(text: str) -> dict[str, float]:
    """An argparse type: GROUP=WEIGHT pairs with commas between; weights from 0 to 1."""
    wanted = "GROUP=WEIGHT with weights from 0 to 1, such as spatial=0.5,channel=0.2"
    weights: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = (piece.strip() for piece in part.partition("="))
        try:
            weights[name] = number(float, 0, 1)(value)
        except argparse.ArgumentTypeError:
            name = ""
        if not name:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")
    if len(weights) < text.count(",") + 1:
        raise argparse.ArgumentTypeError(f"expected each group once, got {text!r}")
    return weights


def place(text: str) -> str:
    """An argparse type: a path or URL; none at all would be the folder that one is in."""
    if not text:
        raise argparse.ArgumentTypeError(f"expected a path, got {text!r}")
    return text


def output(text: str) -> str:
    """An argparse type: a path or URL without what does not change it, such as a last slash."""
    text = place(text)
    return text.rstrip("/") if is_url(text) else os.path.normpath(text)


def suffix(text: str) -> str:
    """An argparse type: text that may stand in a file name."""
    if "/" in text or "\\" in text or "\0" in text:
        raise argparse.ArgumentTypeError(f"expected text without slashes, got {text!r}")
    return text
