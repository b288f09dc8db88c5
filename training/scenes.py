"""Drawn scenes: dead leaves, skies, textures, stripes and letters in natural-looking colours."""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

# Real scenes are mostly earth, foliage, sky, skin and gray; (hue, spread, top saturation).
HUES = ((0.08, 0.04, 0.6), (0.28, 0.06, 0.6), (0.58, 0.04, 0.6), (0.05, 0.02, 0.5), (0.5, 0.5, 0.9))
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789&?!%"


def _colour(rng: np.random.Generator) -> np.ndarray:
    """One colour [3] in [0, 1]: hue from HUES or gray, brightness from dark to light."""
    hue, spread, top = HUES[int(rng.integers(len(HUES)))]
    h = rng.normal(hue, spread)
    saturation = top * rng.random() * float(rng.random() > 0.2)
    value = rng.beta(1.6, 1.4)
    # HSV to RGB: each channel is value * (1 - saturation * k), k from its distance to the hue
    k = np.clip(2 - np.abs(np.mod(6 * h + np.array([5.0, 3.0, 1.0]), 6) - 2), 0, 1)
    rgb = value * (1 - saturation * k)
    return rgb.astype(np.float32)


def _pink(size: int, rng: np.random.Generator, slope: float) -> np.ndarray:
    """Noise [size, size] with amplitude spectrum 1 / f^slope, mean 0, standard deviation 1."""
    white = np.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32))
    fy, fx = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]
    f = np.hypot(fy, fx)
    f[0, 0] = np.inf
    noise = np.fft.irfft2(white / f**slope, s=(size, size)).astype(np.float32)
    return noise / max(float(noise.std()), 1e-6)


def _ramp(size: int, rng: np.random.Generator) -> np.ndarray:
    """A plane [size, size] from 0 to 1 in a random direction."""
    y, x = np.mgrid[0:size, 0:size].astype(np.float32) / max(size - 1, 1) - 0.5
    angle = rng.uniform(0, 2 * math.pi)
    return (math.cos(angle) * x + math.sin(angle) * y) / 1.4143 + 0.5


def _background(size: int, rng: np.random.Generator) -> np.ndarray:
    """A gradient between two colours, clouded by 1/f noise."""
    cloud = np.float32(rng.uniform(0, 0.25)) * _pink(size, rng, rng.uniform(1.0, 1.6))
    t = np.clip(_ramp(size, rng) + cloud, 0.0, 1.0)[..., None]
    return _colour(rng) * (1 - t) + _colour(rng) * t


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
    the size. Returns [size, size, 3].
    """
    canvas = 2 * size
    small, large = max(2.0, size / 50), size / rng.uniform(2.0, 5.0)
    number = int(rng.integers(40, 260))
    # Inverse of the cumulative distribution of r^-3 on [small, large].
    u = rng.random(number)
    radii = (large**-2 + u * (small**-2 - large**-2)) ** -0.5
    radii[: number // 6] = rng.uniform(large / 3, large, number // 6)
    palette = [_colour(rng) for _ in range(int(rng.integers(4, 20)))]
    picture = Image.fromarray((_background(size, rng) * 255).astype(np.uint8))
    picture = picture.resize((canvas, canvas))
    # The same leaves in a second picture carry how much texture and shading each one shows.
    detail = Image.new("RGB", (canvas, canvas), (60, 128, 128))
    pen, mark = ImageDraw.Draw(picture), ImageDraw.Draw(detail)
    for radius in radii:
        outline = _outline(radius * 2, rng) + rng.uniform(0, canvas, 2)
        # x, y, x, y, …
        points = outline.ravel().tolist()
        shade = palette[int(rng.integers(len(palette)))] + rng.normal(0, 0.04, 3)
        red, green, blue = (int(min(max(v, 0.0), 1.0) * 255) for v in shade.tolist())
        pen.polygon(points, fill=(red, green, blue))
        texture, tilt, other = (int(v) for v in rng.integers(0, 256, 3))
        mark.polygon(points, fill=(texture if texture > 80 else 0, tilt, other))
    box = (size, size)
    base = np.asarray(picture.resize(box, Image.Resampling.BOX), np.float32) / 255
    share = np.asarray(detail.resize(box, Image.Resampling.BOX), np.float32) / 255
    grain = _pink(size, rng, rng.uniform(0.4, 1.2))
    light = share[..., 1] * _ramp(size, rng) + share[..., 2] * _ramp(size, rng)
    factor = 0.75 + 0.35 * light + 0.22 * share[..., 0] ** 2 * grain
    return base * factor[..., None]


def _outline(radius: float, rng: np.random.Generator) -> np.ndarray:
    """Corner points [N, 2] around 0: a disc, an ellipse or a polygon of 3 to 7 corners."""
    corners = 32 if rng.random() < 0.5 else int(rng.integers(3, 8))
    turn = np.arange(corners) * (2 * math.pi / corners) + rng.uniform(0, 6.28)
    reach = radius if corners == 32 else radius * rng.uniform(0.6, 1.3, corners)
    x, y = reach * np.cos(turn), reach * np.sin(turn) * rng.uniform(0.4, 1.0)
    c, s = math.cos(angle := rng.uniform(0, math.pi)), math.sin(angle)
    points = np.empty((corners, 2))
    points[:, 0], points[:, 1] = c * x - s * y, s * x + c * y
    return points


@lru_cache(maxsize=32)
def _font(points: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(points)


def _letters(size: int, rng: np.random.Generator) -> np.ndarray:
    """A mask [size, size] in [0, 1] with a few turned lines of random letters."""
    mask = Image.new("L", (size, size), 0)
    pen = ImageDraw.Draw(mask)
    for _ in range(int(rng.integers(1, 5))):
        points = int(rng.integers(8, max(9, size // 5)))
        word = "".join(rng.choice(list(LETTERS + "    "), int(rng.integers(3, 18))))
        place = (float(rng.uniform(-0.2, 0.7) * size), float(rng.uniform(0, 0.9) * size))
        pen.text(place, word, fill=int(rng.integers(150, 256)), font=_font(points))
    turned = mask.rotate(rng.normal(0, 8), Image.Resampling.BICUBIC)
    return np.asarray(turned, np.float32) / 255


def procedural(size: int, rng: np.random.Generator) -> np.ndarray:
    """A drawn scene, float32 [size, size, 3] in [0, 1]; every draw comes from `rng`."""
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    scene = _leaves(size, rng) if rng.random() < 0.88 else _background(size, rng)
    if rng.random() < 0.25:
        patch = _stripes(size, rng) * (_ramp(size, rng) > rng.uniform(0.4, 0.8))
        scene = scene + (_colour(rng) - scene) * patch[..., None]
    if rng.random() < 0.3:
        cover = _letters(size, rng)[..., None]
        scene = scene + (_colour(rng) - scene) * cover
    if rng.random() < 0.3:
        tint = 1 + 0.5 * rng.normal(0, 0.15, 3).astype(np.float32)
        grain = _pink(size, rng, rng.uniform(0.6, 1.4))[..., None]
        scene = scene * (1 + np.float32(rng.uniform(0.02, 0.12)) * grain * tint)
    # A soft light across the whole scene, as one lamp or the sky gives.
    scene = scene * (0.85 + 0.3 * _ramp(size, rng)[..., None])
    return np.clip(scene, 0.0, 1.0).astype(np.float32)
