"""The damages themselves: pure functions `(image, rng, *, parameters) -> image`.

Pictures are float32 [H, W, 3] in [0, 1], display-referred (sRGB-like), H and W >= 1. Every random
draw comes from the `numpy.random.Generator` that the caller passes: same seed, same result.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image


def _clip(image: np.ndarray) -> np.ndarray:
    return np.clip(image, 0.0, 1.0).astype(np.float32, copy=False)


def _convolve(image: np.ndarray, kernel: np.ndarray) -> np.ndarray:
    """Same-size convolution with reflected borders; [H, W, C] with an odd [k, k] kernel."""
    planes = _convolve_sum(image.transpose(2, 0, 1)[None], [kernel])
    return planes.permute(1, 2, 0).contiguous().numpy()


def _convolve_sum(planes: np.ndarray, kernels: Sequence[np.ndarray]) -> torch.Tensor:
    """Sum over n of [N, C, H, W] convolved with N odd square kernels: float32 [C, H, W].

    Borders are reflected. Torch's FFT takes half the time of numpy's.
    """
    height, width = planes.shape[2:]
    r = max(kernel.shape[0] for kernel in kernels) // 2
    rows, columns = (_mirror(np.arange(-r, n + r), n) for n in (height, width))
    padded = torch.from_numpy(planes.take(rows, 2).take(columns, 3))
    # Multiples of 32 keep the FFT off large prime lengths; wrapped values fall in the cut border.
    shape = [-(-n // 32) * 32 for n in padded.shape[2:]]
    # [N, 1, k, k], the smaller ones with zeros around
    centred = [np.pad(k.astype(np.float32), r - k.shape[0] // 2) for k in kernels]
    spectra = torch.fft.rfft2(torch.from_numpy(np.stack(centred)[:, None]), s=shape)
    spectra = spectra * torch.fft.rfft2(padded, s=shape)
    total = torch.fft.irfft2(spectra.sum(0), s=shape)
    return total[:, 2 * r : 2 * r + height, 2 * r : 2 * r + width]


def _splat(points: np.ndarray, values: np.ndarray, size: int) -> np.ndarray:
    """Bilinear splat of (y, x) offsets from the centre, [N, 2], into a [size, size] kernel."""
    kernel = np.zeros((size + 1, size + 1), np.float32)
    position = np.clip(points + size // 2, 0, size - 1)
    base = np.floor(position).astype(int)
    part = position - base
    for dy in (0, 1):
        for dx in (0, 1):
            weight = np.abs(1 - dy - part[:, 0]) * np.abs(1 - dx - part[:, 1])
            np.add.at(kernel, (base[:, 0] + dy, base[:, 1] + dx), weight * values)
    return kernel[:size, :size]


def _smooth_field(rng: np.random.Generator, height: int, width: int, cells: int) -> np.ndarray:
    """Smooth noise [H, W] in [0, 1]: a random grid [cells, cells], bicubically enlarged."""
    grid = Image.fromarray(rng.random((cells, cells), dtype=np.float32))
    field = np.asarray(grid.resize((width, height), Image.Resampling.BICUBIC), np.float32)
    return np.clip(field, 0.0, 1.0)


def gaussian_blur(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    sigma: float,
    ratio: float = 1.0,
    angle: float = 0.0,
    size: int = 21,
) -> np.ndarray:
    """Gaussian blur: `sigma` along `angle`, `sigma * ratio` across; kernel side `size` made odd.

    Kernel family of BSRGAN and Real-ESRGAN (github.com/xinntao/Real-ESRGAN). `rng` is not used.
    """
    if sigma <= 0:
        return image.copy()
    r = int(size) // 2
    y, x = np.mgrid[-r : r + 1, -r : r + 1].astype(np.float32)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    along, across = (c * x + s * y) / sigma, (c * y - s * x) / (sigma * ratio)
    kernel = np.exp(-0.5 * (along**2 + across**2))
    return _clip(_convolve(image, kernel / kernel.sum()))


def motion_blur(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    length: float,
    angle: float = 0.0,
    wander: float = 0.0,
) -> np.ndarray:
    """Camera shake: a path of `length` pixels; `wander` 0 is a line, 1 a strongly bent path.

    Random-trajectory kernels in the manner of DeblurGAN (arXiv:1711.07064).
    """
    if length <= 1:
        return image.copy()
    steps = max(2, int(4 * length))
    # The heading does a random walk with a standard deviation of wander * 90 degrees at its end.
    turns = rng.standard_normal(steps).astype(np.float32) * (wander * math.pi / 2 / steps**0.5)
    heading = math.radians(angle) + np.cumsum(turns)
    path = np.cumsum(np.stack([np.sin(heading), np.cos(heading)], 1), 0) * (length / steps)
    path -= path.mean(0)
    size = 2 * math.ceil(np.abs(path).max() + 1) + 1
    kernel = _splat(path, np.ones(steps, np.float32), size)
    return _clip(_convolve(image, kernel / kernel.sum()))


def gaussian_noise(
    image: np.ndarray, rng: np.random.Generator, *, sigma: float, gray: int = 0
) -> np.ndarray:
    """White noise of standard deviation `sigma`, in [0, 1] units; `gray` 1: equal channels."""
    shape = (*image.shape[:2], 1 if gray else 3)
    return _clip(image + np.float32(sigma) * rng.standard_normal(shape, dtype=np.float32))


def poisson_noise(
    image: np.ndarray, rng: np.random.Generator, *, scale: float, gray: int = 0
) -> np.ndarray:
    """Shot noise of an 8-bit count times `scale`; `gray` 1: one draw for the three channels.

    Real-ESRGAN's `random_add_poisson_noise` with 255 levels (github.com/XPixelGroup/BasicSR).
    """
    source = image.mean(2, keepdims=True) if gray else image
    counts = rng.poisson(source * 255.0).astype(np.float32)
    return _clip(image + np.float32(scale) * (counts / 255.0 - source))


def read_variance(shot: float, rng: np.random.Generator) -> float:
    """Read noise that goes with a shot noise: log read = 2.18 log shot + 1.2 + N(0, 0.26).

    arXiv:1811.11127, section 3.1; 0 where `shot` is 0.
    """
    if shot <= 0:
        return 0.0
    return math.exp(2.18 * math.log(shot) + 1.2 + rng.normal(0.0, 0.26))


def raw_noise(
    image: np.ndarray, rng: np.random.Generator, *, shot: float, read: float
) -> np.ndarray:
    """Sensor noise in linear light: variance = shot * x + read (arXiv:1811.11127, section 3.1).

    Linear light is taken as x^2.2; the camera pipeline beyond that is left out.
    """
    if shot <= 0 and read <= 0:
        return image.copy()
    linear = np.power(image, np.float32(2.2))
    deviation = np.sqrt(np.float32(shot) * linear + np.float32(read))
    linear += deviation * rng.standard_normal(image.shape, dtype=np.float32)
    return _clip(np.power(_clip(linear), np.float32(1 / 2.2)))


def jpeg(image: np.ndarray, rng: np.random.Generator, *, quality: int) -> np.ndarray:
    """JPEG round trip by Pillow, 4:2:0, `quality` 1 to 100. `rng` is not used."""
    buffer = io.BytesIO()
    picture = Image.fromarray(np.round(_clip(image) * 255).astype(np.uint8))
    picture.save(buffer, "JPEG", quality=int(quality), subsampling="4:2:0")
    return np.asarray(Image.open(buffer), np.float32) / np.float32(255)


def haze(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    beta: float,
    airlight: float,
    depth: np.ndarray | None = None,
) -> np.ndarray:
    """Atmospheric scattering I = J t + A (1 - t), t = exp(-beta d) (Koschmieder; RESIDE).

    `depth` is [H, W] in [0, 1]; without it a ramp, far at the top, is mixed with smooth noise.
    """
    height, width = image.shape[:2]
    if depth is None:
        share = rng.uniform(0.4, 0.9)
        ramp = np.linspace(1.0, 0.15, height, dtype=np.float32)[:, None]
        depth = share * ramp + (1 - share) * _smooth_field(rng, height, width, 5)
    if depth.shape != (height, width):
        raise ValueError(f"depth: expected shape {(height, width)}, got {depth.shape}")
    t = np.exp(-np.float32(beta) * depth).astype(np.float32)[..., None]
    return _clip(image * t + np.float32(airlight) * (1 - t))


def rain(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    density: float,
    length: float,
    width: float,
    angle: float,
    strength: float,
    veil: float = 0.0,
) -> np.ndarray:
    """Rain streaks: thresholded noise spread along lines `angle` degrees off the vertical, added.

    `density` is seeds per pixel for one-pixel streaks; wider ones are nearer, so fewer and fainter.
    `strength` is the peak light added; `veil` the share of gray mist that heavy rain mixes in.
    """
    height, breadth = image.shape[:2]
    layers, kernels = [], []
    # Two layers, near and far, keep the streaks from being copies of one line.
    for stretch, thick, share in ((1.0, width, 0.4), (0.6, max(1.0, 0.6 * width), 0.6)):
        chance = share * density / thick**1.1
        draw = rng.random((height, breadth), dtype=np.float32)
        # Below the threshold the draw is itself uniform: it serves as the streak's brightness.
        seeds = np.where(draw < chance, 0.3 + 0.7 * draw / max(chance, 1e-12), 0.0)
        layers.append(seeds.astype(np.float32)[None])
        kernels.append(_streak(length * stretch, thick, angle + rng.normal(0.0, 2.0)) / thick**0.4)
    layer = _convolve_sum(np.stack(layers), kernels)[0, ..., None].numpy()
    light = np.float32(strength) * np.clip(layer, 0.0, 1.0)
    misty = image * np.float32(1 - veil) + np.float32(0.75 * veil)
    return _clip(misty + light)


def _streak(length: float, width: float, angle: float) -> np.ndarray:
    """A line with a peak of 1, Gaussian across and fading to its ends, odd square kernel."""
    r = math.ceil(length / 2 + width)
    y, x = np.mgrid[-r : r + 1, -r : r + 1].astype(np.float32)
    c, s = math.cos(math.radians(angle)), math.sin(math.radians(angle))
    along, across = c * y + s * x, c * x - s * y
    profile = np.exp(-0.5 * (across / (0.42 * width)) ** 2)
    return profile * np.clip(1.0 - np.abs(2 * along / length) ** 3, 0.0, 1.0)


def raindrops(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    density: float,
    radius: float,
    magnification: float,
) -> np.ndarray:
    """Drops on the lens: each shows a turned, shrunken and blurred view of what surrounds it.

    `density` is drops per 65,536 pixels (at least one drop), `radius` their median in pixels,
    `magnification` how much wider than the drop the refracted view is.
    """
    height, width = image.shape[:2]
    blurred = gaussian_blur(image, rng, sigma=2.5, size=13)
    result = image.copy()
    for _ in range(max(1, round(density * height * width / 65536))):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        a = radius * math.exp(rng.normal(0.0, 0.35))
        tall, dent, phase = rng.uniform(0.9, 1.4), rng.uniform(0.0, 0.15), rng.uniform(0, 6.28)
        reach = math.ceil(a * tall * 1.3) + 1
        top, left = max(0, int(cy) - reach), max(0, int(cx) - reach)
        bottom, right = min(height, int(cy) + reach + 1), min(width, int(cx) + reach + 1)
        y = np.arange(top - cy, bottom - cy, dtype=np.float32)[: bottom - top, None]
        x = np.arange(left - cx, right - cx, dtype=np.float32)[None, : right - left]
        dy, dx = y / np.float32(a * tall), x / np.float32(a)
        distance = np.sqrt(dy * dy + dx * dx)
        distance *= 1 + np.float32(dent) * np.sin(3 * np.arctan2(dy, dx) + np.float32(phase))
        stretch = np.float32(-magnification) * (1 + distance)
        view_y = _mirror(cy + stretch * y, height)
        view_x = _mirror(cx + stretch * x, width)
        # Light falls on a drop from its lower half, where the sky is refracted to.
        shade = 1.0 + 0.18 * np.clip(dy, -1, 1) - 0.35 * np.clip(distance, 0, 1) ** 6
        inside = blurred[view_y, view_x] * shade[..., None]
        alpha = np.clip((1.0 - distance) * a / 2 + 0.5, 0.0, 1.0)[..., None] * 0.92
        region = result[top:bottom, left:right]
        result[top:bottom, left:right] = region * (1 - alpha) + inside * alpha
    return _clip(result)


def _mirror(position: np.ndarray, size: int) -> np.ndarray:
    """Row or column numbers reflected into 0 .. size - 1."""
    period = max(1, 2 * (size - 1))
    folded = np.mod(np.round(position).astype(int), period)
    return np.minimum(folded, period - folded) if size > 1 else np.zeros_like(folded)


def low_light(
    image: np.ndarray,
    rng: np.random.Generator,
    *,
    alpha: float,
    beta: float,
    gamma: float,
    shot: float = 0.0,
    read: float = 0.0,
) -> np.ndarray:
    """Darkening beta (alpha I)^gamma (arXiv:1908.00682), then `raw_noise`."""
    dark = np.float32(beta) * np.power(np.float32(alpha) * image, np.float32(gamma))
    return raw_noise(_clip(dark), rng, shot=shot, read=read)
