"""Drawn scenes: dead leaves, skies, textures, stripes and letters in natural-looking colours."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Real scenes are mostly earth, foliage, sky, skin and gray; (hue, spread, top saturation).
HUES = np.array(
    [(0.08, 0.04, 0.6), (0.28, 0.06, 0.6), (0.58, 0.04, 0.6), (0.05, 0.02, 0.5), (0.5, 0.5, 0.9)]
)
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789&?!%    "


def _colours(number: int, rng: np.random.Generator) -> np.ndarray:
    """Colours [number, 3] in [0, 1]: hues from HUES or gray, brightness from dark to light."""
    hue, spread, top = HUES[rng.integers(len(HUES), size=number)].T
    h = rng.normal(hue, spread)[:, None]
    saturation = (top * rng.random(number) * (rng.random(number) > 0.2))[:, None]
    value = rng.beta(1.6, 1.4, (number, 1))
    # HSV to RGB: each channel is value * (1 - saturation * k), k from its distance to the hue
    k = np.clip(2 - np.abs(np.mod(6 * h + np.array([5.0, 3.0, 1.0]), 6) - 2), 0, 1)
    return (value * (1 - saturation * k)).astype(np.float32)


def _paint(rng: np.random.Generator) -> np.ndarray:
    """A colour [3, 1, 1]."""
    return _colours(1, rng).reshape(3, 1, 1)


def _pink(size: int, rng: np.random.Generator, slope: float) -> np.ndarray:
    """Noise [size, size] with amplitude spectrum 1 / f^slope, mean 0, standard deviation 1."""
    f = _frequency(size)
    # The spectrum of white noise is white. [size, size // 2 + 1]
    white = rng.standard_normal((*f.shape, 2), dtype=np.float32).view(np.complex64)[..., 0]
    pink = white * f ** np.float32(-slope)
    # Of columns that are their own mirror images the inverse keeps half the power.
    pink[:, [0, -1] if size % 2 == 0 else [0]] *= np.float32(math.sqrt(2))
    noise = np.fft.irfft2(pink, s=(size, size)).astype(np.float32)
    return noise / np.float32(max(float(noise.std()), 1e-6))


@lru_cache(maxsize=8)
def _frequency(size: int) -> np.ndarray:
    """Frequencies [size, size // 2 + 1] of a transformed picture; infinite in place of 0."""
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    f = np.hypot(fy, fx).astype(np.float32)
    f[0, 0] = np.inf
    return f


def _ramp(size: int, rng: np.random.Generator) -> np.ndarray:
    """A plane [size, size] from 0 to 1 in a random direction."""
    line = np.arange(size, dtype=np.float32) / max(size - 1, 1) - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    rows = math.sin(angle) / 1.4143 * line + 0.5
    return rows[:, None] + math.cos(angle) / 1.4143 * line


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """A gradient between two colours, clouded by 1/f noise. [3, size, size]"""
    cloud = np.float32(rng.uniform(0, 0.25)) * _pink(size, rng, rng.uniform(1.0, 1.6))
    t = np.clip(_ramp(size, rng) + cloud, 0.0, 1.0)
    one, other = _paint(rng), _paint(rng)
    return one + (other - one) * t


def _stripes(size: int, rng: np.random.Generator) -> np.ndarray:
    """A grating [size, size] in [0, 1], soft or hard, bent a little."""
    period = math.exp(rng.uniform(math.log(3), math.log(max(4, size / 4))))
    bend = np.float32(rng.uniform(0, 0.3)) * _pink(size, rng, 1.8)
    wave = np.sin(2 * math.pi * (_ramp(size, rng) * 1.4143 * size / period + bend))
    return np.clip(0.5 + wave * rng.uniform(0.5, 4.0), 0.0, 1.0).astype(np.float32)


def _leaves(size: int, rng: np.random.Generator) -> np.ndarray:
    """Dead leaves: occluding discs and polygons, radii by a power law of exponent -3.

    Lee, Mumford and Huang (2001), "Occlusion models for natural images". Each leaf has a
    shaded colour and a share of a common texture; edges are antialiased by drawing at twice
    the size. Returns [3, size, size].
    """
    canvas = 2 * size
    small, large = max(2.0, size / 50), size / rng.uniform(2.0, 5.0)
    number = int(rng.integers(40, 260))
    # Inverse of the cumulative distribution of r^-3 on [small, large].
    u = rng.random(number)
    radii = (large**-2 + u * (small**-2 - large**-2)) ** -0.5
    radii[: number // 6] = rng.uniform(large / 3, large, number // 6)
    outlines = _outlines(2 * radii, rng, canvas)
    palette = _colours(int(rng.integers(4, 20)), rng)
    background = _background(size, rng)
    # By leaf, 0 the background: colour, texture, two shadings, whether it is the background, and
    # nothing, as rows of 32 bytes are gathered faster. [1 + number, 8]
    looks = np.zeros((1 + number, 8), np.float32)
    shades = palette[rng.integers(len(palette), size=number)] + rng.normal(0, 0.04, (number, 3))
    looks[1:, :3] = np.clip(shades, 0.0, 1.0)
    looks[1:, 3:6] = rng.random((number, 3))
    looks[1:, 3] *= looks[1:, 3] > 0.32
    looks[0, 3:7] = 0.25, 0.5, 0.5, 1.0
    # Which leaf each point shows.
    picture = Image.new("I", (canvas, canvas))
    pen = ImageDraw.Draw(picture)
    for leaf, outline in enumerate(outlines, 1):
        pen.polygon(outline, fill=leaf)
    shown = np.asarray(picture)
    looks /= 4
    mean = np.take(looks, shown[::2, ::2], axis=0)
    for i, j in ((0, 1), (1, 0), (1, 1)):
        mean += np.take(looks, shown[i::2, j::2], axis=0)
    base = mean[..., :3].transpose(2, 0, 1) + mean[..., 6] * background
    texture, one, other = (mean[..., i] for i in (3, 4, 5))
    grain = _pink(size, rng, rng.uniform(0.4, 1.2))
    light = one * _ramp(size, rng) + other * _ramp(size, rng)
    return base * (0.75 + 0.35 * light + 0.22 * texture**2 * grain)


def _outlines(radii: np.ndarray, rng: np.random.Generator, canvas: int) -> list[list[float]]:
    """Corners x, y, x, y, … of a leaf of each radius, anywhere on the canvas: a disc, an ellipse
    or a polygon of 3 to 7 corners."""
    number = len(radii)
    discs = rng.random(number) < 0.5
    # Half as many corners are less than a sixth of a point off where a disc is small.
    corners = np.where(discs, np.where(radii < 8, 16, 32), rng.integers(3, 8, number))
    # Corners beyond a leaf's own are left out at the end. [number, 32]
    turn = np.arange(32) * (2 * math.pi / corners)[:, None] + rng.uniform(0, 6.28, (number, 1))
    turn = turn.astype(np.float32)
    reach = rng.uniform(0.6, 1.3, (number, 32))
    reach[discs] = 1.0
    reach *= radii[:, None]
    squash, angle = rng.uniform(0.4, 1.0, (number, 1)), rng.uniform(0, math.pi, (number, 1))
    x, y = reach * np.cos(turn), squash * reach * np.sin(turn)
    c, s = np.cos(angle), np.sin(angle)
    points = np.stack([c * x - s * y, s * x + c * y], axis=-1)
    points += rng.uniform(0, canvas, (number, 1, 2))
    flat = points.reshape(number, -1).tolist()
    return [leaf[: 2 * n] for leaf, n in zip(flat, corners.tolist(), strict=True)]


@lru_cache(maxsize=32)
def _font(points: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(points)


def _letters(size: int, rng: np.random.Generator) -> np.ndarray:
    """A mask [size, size] in [0, 1] with a few turned lines of random letters."""
    mask = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(mask)
    for _ in range(int(rng.integers(1, 5))):
        points = int(rng.integers(8, max(9, size // 5)))
        word = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=rng.integers(3, 18)))
        place = (float(rng.uniform(-0.2, 0.7) * size), float(rng.uniform(0, 0.9) * size))
        pen.text(place, word, fill=int(rng.integers(150, 256)), font=_font(points))
    turned = mask.rotate(rng.normal(0, 8), Image.Resampling.BICUBIC)
    return np.asarray(turned, np.float32) / 255


def procedural(size: int, rng: np.random.Generator) -> np.ndarray:
    """A drawn scene, float32 [size, size, 3] in [0, 1]; every draw comes from `rng`."""
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    # [3, size, size]
    scene = _leaves(size, rng) if rng.random() < 0.88 else _background(size, rng)
    if rng.random() < 0.25:
        patch = _stripes(size, rng) * (_ramp(size, rng) > rng.uniform(0.4, 0.8))
        scene = scene + (_paint(rng) - scene) * patch
    if rng.random() < 0.3:
        cover = _letters(size, rng)
        scene = scene + (_paint(rng) - scene) * cover
    if rng.random() < 0.3:
        tint = 1 + 0.5 * rng.normal(0, 0.15, (3, 1, 1)).astype(np.float32)
        grain = _pink(size, rng, rng.uniform(0.6, 1.4))
        scene = scene * (1 + np.float32(rng.uniform(0.02, 0.12)) * grain * tint)
    # A soft light across the whole scene, as one lamp or the sky gives.
    scene = scene * (0.85 + 0.3 * _ramp(size, rng))
    scene = np.clip(scene, 0.0, 1.0).astype(np.float32)
    return np.ascontiguousarray(scene.transpose(1, 2, 0))


def with_sky(scene: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A scene [size,size,3] under a sky, mostly light, from a random skyline upwards.

    Hazy ground and bright sky look alike; that what is far up is mostly light must be known.
    """
    size = len(scene)
    line = np.cumsum(rng.standard_normal(size, dtype=np.float32)) * np.float32(size**0.5 * 0.02)
    for _ in range(int(rng.integers(0, 5))):
        left, width = rng.integers(0, size), rng.integers(1, max(2, size // 4))
        line[left : left + width] -= np.float32(rng.uniform(0, 0.25) * size)
    line += np.float32(size * rng.uniform(0.15, 0.6)) - line.mean()
    value = rng.uniform(0.7, 1.0, 2) if rng.random() < 0.85 else rng.uniform(0.2, 0.8, 2)
    # Red, then green, of a sky whose blue is full; less colour at the horizon, below.
    tint = 1 - rng.uniform(0, 0.45) * np.array([[1.0, 0.5, 0.0], [0.3, 0.15, 0.0]])
    if rng.random() < 0.15:
        tint = tint[:, ::-1]
    y, _ = np.mgrid[0:size, 0:size].astype(np.float32)
    share = np.clip(y / np.maximum(line, 1), 0, 1)[..., None]
    ends = (value[:, None] * tint).astype(np.float32)
    sky = ends[0] * (1 - share) + ends[1] * share
    cloud = _pink(size, rng, rng.uniform(1.2, 1.8))[..., None] * np.float32(rng.uniform(0, 0.07))
    above = np.clip(line - y + 0.5, 0, 1)[..., None]
    return np.clip(scene + (sky + cloud - scene) * above, 0.0, 1.0).astype(np.float32)
