"""One step of a whole latent, tile by tile: the same loop for every way to compute a tile."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from mimdit.tiling import Tiling


class Held(Protocol):
    """What is known of the damaged tiles of a pass, and the bytes that keeping it takes."""

    @property
    def bytes(self) -> int: ...


C = TypeVar("C", bound=Held)


@dataclass
class TileLoop(Generic[C]):
    """Velocities of latents [B,c,H,W], `batch` tiles a pass; the last pass is filled up.

    z_lq: damaged latents [B,c,H,W]. encode(z, rows): the condition of tiles z [n·B,c,h,w], whose
    experts follow from `rows` [n·B] of `pool_tiles`. velocities(x, t, condition): of such tiles,
    one tensor for each prompt; of two, guidance moves from the second to the first.
    device: where tiles are computed, by default that of z_lq. shared: one routing for a whole
    picture, so that its tiles never disagree; else every tile has its own. keep: bytes of
    conditions that are kept for the next step; others are computed anew. passed: called after every
    pass.
    """

    z_lq: Tensor
    tiling: Tiling
    batch: int
    encode: Callable[[Tensor, Tensor], C]
    velocities: Callable[[Tensor, Tensor, C], list[Tensor]]
    guidance_scale: float = 1.0
    device: torch.device | None = None
    shared: bool = True
    keep: int = 0
    passed: Callable[[], object] = lambda: None
    _kept: dict[int, C] = field(init=False, default_factory=dict)

    def __call__(self, latents: Tensor, t: Tensor) -> Tensor:
        """The velocity at (latents [B,c,H,W], t [])."""
        return self.tiling.blend(lambda tiles: self._pass(tiles, latents, t), latents, self.batch)

    def _pass(self, tiles: slice, latents: Tensor, t: Tensor) -> Tensor:
        x = self._cut(latents, tiles)
        condition = self._condition(tiles)
        parts = self.velocities(x, t.expand(len(x)).to(x.device), condition)
        self.passed()
        if len(parts) == 2:
            parts = [parts[1] + self.guidance_scale * (parts[0] - parts[1])]
        return parts[0][: (tiles.stop - tiles.start) * len(latents)]

    def _cut(self, plane: Tensor, tiles: slice) -> Tensor:
        """Tiles [n·B,c,h,w] of one pass; the first is repeated where the last pass has too few."""
        x, pictures = self.tiling.cut(plane, tiles, self.device), len(plane)
        missing = self._missing(tiles)
        return torch.cat([x, x[:pictures].repeat(missing, 1, 1, 1)]) if missing else x

    def _missing(self, tiles: slice) -> int:
        whole = min(self.batch, len(self.tiling.corners))
        return whole - (tiles.stop - tiles.start)

    def _condition(self, tiles: slice) -> C:
        if tiles.start in self._kept:
            return self._kept[tiles.start]
        pictures = torch.arange(len(self.z_lq))
        numbers = [*range(tiles.start, tiles.stop), *[tiles.start] * self._missing(tiles)]
        if self.shared:
            rows = pictures.repeat(len(numbers))
        else:
            rows = (torch.tensor(numbers)[:, None] * len(pictures) + pictures).flatten()
        found = self.encode(self._cut(self.z_lq, tiles), rows)
        held = sum(condition.bytes for condition in self._kept.values())
        if held + found.bytes <= self.keep:
            self._kept[tiles.start] = found
        return found


def pool_tiles(
    pool: Callable[[Tensor], Tensor],
    z_lq: Tensor,
    tiling: Tiling,
    batch: int,
    device: torch.device | None = None,
    shared: bool = True,
) -> Tensor:
    """What the routers read, [L,B,P], or [L,n·B,P] tile by tile where routings are not shared.

    pool: tiles [n·B,c,h,w] → [L,n·B,P], whose means over equal tiles are the picture's; the other
    arguments are those of `TileLoop`.
    """
    found, total = [], torch.zeros((), device=device or z_lq.device)
    for tiles in tiling.chunks(batch):
        pooled = pool(tiling.cut(z_lq, tiles, device))
        if shared:
            total = total + pooled.unflatten(1, (-1, len(z_lq))).sum(1)
        else:
            found.append(pooled)
    return total / len(tiling.corners) if shared else torch.cat(found, dim=1)
