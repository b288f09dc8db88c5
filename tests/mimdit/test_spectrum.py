"""Gains and thresholds of cosine coefficients, against scipy block by block."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.fft import dctn, idctn

from mimdit import flow
from mimdit.spectrum import mean_powers, reshape_spectrum

MIX = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]], dtype=torch.float64)
MIX = MIX / MIX.norm(dim=1, keepdim=True)


def expected(
    pixels: torch.Tensor, gain: torch.Tensor, threshold: torch.Tensor, strength: float, side: int
) -> torch.Tensor:
    """One picture [3,H,W]; gain and threshold [3,2·side,2·side,h/2,w/2] by block."""
    height, width = pixels.shape[1:]
    size = 2 * side
    planes = torch.einsum("oc,chw->ohw", MIX, pixels)
    planes = F.pad(planes[None], (side,) * 4, mode="reflect")[0].numpy()
    out, count = torch.zeros(3, *planes.shape[1:], dtype=torch.float64), 0 * planes[0]

    def among(values: torch.Tensor, i: int, j: int) -> torch.Tensor:
        # Cells of the block with corner (i − 1, j − 1) in cells, each of the nearest whole block.
        rows = [min(max(k, 0), height // side - 1) // 2 for k in (i - 1, i)]
        columns = [min(max(k, 0), width // side - 1) // 2 for k in (j - 1, j)]
        return sum(values[..., r, c] for r in rows for c in columns) / 4

    for i in range(height // side + 1):
        for j in range(width // side + 1):
            place = (slice(i * side, i * side + size), slice(j * side, j * side + size))
            count[place] += 1
            for colour in range(3):
                found = torch.from_numpy(dctn(planes[colour][place], norm="ortho"))
                g, h = (among(x[colour], i, j) for x in (gain, threshold))
                least = strength * 0.01 * h.exp()
                kept = found * (strength * g).exp() * found**4 / (found**4 + least**4)
                kept[0, 0] = found[0, 0]
                out[colour][place] += torch.from_numpy(idctn(kept.numpy(), norm="ortho"))
    inner = (slice(side, -side), slice(side, -side))
    assert (count[inner] == 4).all()
    return torch.einsum("oc,ohw->chw", MIX, out[:, *inner] / 4)


@pytest.mark.parametrize(("side", "cells"), [(4, (4, 6)), (2, (2, 4)), (4, (2, 2))])
def test_equals_scipys_transform_of_every_block(side: int, cells: tuple[int, int]) -> None:
    h, w = cells
    pixels = torch.rand(2, 3, h * side, w * side, dtype=torch.float64) * 2 - 1
    gain, threshold = torch.randn(
        2, 2, 3, 2 * side, 2 * side, h // 2, w // 2, dtype=torch.float64
    ) + torch.tensor([0.0, 3.0], dtype=torch.float64).reshape(2, 1, 1, 1, 1, 1, 1)
    # [B,3,a,b,h/2,w/2] → pixels of each block → cells
    parts = [
        F.pixel_unshuffle(F.pixel_shuffle(x.flatten(1, 3), 2 * side), side)
        for x in (gain, threshold)
    ]
    strength = torch.tensor([1.0, 0.3], dtype=torch.float64)
    found = reshape_spectrum(pixels, torch.cat(parts, 1), strength.reshape(2, 1, 1, 1))
    for b in range(2):
        wanted = expected(pixels[b], gain[b], threshold[b], float(strength[b]), side)
        torch.testing.assert_close(found[b], wanted, rtol=1e-10, atol=1e-10)


def test_strength_zero_is_the_identity_and_raw_zero_is_invisible() -> None:
    pixels = torch.rand(1, 3, 32, 48, dtype=torch.float64) * 2 - 1
    controls = torch.randn(1, 96, 8, 12, dtype=torch.float64)
    same = reshape_spectrum(pixels, controls, torch.zeros(1, 1, 1, 1, dtype=torch.float64))
    torch.testing.assert_close(same, pixels)
    nearly = reshape_spectrum(pixels, 0 * controls, torch.ones(1, 1, 1, 1, dtype=torch.float64))
    assert (nearly - pixels).abs().max() < 1 / 255


def test_one_threshold_removes_white_noise_and_keeps_edges() -> None:
    clean = torch.zeros(1, 3, 64, 64) - 0.5
    clean[..., 13:50, 21:44] = 0.5
    noisy = clean + 0.2 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    controls = torch.zeros(1, 96, 16, 16)
    controls[:, 48:] = math.log(0.5 / 0.01)
    found = reshape_spectrum(noisy, controls, torch.ones(1, 1, 1, 1))
    assert (found - clean).square().mean() < 0.25 * (noisy - clean).square().mean()


def test_powers_are_scipys_and_those_of_tiles_average_to_the_pictures() -> None:
    latents = torch.rand(2, 12, 6, 8, dtype=torch.float64) * 2 - 1
    found, pixels = mean_powers(latents), F.pixel_shuffle(latents, 2)
    assert found.shape == (2, 3 * 16)
    for b in range(2):
        planes = torch.einsum("oc,chw->ohw", MIX, pixels[b])
        blocks = [
            dctn(planes[:, y : y + 4, x : x + 4].numpy(), axes=(1, 2), norm="ortho")
            for y in range(0, 12 - 3, 2)
            for x in range(0, 16 - 3, 2)
        ]
        wanted = torch.from_numpy(np.mean(np.square(blocks), axis=0)).flatten()
        torch.testing.assert_close(found[b], wanted)
    # Tiles that share a column of cells have all blocks between them, each once.
    halves = [mean_powers(latents[..., columns]) for columns in (slice(0, 5), slice(4, 8))]
    torch.testing.assert_close((4 * halves[0] + 3 * halves[1]) / 7, found)


def test_powers_tell_noise_from_blur() -> None:
    noise = torch.randn(1, 12, 40, 40, generator=torch.Generator().manual_seed(0))
    smooth = F.avg_pool2d(F.pixel_shuffle(noise, 2), 5, 1, 2)
    white, blurred = (mean_powers(x)[0, :16] for x in (noise, F.pixel_unshuffle(smooth, 2)))
    torch.testing.assert_close(white, torch.ones(16), rtol=0.15, atol=0)
    assert blurred[0] > 20 * blurred[15]


@pytest.mark.parametrize("channels", [0, 16, 47])
def test_only_unshuffled_pixels_have_a_spectrum(channels: int) -> None:
    with pytest.raises(ValueError, match="in_channels: expected 3·f²"):
        mean_powers(torch.zeros(1, channels, 4, 4))


@pytest.mark.parametrize("t", [1e-3, 0.3, 1.0])
def test_as_part_of_the_prediction_it_fades_with_t(t: float) -> None:
    # Small enough to stay within the bounds of a prediction.
    x_t, z = torch.rand(2, 2, 48, 8, 8, dtype=torch.float64) * 0.8 - 0.4
    output = torch.zeros(2, 147, 8, 8, dtype=torch.float64)
    output[:, 51:] = torch.randn(2, 96, 8, 8, dtype=torch.float64) / 4
    output[:, 99:] += 3
    time = torch.full((2,), t, dtype=torch.float64)
    root = ((1 - t) ** 2 + (t / 0.4) ** 2) ** 0.5
    mean = ((1 - t) * x_t + (t / 0.4**2) * t * z) / root**2
    wanted = reshape_spectrum(
        F.pixel_shuffle(mean, 4),
        output[:, 51:],
        torch.full((2, 1, 1, 1), t / root / 0.4, dtype=torch.float64),
    )
    v = flow.to_velocity("log_affine", output, x_t, time, z, 0.4)
    torch.testing.assert_close(F.pixel_shuffle(x_t - t * v, 4), wanted, rtol=1e-9, atol=1e-9)
