"""What people do without learning: the classical methods a restorer is compared with.

Each takes and returns a picture, float32 [H,W,3] in [0,1]. Where a method has a strength, several
are listed, and the comparison takes the one with the best mean: it knows more than a user would.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from scipy import ndimage
from skimage import exposure, restoration

Method = Callable[[np.ndarray], np.ndarray]


def non_local_means(image: np.ndarray, strength: float) -> np.ndarray:
    """Buades et al. (2005), with the noise level estimated from the picture."""
    sigma = float(np.mean(restoration.estimate_sigma(image, channel_axis=-1)))
    return restoration.denoise_nl_means(
        image,
        h=strength * sigma,
        sigma=sigma,
        patch_size=5,
        patch_distance=6,
        fast_mode=True,
        channel_axis=-1,
    )


def median(image: np.ndarray, size: int) -> np.ndarray:
    """Median filter of every channel."""
    return ndimage.median_filter(image, size=(size, size, 1))


def clahe(image: np.ndarray, clip: float) -> np.ndarray:
    """Contrast-limited adaptive histogram equalisation of the value channel."""
    return exposure.equalize_adapthist(image, clip_limit=clip)


def gamma_clahe(image: np.ndarray, gamma: float, clip: float) -> np.ndarray:
    """A brightening power law, then CLAHE."""
    return clahe(image**gamma, clip)


def dark_channel_prior(image: np.ndarray, omega: float = 0.95, size: int = 15) -> np.ndarray:
    """Dehazing by He, Sun and Tang (2009), with the transmission smoothed instead of matted."""
    dark = ndimage.minimum_filter(image.min(-1), size)
    brightest = dark >= np.quantile(dark, 0.999)
    air = image[brightest].mean(0)
    shade = ndimage.minimum_filter((image / np.maximum(air, 1e-3)).min(-1), size)
    transmission = ndimage.gaussian_filter(1 - omega * shade, size)
    return (image - air) / np.maximum(transmission, 0.1)[..., None] + air


def richardson_lucy(image: np.ndarray, sigma: float, rounds: int = 10) -> np.ndarray:
    """Richardson (1972) and Lucy (1974) for a Gaussian kernel, as the true one is unknown."""
    return _deconvolve(
        lambda x, k: restoration.richardson_lucy(x, k, num_iter=rounds), image, sigma
    )


def wiener(image: np.ndarray, sigma: float, balance: float = 0.05) -> np.ndarray:
    """Wiener deconvolution for a Gaussian kernel."""
    return _deconvolve(lambda x, k: restoration.wiener(x, k, balance), image, sigma)


def _deconvolve(run: Callable[..., Any], image: np.ndarray, sigma: float) -> np.ndarray:
    """Channel by channel, with reflected margins: both methods take what lies outside as black."""
    kernel = _gaussian(sigma)
    margin = 2 * len(kernel)
    wide = np.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="symmetric")
    out = np.stack([run(wide[..., c], kernel) for c in range(3)], axis=-1)
    return out[margin:-margin, margin:-margin]


def _gaussian(sigma: float) -> np.ndarray:
    reach = int(3 * sigma) + 1
    line = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    kernel = np.outer(line, line)
    return kernel / kernel.sum()


_DENOISE = {f"non-local means, h={h}σ": partial(non_local_means, strength=h) for h in (0.6, 0.8, 1)}
_BRIGHTEN = {
    f"gamma {g} + CLAHE {c}": partial(gamma_clahe, gamma=g, clip=c)
    for g in (0.3, 0.45, 0.6)
    for c in (0.002, 0.01)
}
_DEHAZE = {
    "dark-channel prior": dark_channel_prior,
    **{f"CLAHE {c}": partial(clahe, clip=c) for c in (0.005, 0.02)},
}
_DERAIN = {f"median {n}×{n}": partial(median, size=n) for n in (3, 5, 7)}
_DEBLUR = {
    **{f"Richardson–Lucy, σ={s}": partial(richardson_lucy, sigma=s) for s in (1.0, 2.0)},
    **{f"Wiener, σ={s}": partial(wiener, sigma=s) for s in (1.0, 2.0)},
}
METHODS: dict[str, dict[str, Method]] = {
    "noise": _DENOISE,
    "low_light": _BRIGHTEN,
    "haze": _DEHAZE,
    "rain": _DERAIN,
    "blur": _DEBLUR,
    "low_light+noise": _BRIGHTEN,
    "rain+haze": _DEHAZE | _DERAIN,
    "clean": {"nothing": lambda image: image},
}


def restore(method: Method, image: np.ndarray) -> np.ndarray:
    """The method's result as a stored picture would hold it: clipped, rounded to 8 bits."""
    out = np.nan_to_num(method(image.astype(np.float64)))
    return np.round(np.clip(out, 0, 1) * 255).astype(np.float32) / np.float32(255)
