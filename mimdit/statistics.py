"""Statistics of a damaged picture that tell what kind of damage it has, and how much.

Its tokens do not show that well: each mixes all frequencies and tones, normalised. All are means
over the picture, so that those of equal tiles average to the picture's.
"""

import torch
from torch import Tensor

from mimdit import flow
from mimdit.spectrum import cell_side, mean_powers
from mimkernels.autocast import no_autocast

_BINS = 16
# Mean colours of a cell, and the darkest and the brightest value in it.
_PLANES = 5
# Of mean squares: below what eight bits of a channel can hold. Of shares: a pixel in ten thousand.
_LEAST_POWER, _LEAST_SHARE = 1e-6, 1e-4


def statistics_of(latents: Tensor) -> Tensor:
    """Powers of cosine coefficients, then histograms of tones, [B,S]; S is `statistics_size(3f²)`.

    latents: [B,3f²,h,w], pixels from −1 to 1 unshuffled in cells of f×f, h and w at least 2. Powers
    show noise and blur (`spectrum.mean_powers`); histograms show darkness, and haze, which leaves
    no cell without light (He, Sun and Tang, "Single image haze removal using dark channel prior",
    CVPR 2009).
    """
    # Autocast would round pixels to bfloat16: as much noise as blurred pictures have at the top.
    with no_autocast(latents.device.type):
        return torch.cat([mean_powers(latents), _histograms(latents)], dim=1)


def statistics_size(channels: int) -> int:
    """S for latents of 3f² channels; ValueError for any that are not unshuffled pixels."""
    return 12 * cell_side(channels) ** 2 + _PLANES * _BINS


def even(statistics: Tensor) -> Tensor:
    """`statistics_of`, averaged, as numbers around one: in decades, and as roots of shares."""
    count = statistics.shape[-1] - _PLANES * _BINS
    powers, shares = statistics.tensor_split((count,), dim=-1)
    # Decades about the middle of what occurs: levels tell noise, slopes blur.
    powers = (powers + _LEAST_POWER).log10() + 3
    return torch.cat([powers, (_BINS * (shares + _LEAST_SHARE)).sqrt()], dim=-1)


def _histograms(latents: Tensor) -> Tensor:
    """Shares of cells by tone, on a logarithmic scale, [B,5·16]; between two bins a cell counts in
    both."""
    wide = latents.to(torch.promote_types(latents.dtype, torch.float32))
    colours = wide.unflatten(1, (3, -1)).mean(2)
    planes = torch.cat([colours, wide.amin(1, keepdim=True), wide.amax(1, keepdim=True)], dim=1)
    tones = (flow.observed("log_affine", planes) + 1) / 2
    place = tones.clamp(0, 1).unsqueeze(2) * (_BINS - 1)
    bins = torch.arange(_BINS, device=place.device, dtype=place.dtype)[:, None, None]
    return (1 - (place - bins).abs()).clamp(min=0).mean((-2, -1)).flatten(1)
