"""What statistics of a picture show, and that those of tiles average to its own."""

import pytest
import torch
import torch.nn.functional as F

from mimdit.statistics import even, statistics_of, statistics_size

SPECTRUM = 12 * 16


def picture(seed: int = 0) -> torch.Tensor:
    """Latents [2,48,16,24] of smooth pictures."""
    g = torch.Generator().manual_seed(seed)
    small = torch.rand(2, 3, 8, 12, generator=g, dtype=torch.float64) * 2 - 1
    return F.pixel_unshuffle(F.interpolate(small, (64, 96), mode="bilinear"), 4)


def histograms(latents: torch.Tensor) -> torch.Tensor:
    """[B,5,16]: three colours, the darkest and the brightest of a cell."""
    return statistics_of(latents)[:, SPECTRUM:].unflatten(1, (5, 16))


def test_histograms_are_shares_and_those_of_tiles_average_to_the_pictures() -> None:
    z = picture()
    whole = histograms(z)
    torch.testing.assert_close(whole.sum(-1), torch.ones(2, 5, dtype=torch.float64))
    tiles = [histograms(z[..., y : y + 8, x : x + 8]) for y in (0, 8) for x in (0, 8, 16)]
    torch.testing.assert_close(torch.stack(tiles).mean(0), whole)


@pytest.mark.parametrize(("value", "taken"), [(-1.0, 0), (1.0, 15), (-5.0, 0), (3.0, 15)])
def test_black_white_and_what_lies_beyond(value: float, taken: int) -> None:
    found = histograms(torch.full((1, 48, 2, 2), value))
    assert torch.equal(found[..., taken], torch.ones(1, 5))


def test_haze_leaves_no_dark_cell_and_noise_fills_all_frequencies() -> None:
    z = picture()
    hazy = 0.4 * z + 0.6 * 0.7
    assert histograms(z)[:, 3, :8].sum() > 0.2
    assert histograms(hazy)[:, 3, :8].sum() == 0
    noisy = z + 0.1 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
    finest = slice(63, SPECTRUM, 64)
    assert (statistics_of(noisy)[:, finest] > 5 * statistics_of(z)[:, finest]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    z = picture()
    found = statistics_of(z.to(dtype))
    assert found.dtype == torch.float32 and found.shape == (2, statistics_size(48))
    wide = statistics_of(z.to(dtype).double()).float()
    torch.testing.assert_close(even(found), even(wide), rtol=1e-4, atol=1e-4)


def test_autocast_rounds_nothing() -> None:
    z = picture().float()
    with torch.autocast("cpu", torch.bfloat16):
        found = statistics_of(z)
    assert torch.equal(found, statistics_of(z))


def test_every_picture_gives_moderate_numbers() -> None:
    g = torch.Generator().manual_seed(0)
    extremes = [torch.full((1, 48, 4, 4), -1.0), torch.randn(1, 48, 4, 4, generator=g).sign()]
    for z in (*extremes, picture()):
        assert even(statistics_of(z)).abs().max() < 6
