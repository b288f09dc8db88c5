"""The loop over tiles, with arithmetic in place of a model."""

import gc
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mimdit.tile_loop import TileLoop, pool_tiles
from mimdit.tiling import plan_tiles

TILING = plan_tiles((20, 64), 16, 4, 2)
TILES = len(TILING.corners)
Z = torch.randn(2, 3, *TILING.plane, generator=torch.Generator().manual_seed(0))
X = torch.randn(2, 3, *TILING.plane, generator=torch.Generator().manual_seed(1))


@dataclass
class Known:
    """Damaged tiles and the rows of their experts."""

    tiles: Tensor
    rows: Tensor
    bytes: int = 10


def loop(batch: int, seen: list[Known], **options: object) -> TileLoop[Known]:
    """x + t·z, and for a second prompt three times that."""

    def encode(tiles: Tensor, rows: Tensor) -> Known:
        seen.append(Known(tiles, rows))
        return seen[-1]

    def velocities(x: Tensor, t: Tensor, known: Known) -> list[Tensor]:
        assert x.shape == known.tiles.shape and t.shape == (len(x),) and len(known.rows) == len(x)
        one = x + t.view(-1, 1, 1, 1) * known.tiles
        return [one, 3 * one] if options.get("guidance_scale") else [one]

    return TileLoop(Z, TILING, batch, encode, velocities, **options)  # pyright: ignore


@pytest.mark.parametrize("batch", [1, 4, 100])
@pytest.mark.parametrize("shared", [True, False])
def test_every_tile_gets_its_own(batch: int, shared: bool) -> None:
    seen: list[Known] = []
    passed: list[int] = []
    run = loop(batch, seen, shared=shared, passed=lambda: passed.append(1))
    torch.testing.assert_close(run(X, torch.tensor(0.5)), X + 0.5 * Z)
    passes = -(-TILES // batch)
    assert len(seen) == len(passed) == passes
    # One shape, the last pass filled up with its own first tile.
    assert {len(known.tiles) for known in seen} == {2 * min(batch, TILES)}
    rows = torch.cat([known.rows for known in seen])[: 2 * TILES].tolist()
    assert rows == (TILES * [0, 1] if shared else [*range(2 * TILES)])
    missing = passes * min(batch, TILES) - TILES
    last = seen[-1]
    if missing:
        assert torch.equal(last.tiles[-2 * missing :], last.tiles[:2].repeat(missing, 1, 1, 1))
        assert last.rows[-2 * missing :].tolist() == missing * last.rows[:2].tolist()


def test_guidance_moves_from_the_second_prompt() -> None:
    run = loop(3, [], guidance_scale=2.0)
    torch.testing.assert_close(run(X, torch.tensor(0.5)), -(X + 0.5 * Z))


@pytest.mark.parametrize(("keep", "kept"), [(0, 0), (9, 0), (25, 2), (10**6, 4)])
def test_as_many_conditions_are_kept_as_fit(keep: int, kept: int) -> None:
    seen: list[Known] = []
    run = loop(3, seen, keep=keep)
    first, again = (run(X, torch.tensor(0.5)) for _ in range(2))
    assert torch.equal(first, again)
    assert len(seen) == 2 * 4 - kept


def test_conditions_go_with_the_loop() -> None:
    """Where memory ran out, nothing of the failed attempt may wait for a garbage collection."""
    seen: list[Known] = []
    run = loop(3, seen, keep=10**6)
    run(X, torch.tensor(0.5))
    watched = weakref.ref(seen.pop())
    seen.clear()
    gc.disable()
    try:
        assert watched() is not None
        del run
        assert watched() is None
    finally:
        gc.enable()


def test_statistics_of_a_picture_are_those_of_its_tiles() -> None:
    def pool(tiles: Tensor) -> Tensor:
        return tiles.mean((2, 3))[None].repeat(4, 1, 1)

    every = torch.stack([Z[..., y : y + 16, x : x + 16].mean((2, 3)) for y, x in TILING.corners])
    for batch in (1, 3, 100):
        means = pool_tiles(pool, Z, TILING, batch)
        assert means.shape == (4, 2, 3)
        torch.testing.assert_close(means[1], every.mean(0))
        apart = pool_tiles(pool, Z, TILING, batch, shared=False)
        torch.testing.assert_close(apart[1], every.flatten(0, 1))
