"""First-block cache: what all blocks but the first add is taken from an earlier step.

Approximate. Where the first block changes the tokens nearly as it did when the others last ran,
these are left out (the rule of diffusers' `FirstBlockCacheConfig`, from ParaAttention).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Kept:
    """Of one picture and one branch of guidance: what the first block and the others added.

    first, rest: [B,N,D], of the step in which all blocks ran last. skipped: steps since the start
    that took `rest` from here.
    """

    first: Tensor | None = None
    rest: Tensor | None = None
    skipped: int = 0


@dataclass
class Parts:
    """A step in three: head(x, flat, text) → (x, text) behind the first block, tail(x, flat, text)
    → x behind the last, out(x, flat) → output tokens.
    """

    head: Callable[..., Any]
    tail: Callable[..., Any]
    out: Callable[..., Any]
    threshold: float

    def __call__(self, x: Tensor, flat: Tensor, text: Tensor, kept: Kept) -> Tensor:
        """Output tokens of image tokens x [B,N,D], modulation [B,total] and text [B,T,D]."""
        opened, words = self.head(x, flat, text)
        first = opened - x
        # The decorator hides the signature.
        if (
            kept.first is None or kept.rest is None or _changed(first, kept.first, self.threshold)  # pyright: ignore[reportCallIssue]
        ):
            kept.first, kept.rest = first, self.tail(opened, flat, words) - opened
        else:
            kept.skipped += 1
        return self.out(opened + kept.rest, flat)


@torch.compiler.disable
def _changed(now: Tensor, then: Tensor, threshold: float) -> bool:
    """Mean |now − then| of more than `threshold` times mean |then|; waits for the device."""
    return bool((now - then).abs().mean() > threshold * then.abs().mean())


def threshold_of(given: Any) -> float:
    """A number, or diffusers' `FirstBlockCacheConfig`, as the threshold; ValueError otherwise."""
    value = getattr(given, "threshold", given)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise ValueError(f"first_block_cache: expected a threshold of at least 0, got {given!r}")
    return float(value)
