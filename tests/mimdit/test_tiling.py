from itertools import pairwise

import pytest
import torch

from mimdit.tiling import gaussian_window, plan_tiles, reflect_pad


@pytest.mark.parametrize("plane", [(64, 64), (66, 200), (130, 34), (500, 64)])
def test_identity_survives_and_tiles_overlap(plane: tuple[int, int]) -> None:
    tiling = plan_tiles(plane, 64, 16, 2)
    x = torch.randn(2, 3, *plane)
    out = tiling.blend(lambda tiles: tiling.cut(x, tiles), x, batch=3)
    torch.testing.assert_close(out, x)
    for axis in (0, 1):
        starts = sorted({c[axis] for c in tiling.corners})
        assert starts[0] == 0
        assert starts[-1] + tiling.size[axis] == plane[axis]
        # Rounding to the grid may cost one multiple.
        assert all(b - a <= tiling.size[axis] - 14 for a, b in pairwise(starts))
        assert all(s % 2 == 0 for s in starts)


@pytest.mark.parametrize("length", [66, 70, 100, 112, 114, 128, 250, 500, 1000])
def test_tiles_are_as_small_as_their_number_lets_them_be(length: int) -> None:
    fixed, fitted = (plan_tiles((length, 64), 64, 16, 2, least) for least in (None, 32))
    assert fixed.size == (64, 64) and fitted.size[1] == 64
    assert len(fitted.corners) == len(fixed.corners)
    side, starts = fitted.size[0], sorted(y for y, _ in fitted.corners)
    assert 32 <= side <= 64 and starts[0] == 0 and starts[-1] + side == length
    assert all(a + side - b >= 16 - 2 for a, b in pairwise(starts))
    # One step of the grid less, and they would not reach the end.
    assert side == 32 or len(starts) * (side - 2) - (len(starts) - 1) * 16 < length


def test_fitted_tiles_keep_their_least_side() -> None:
    assert plan_tiles((66, 66), 64, 0, 2, 50).size == (50, 50)
    assert plan_tiles((66, 66), 64, 0, 2, 64).size == (64, 64)
    assert plan_tiles((20, 66), 64, 0, 2, 50).size == (20, 50)


def test_one_tile_is_passed_through() -> None:
    x = torch.randn(1, 3, 32, 32)
    tiling = plan_tiles((32, 32), 64, 16, 2)
    assert torch.equal(tiling.blend(lambda t: tiling.cut(x, t), x, 1), x)


@pytest.mark.parametrize(("tile", "overlap", "message"), [(64, 64, "overlap"), (63, 8, "tile:")])
def test_bad_plans(tile: int, overlap: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_tiles((128, 128), tile, overlap, 2)


def test_reflection_like_numpy_and_beyond() -> None:
    x = torch.arange(12.0).view(1, 1, 3, 4)
    expected = torch.nn.functional.pad(x, (0, 3, 0, 2), mode="reflect")
    assert torch.equal(reflect_pad(x, 5, 7), expected)
    assert reflect_pad(x, 3, 11)[0, 0, 0].tolist() == [0, 1, 2, 3, 2, 1, 0, 1, 2, 3, 2]
    assert torch.equal(reflect_pad(x[..., :1, :1], 4, 5), torch.zeros(1, 1, 4, 5))


def test_a_band_of_tiles_blends_like_the_whole_plane() -> None:
    tiling = plan_tiles((130, 90), 32, 12, 2)
    x = torch.randn(2, 3, 130, 90)
    runs = {i: torch.randn(2, 3, 32, 32) for i in range(len(tiling.corners))}
    out = tiling.blend(lambda t: torch.cat([runs[i] for i in range(t.start, t.stop)]), x, 4)
    total, mass = torch.zeros_like(x), torch.zeros_like(x[:1, :1])
    window = gaussian_window(tiling.size)
    for i, (y, left) in enumerate(tiling.corners):
        total[..., y : y + 32, left : left + 32] += window * runs[i]
        mass[..., y : y + 32, left : left + 32] += window
    assert torch.equal(out, total / mass)


def test_scaled_tiles_and_even_batches() -> None:
    tiling = plan_tiles((20, 64), 16, 4, 2)
    fine = tiling.scaled(8)
    assert fine.plane == (160, 512) and fine.size == (128, 128)
    assert fine.corners == tuple((8 * y, 8 * x) for y, x in tiling.corners)
    assert len(tiling.corners) == 10
    assert [tiling.even(n) for n in (1, 3, 4, 6, 9, 10, 50)] == [1, 3, 4, 5, 5, 10, 10]


def test_reflection_above_and_before() -> None:
    x = torch.arange(12.0).view(1, 1, 3, 4)
    expected = torch.nn.functional.pad(x, (2, 1, 1, 2), mode="reflect")
    assert torch.equal(reflect_pad(x, 6, 7, top=1, left=2), expected)
    assert reflect_pad(x, 3, 4) is x
