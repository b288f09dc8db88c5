"""Going on with less where memory runs out."""

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch

T = TypeVar("T")


def shrinking(
    run: Callable[[int, int], T], tile: int, batch: int, smallest: int, release: Callable[[], None]
) -> T:
    """`run(tile, batch)`, again with fewer tiles a pass, then smaller ones, while memory runs out.

    tile: pixels, as is `smallest`, the least that is tried. release: gives back what is kept for
    later. Each retry is announced by a warning. Raises the last `torch.OutOfMemoryError` where
    nothing is left to shrink.
    """
    while True:
        try:
            return run(tile, batch)
        except torch.OutOfMemoryError as error:
            if batch > 1:
                batch //= 2
            elif tile // 2 >= smallest:
                tile //= 2
            else:
                raise
            reason = str(error).splitlines()[0] if str(error) else "out of memory"
        # Outside the handler, which keeps the tensors of the failed call alive.
        release()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        warnings.warn(
            f"{reason}; trying again with {batch} tiles of {tile} pixels in a forward pass",
            stacklevel=2,
        )
