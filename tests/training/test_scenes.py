"""Drawn scenes: seeded, of any size, and with the statistics that they are made for."""

import math

import numpy as np
import pytest

from training import scenes
from training.scenes import _pink, procedural, with_sky


@pytest.mark.parametrize("size", [1, 2, 3, 17, 64])
def test_scenes_follow_from_the_generator_alone(size: int) -> None:
    one, two = np.random.default_rng(3), np.random.default_rng(3)
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    for _ in range(12):
        scene = procedural(size, one)
        assert scene.shape == (size, size, 3) and scene.dtype == np.float32
        assert scene.min() >= 0 and scene.max() <= 1
        assert scene.flags.c_contiguous
        np.testing.assert_array_equal(scene, procedural(size, two))
    assert one.bit_generator.state == two.bit_generator.state
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    assert size < 17 or not np.array_equal(procedural(size, one), scene)
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        procedural(0, one)


@pytest.mark.parametrize("size", [16, 17])
def test_pink_noise_has_its_spectrum_in_every_direction(size: int) -> None:
    """Power times f^(2·slope) is flat; the columns that mirror themselves are no exception."""
    rng, draws = np.random.default_rng(0), 1500
    power = np.mean([np.abs(np.fft.rfft2(_pink(size, rng, 0.8))) ** 2 for _ in range(draws)], 0)
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None])
    flat = (power * f**1.6).ravel()[1:]
    # A bin's relative error is at most √(2 / draws), 0.037; the normalised variance adds to it.
    assert np.abs(flat / flat.mean() - 1).max() < 0.2
    column = (power * f**1.6)[:, 1:-1].mean()
    for edge in ((power * f**1.6)[1:, 0], (power * f**1.6)[:, -1]):
        assert edge.mean() / column == pytest.approx(1, abs=0.06)


def test_edges_of_leaves_are_antialiased(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves that lie on each other show the last one; its edge is mixed by quarters."""
    square = [11.0, 21.0, 42.0, 21.0, 42.0, 52.0, 11.0, 52.0]
    diamond = [40.0, 20.0, 60.0, 41.0, 40.0, 62.0, 20.0, 41.0]
    flat = np.zeros((48, 48), np.float32)
    monkeypatch.setattr(scenes, "_pink", lambda *_: flat)
    monkeypatch.setattr(scenes, "_ramp", lambda *_: flat)
    for corners, points in ((square, 32 * 32), (diamond, 20 * 42)):
        monkeypatch.setattr(scenes, "_outlines", lambda radii, *_, c=corners: [c] * len(radii))
        scene = scenes._leaves(48, np.random.default_rng(0))
        background, leaf = scene[:, :1, :1], scene[:, 20:21, 20:21]
        share = ((scene - background) / (leaf - background)).mean(0)
        assert np.abs(share * 4 - np.round(share * 4)).max() < 1e-3
        assert {0.25, 0.5} & set(np.round(share, 2).ravel().tolist())
        # Four points of the canvas are one of the picture; edges are drawn as well.
        assert share.sum() * 4 == pytest.approx(points, rel=0.06)


def test_scenes_have_the_spectrum_of_photographs() -> None:
    """Their power falls by f^-2.4 or so on average, as that of natural pictures does (Field 1987,
    "Relations between the statistics of natural images and the response properties of cortical
    cells", Fig. 7)."""
    rng, size = np.random.default_rng(0), 64
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size)[None])
    bands = [(f >= low) & (f < 1.5 * low) for low in (0.04, 0.06, 0.09, 0.135, 0.2, 0.3)]
    window = np.outer(np.hanning(size), np.hanning(size))
    power = []
    for _ in range(40):
        gray = procedural(size, rng).mean(2)
        spectrum = np.abs(np.fft.fft2((gray - gray.mean()) * window)) ** 2
        power.append([math.log(spectrum[band].mean() + 1e-9) for band in bands])
    middle = np.log([0.04 * 1.5**i for i in range(6)])
    slopes = [np.polyfit(middle, row, 1)[0] for row in power]
    assert -3 < np.median(slopes) < -1.8


@pytest.mark.parametrize("size", [1, 5, 64])
def test_skies_lie_above_and_leave_the_ground(size: int) -> None:
    rng, light = np.random.default_rng(0), []
    for _ in range(40):
        scene = procedural(size, rng)
        found = with_sky(scene, rng)
        assert found.shape == scene.shape and found.dtype == np.float32
        assert found.min() >= 0 and found.max() <= 1
        changed = (found != scene).any(-1)
        if size == 64:
            # Every column is sky down to its skyline, and ground below.
            assert (np.diff(changed[4:-1].astype(int), axis=0) <= 0).mean() > 0.95
            light.append(float(found[:3].mean()))
    assert size < 64 or np.median(light) > 0.65
