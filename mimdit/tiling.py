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

    def cut(self, plane: Tensor, tiles: slice, device: torch.device | None = None) -> Tensor:
        """[B,c,H,W] → [n·B,c,h,w], tile by tile; on `device`, by default the plane's."""
        h, w = self.size
        parts = [plane[..., y : y + h, x : x + w] for y, x in self.corners[tiles]]
        return torch.cat(parts).to(device or plane.device)

    def blend(self, run: Callable[[slice], Tensor], like: Tensor, batch: int) -> Tensor:
        """Gaussian-weighted mean over the plane of `run(tiles)` [n·B,c,h,w], `batch` at a time.

        like: [B,c,H,W], whose type and device the result has. Sums are held for one row of tiles,
        where the tiles are; finished rows move on, so a device never holds the whole plane for it.
        """
        if len(self.corners) == 1:
            return run(slice(0, 1)).to(like)
        h, pictures = self.size[0], like.shape[0]
        out = torch.empty(like.shape, dtype=like.dtype, device=like.device)
        band, top = _Band(self, like), 0
        for tiles in self.chunks(batch):
            parts = run(tiles).to(like.dtype).split(pictures)
            for (y, x), part in zip(self.corners[tiles], parts, strict=True):
                if y > top:
                    out[..., top:y, :] = band.take(y - top)
                    top = y
                band.add(part, x)
        out[..., top : top + h, :] = band.take(h)
        return out

    def scaled(self, factor: int) -> "Tiling":
        """The same tiles on a plane of `factor` times the resolution."""
        return Tiling(
            (self.plane[0] * factor, self.plane[1] * factor),
            (self.size[0] * factor, self.size[1] * factor),
            tuple((y * factor, x * factor) for y, x in self.corners),
        )

    def even(self, batch: int) -> int:
        """The least batch with which all tiles take no more passes than with `batch`."""
        count = len(self.corners)
        return -(-count // -(-count // batch))

    def chunks(self, batch: int) -> list[slice]:
        """All tiles, `batch` at a time."""
        count = len(self.corners)
        return [slice(i, min(i + batch, count)) for i in range(0, count, batch)]


class _Band:
    """Weighted sums of the tiles of one row, as high as a tile and as wide as the plane."""

    def __init__(self, tiling: Tiling, like: Tensor) -> None:
        self.width, self.shape = tiling.plane[1], (*like.shape[:2], tiling.size[0])
        self.window = gaussian_window(tiling.size).to(like.dtype)
        self.total = self.mass = torch.empty(0)

    def add(self, part: Tensor, left: int) -> None:
        """A tile [B,c,h,w] at the band's top."""
        if self.total.numel() == 0:
            self.window = self.window.to(part.device)
            self.total = part.new_zeros(*self.shape, self.width)
            self.mass = part.new_zeros(1, 1, self.shape[2], self.width)
        columns = slice(left, left + part.shape[-1])
        self.total[..., columns] += self.window * part
        self.mass[..., columns] += self.window

    def take(self, rows: int) -> Tensor:
        """Means of the first rows, which leave the band."""
        mean = self.total[..., :rows, :] / self.mass[..., :rows, :]
        self.total, self.mass = (
            torch.cat([x[..., rows:, :], torch.zeros_like(x[..., :rows, :])], dim=-2)
            for x in (self.total, self.mass)
        )
        return mean


def pixel_tiles(
    plane: tuple[int, int],
    tile: int,
    overlap: int,
    factor: int,
    patch: int,
    sides: tuple[int, int],
    least: int | None,
) -> Tiling:
    """`plan_tiles` for a tile and an overlap in pixels, `factor` to a latent, of whole patches.

    sides: the smallest and the largest tile, in latents. least: None for a tile that was asked for,
    with that overlap or a ValueError; for any other as in `plan_tiles`, and half a tile overlaps at
    most. Raises ValueError for sizes out of range.
    """
    size = tile // (factor * patch) * patch
    if not sides[0] <= size <= sides[1]:
        low, high = (side * factor for side in sides)
        raise ValueError(f"tile: expected 0 or {low} to {high} pixels, got {tile}")
    kept = overlap // factor
    if least is not None:
        return plan_tiles(plane, size, min(kept, size // 2), patch, min(least, size))
    if kept >= size:
        span = f"0 to less than the tile ({size * factor} pixels)"
        raise ValueError(f"tile_overlap: expected {span}, got {overlap}")
    return plan_tiles(plane, size, kept, patch)


def plan_tiles(
    plane: tuple[int, int], tile: int, overlap: int, multiple: int, least: int | None = None
) -> Tiling:
    """Evenly spread tiles of at most `tile`, overlapping by at least `overlap`, on a grid.

    The grid has steps of `multiple`. least: tiles are as small as their number and the overlap let
    them be, down to this side; by default `tile`, for tiles of one size whatever the plane's.
    Raises ValueError unless 0 ≤ overlap < tile and everything is a multiple of `multiple`.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tile_overlap: expected 0 to less than the tile ({tile}), got {overlap}")
    for name, value in (("tile", tile), ("height", plane[0]), ("width", plane[1])):
        if value % multiple or value <= 0:
            raise ValueError(f"{name}: expected a positive multiple of {multiple}, got {value}")
    sides, axes = [], []
    for length in plane:
        # Steps of at least one multiple, however large the overlap.
        count = -(-max(length - tile, 0) // max(tile - overlap, multiple)) + 1
        side = min(tile, length)
        if least is not None:
            # So many tiles cover the length where count·side − (count − 1)·overlap reaches it.
            cells = -(-(length + (count - 1) * overlap) // (count * multiple))
            side = min(side, max(cells * multiple, least))
        sides.append(side)
        axes.append(_starts(length, side, count, multiple))
    corners = tuple((y, x) for y in axes[0] for x in axes[1])
    return Tiling(plane, (sides[0], sides[1]), corners)


# Parts of a codec's tile that neighbours share. Its mid-block attention and group norms see that
# tile alone, so tiles differ a little in tone; a wide overlap makes the change smooth.
_SHARED = 4


def codec_tiles(plane: tuple[int, int], side: int, factor: int) -> tuple[Tiling, Tiling]:
    """Tiles of `side` latents that a codec takes one by one, and of the pixels they stand for."""
    latents = plan_tiles(plane, side, side // _SHARED, 1)
    return latents, latents.scaled(factor)


def _starts(length: int, tile: int, count: int, multiple: int) -> list[int]:
    if count == 1:
        return [0]
    # Rounding to the grid may eat up to one multiple of the overlap.
    return [round(i * (length - tile) / (count - 1) / multiple) * multiple for i in range(count)]


def gaussian_window(size: tuple[int, int]) -> Tensor:
    """[h,w], one at the centre, three standard deviations to each edge."""
    axes = []
    for n in size:
        place = (torch.arange(n) + 0.5) / n * 2 - 1
        axes.append(torch.exp(-0.5 * (3 * place) ** 2))
    return axes[0][:, None] * axes[1][None, :]


def reflect_pad(x: Tensor, height: int, width: int, top: int = 0, left: int = 0) -> Tensor:
    """Extend [B,c,H,W] to height × width by reflection: `top` rows above and `left` columns before.

    Any amount, also of a single pixel; the rest goes below and behind.
    """
    rows = _reflected(x.shape[-2], height, top, x.device)
    columns = _reflected(x.shape[-1], width, left, x.device)
    # One copy, or none where nothing is added.
    if height == x.shape[-2] and top == 0:
        return x if width == x.shape[-1] and left == 0 else x.index_select(-1, columns)
    if width == x.shape[-1] and left == 0:
        return x.index_select(-2, rows)
    return x[..., rows[:, None], columns]


def _reflected(length: int, total: int, before: int, device: torch.device) -> Tensor:
    # A triangular wave 0 … n−1 … 0; a single pixel repeats.
    period = max(2 * (length - 1), 1)
    place = (torch.arange(total, device=device) - before) % period
    return torch.minimum(place, period - place).clamp(max=length - 1)
