"""Overlapping tiles of a latent, and how their results are put together."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Tiles of equal size (height, width) at (top, left) corners that cover a plane, in latents."""

    plane: tuple[int, int]
    size: tuple[int, int]
    corners: tuple[tuple[int, int], ...]

    def cut(self, plane: Tensor, tiles: slice) -> Tensor:
        """[B,c,H,W] → [n·B,c,h,w], tile by tile."""
        h, w = self.size
        parts = [plane[..., y : y + h, x : x + w] for y, x in self.corners[tiles]]
        return torch.cat(parts)

    def blend(self, run: Callable[[slice], Tensor], like: Tensor, batch: int) -> Tensor:
        """Gaussian-weighted mean over the plane of `run(tiles)` [n·B,c,h,w], `batch` at a time."""
        if len(self.corners) == 1:
            return run(slice(0, 1)).to(like.dtype)
        h, w = self.size
        weight = gaussian_window(self.size).to(like)
        total = torch.zeros_like(like)
        mass = torch.zeros_like(like[:1, :1])
        for tiles in self.chunks(batch):
            parts = run(tiles).to(like.dtype).split(like.shape[0])
            for (y, x), part in zip(self.corners[tiles], parts, strict=True):
                total[..., y : y + h, x : x + w] += weight * part
                mass[..., y : y + h, x : x + w] += weight
        return total / mass

    def chunks(self, batch: int) -> list[slice]:
        """All tiles, `batch` at a time."""
        count = len(self.corners)
        return [slice(i, min(i + batch, count)) for i in range(0, count, batch)]


def plan_tiles(plane: tuple[int, int], tile: int, overlap: int, multiple: int) -> Tiling:
    """Evenly spread tiles of at most `tile`, overlapping by at least `overlap`, on a grid.

    The grid has steps of `multiple`. Raises ValueError unless 0 ≤ overlap < tile and everything is
    a multiple of `multiple`.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tile_overlap: expected 0 to less than the tile ({tile}), got {overlap}")
    for name, value in (("tile", tile), ("height", plane[0]), ("width", plane[1])):
        if value % multiple or value <= 0:
            raise ValueError(f"{name}: expected a positive multiple of {multiple}, got {value}")
    axes = [_starts(n, min(tile, n), overlap, multiple) for n in plane]
    corners = tuple((y, x) for y in axes[0] for x in axes[1])
    return Tiling(plane, (min(tile, plane[0]), min(tile, plane[1])), corners)


def _starts(length: int, tile: int, overlap: int, multiple: int) -> list[int]:
    free = length - tile
    if free == 0:
        return [0]
    # Rounding to the grid may eat up to one multiple of the overlap.
    stride = max(tile - overlap, multiple)
    count = -(-free // stride) + 1
    return [round(i * free / (count - 1) / multiple) * multiple for i in range(count)]


def gaussian_window(size: tuple[int, int]) -> Tensor:
    """[h,w], one at the centre, three standard deviations to each edge."""
    axes = []
    for n in size:
        place = (torch.arange(n) + 0.5) / n * 2 - 1
        axes.append(torch.exp(-0.5 * (3 * place) ** 2))
    return axes[0][:, None] * axes[1][None, :]


def reflect_pad(x: Tensor, height: int, width: int) -> Tensor:
    """Extend [B,c,H,W] down and right by reflection; any amount, also of a single pixel."""
    rows = _reflected(x.shape[-2], height, x.device)
    columns = _reflected(x.shape[-1], width, x.device)
    return x[..., rows, :][..., columns]


def _reflected(length: int, total: int, device: torch.device) -> Tensor:
    # A triangular wave 0 … n−1 … 0; a single pixel repeats.
    period = max(2 * (length - 1), 1)
    place = torch.arange(total, device=device) % period
    return torch.minimum(place, period - place).clamp(max=length - 1)
