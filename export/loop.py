"""One restoration's velocities through the graphs of a folder, and the experts they choose."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.sessions import AnySession
from mimdit.tile_loop import TileLoop, pool_tiles
from mimdit.tiling import Tiling

# Conditioning tokens beyond this many bytes are computed anew in every step instead of kept.
_CONDITION_BYTES = 2**30


@dataclass(frozen=True)
class Routing:
    """What the routers chose: inter [L,B,G], intra and index [L,B,G,k]."""

    inter: np.ndarray
    intra: np.ndarray
    index: np.ndarray

    def as_dict(self) -> dict[str, Any]:
        """Nested lists, for JSON."""
        return {name: getattr(self, name).tolist() for name in ("inter", "intra", "index")}


@dataclass(frozen=True)
class _Inputs:
    """What the denoiser reads of the damaged tiles of a pass, where it runs."""

    named: dict[str, Any]
    bytes: int


def denoiser(
    graphs: Mapping[str, AnySession],
    z_lq: Tensor,
    tiling: Tiling,
    prompts: Sequence[tuple[Tensor, Tensor]],
    guidance_scale: float,
    tile_batch: int,
    shared: bool,
    passed: Callable[[], object] = lambda: None,
) -> tuple[TileLoop[_Inputs], dict[int, tuple[np.ndarray, ...]]]:
    """The graphs as a `TileLoop`; and inter [L,G], intra and index [L,G,k] that they will choose.

    The latter by picture, or where the routing is not shared by tile and picture. passed: called
    after every pass.
    """

    def pool(z_lq: Tensor) -> Tensor:
        return torch.from_numpy(graphs["pool"](z_lq=z_lq)["means"])

    def encode(z_lq: Tensor, rows: Tensor) -> _Inputs:
        out = graphs["conditioner"](z_lq=z_lq, means=means[:, rows].numpy())
        for place, row in enumerate(rows.tolist()):
            chosen[row] = tuple(out[name][:, place] for name in ("inter", "intra", "index"))
        resident = graphs["denoiser"].resident
        named = {name: resident(out[name]) for name in ("tokens", "pooled")}
        return _Inputs({"z_lq": z_lq, **named}, out["tokens"].nbytes)

    def velocities(x: Tensor, t: Tensor, condition: _Inputs) -> list[Tensor]:
        found = (
            graphs["denoiser"](
                x_t=x,
                timestep=t.contiguous(),
                **condition.named,
                text=text.expand(len(x), -1, -1),
                pooled_text=pooled.expand(len(x), -1),
            )
            for text, pooled in prompts
        )
        return [torch.from_numpy(out["velocity"]) for out in found]

    parts = (z_lq, tiling, tile_batch)
    means = pool_tiles(pool, *parts, shared=shared)
    chosen: dict[int, tuple[np.ndarray, ...]] = {}
    options: dict[str, Any] = {"shared": shared, "keep": _CONDITION_BYTES, "passed": passed}
    return TileLoop(*parts, encode, velocities, guidance_scale, **options), chosen


def routing_of(chosen: Mapping[int, tuple[np.ndarray, ...]]) -> Routing:
    """What `denoiser` noted, in the order of pictures, or of tiles and pictures."""
    columns = (chosen[row] for row in sorted(chosen))
    return Routing(*(np.stack(parts, axis=1) for parts in zip(*columns, strict=True)))
