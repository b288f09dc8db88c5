"""Modes of torch that must not leak into tensors and graphs that are kept."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def kept() -> Iterator[None]:
    """Tensors made inside may be written by later calls, in `torch.inference_mode` or not."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def without_cached_casts() -> Iterator[None]:
    """Autocast casts weights anew: those that it keeps go with it, and a graph would read them."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)
