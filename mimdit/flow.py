"""Rectified flow (MiM-DiT, Eq. 1; arXiv 2209.03003) and what a network may predict in it.

x_t = (1−t)·x0 + t·ε with t from 0 (picture) to 1 (noise); velocity v = ε − x0 = dx_t/dt.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mimdit.spectrum import cell_side, reshape_spectrum

PREDICTION_TYPES = ("velocity", "sample", "residual", "log_affine")


def check_prediction(prediction_type: str, damage_std: float, latent: int, output: int) -> None:
    """ValueError for an unknown type, one that needs another number of output channels, or a
    deviation that none can have.
    """
    # Written so that NaN fails.
    if not 0 < damage_std < math.inf:
        raise ValueError(f"damage_std: expected a number above 0, got {damage_std}")
    if prediction_type not in PREDICTION_TYPES:
        expected = ", ".join(PREDICTION_TYPES)
        raise ValueError(f"prediction_type: expected {expected}, got {prediction_type!r}")
    if prediction_type != "log_affine" and output != latent:
        raise ValueError(f"out_channels: expected {latent}, got {output}")
    if prediction_type == "log_affine":
        cell_side(latent)
        plain = latent + _COLOURS
        if output not in (plain, plain + 2 * latent):
            raise ValueError(
                f"out_channels: expected {plain} or {plain + 2 * latent}, got {output}"
            )


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t [B,…] for t [B]."""
    t = spread(t, x0)
    return (1 - t) * x0 + t * noise


def network_input(
    prediction_type: str, x_t: Tensor, t: Tensor, z_lq: Tensor, damage_std: float
) -> Tensor:
    """What the network reads at time t [B]; x_t, z_lq [B,c,h,w].

    x_t itself, except for "residual" and "log_affine": there `observed` of the mean of x0 given
    both observations, a sufficient statistic of them (see `to_velocity`). It is z_lq at t = 1 and
    x_t at t = 0; x_t alone would add full-strength noise to every token while most of what is known
    lies in z_lq.
    """
    if not reads_damage(prediction_type):
        return x_t
    return observed(prediction_type, _mean(x_t, spread(t, x_t), z_lq, damage_std))


def observed(prediction_type: str, latents: Tensor) -> Tensor:
    """How the network sees damaged latents: as they are, or on the scale of "log_affine"."""
    return 2 * _compand(latents) - 1 if prediction_type == "log_affine" else latents


def _mean(x_t: Tensor, t: Tensor, z_lq: Tensor, damage_std: float) -> Tensor:
    near, far = 1 - t, (t / damage_std) ** 2
    return (near * x_t + far * z_lq) / (near**2 + far)


# Steepness of the logarithmic scale: dark tones are seen about as finely as bright ones.
_STEEPNESS = 20.0


def _compand(pixels: Tensor) -> Tensor:
    """Pixels, black at −1 and white at 1, on a logarithmic scale from 0 to 1; odd about black."""
    u = (pixels + 1) / 2
    return torch.log1p(_STEEPNESS * u.abs()) / math.log1p(_STEEPNESS) * u.sign()


def _expand(scaled: Tensor) -> Tensor:
    """The inverse of `_compand`."""
    u = torch.expm1(scaled.abs() * math.log1p(_STEEPNESS)) / _STEEPNESS * scaled.sign()
    return 2 * u - 1


def reads_damage(prediction_type: str) -> bool:
    """Whether the prediction starts from the damaged latents, and so needs them."""
    return prediction_type in ("residual", "log_affine")


def to_velocity(
    prediction_type: str, output: Tensor, x_t: Tensor, t: Tensor, z_lq: Tensor, damage_std: float
) -> Tensor:
    """The network's raw output as a velocity; all [B,c,h,w] but t [B] in (0, 1].

    - "velocity": the output itself.
    - "sample": the output is x̂0, and v = (x_t − x̂0)/t.
    - "residual": the output F corrects the mean of x0 given two Gaussian observations of it, x_t
      and the damaged z_lq (standard deviation s = `damage_std`, flat prior):
      x̂0 = [(1−t)·x_t + (t/s)²·z_lq]/n + (t/√n)·F, n = (1−t)² + (t/s)².
      A skip from z_lq that fades as x_t becomes the better witness. Substituted into
      v = (x_t − x̂0)/t the division by t cancels, so small t magnifies nothing.
    - "log_affine": for unshuffled pixels. With y = c(mean) − 1 on a logarithmic scale of brightness
      c, white at 1, three more channels G (a colour each), and a = t/√n:
      c(x̂0) − 1 = (y + a·F)·e^(a·G), within bounds that no picture reaches. Haze and
      darkness are then undone by smooth F and G at full detail, where a residual alone would have
      to carry the detail of the whole picture through the network. With 2·c channels more the
      mean first goes through `reshape_spectrum` with strength a/s, which smooths and sharpens.
    """
    if prediction_type == "velocity":
        return output
    t = spread(t, x_t)
    if prediction_type == "sample":
        return (x_t - output) / t
    w = damage_std**-2
    n = (1 - t) ** 2 + w * t**2
    # (x_t − mean)/t without the division.
    v = ((w * t - (1 - t)) * x_t - w * t * z_lq) / n
    if prediction_type == "residual":
        return v - output / n.sqrt()
    side = cell_side(x_t.shape[1])
    a = t / n.sqrt()
    latent = x_t.shape[1]
    residual, gain, controls = output.split(
        [latent, _COLOURS, output.shape[1] - latent - _COLOURS], 1
    )
    mean = F.pixel_shuffle(_mean(x_t, t, z_lq, damage_std), side)
    clear = reshape_spectrum(mean, controls, a / damage_std) if controls.shape[1] else mean
    y = _compand(clear) - 1 + a * F.pixel_shuffle(residual, side)
    # [B,3,H,W] in pixels.
    gain = F.interpolate(gain, scale_factor=side, mode="bilinear")
    corrected = _expand((1 + y * (a * gain).exp()).clamp(*_SPAN))
    return v - F.pixel_unshuffle(corrected - mean, side) / t


_COLOURS = 3
# Of c(x̂0): wide enough for what noise adds to pictures from 0 to 1, and no weights explode.
_SPAN = (-1.0, 1.25)


def loss_weight(prediction_type: str, t: Tensor, damage_std: float) -> Tensor:
    """Weight of the squared velocity error, [B]: makes the loss plain in the network's own output.

    For "sample" that is a constant in x̂0 clipped at t = 0.1 (t²·clip(1/t², 100)); for "residual"
    it is n. For "log_affine" it is n, too: plain in pixels at t = 1.
    """
    if prediction_type == "velocity":
        return torch.ones_like(t)
    if prediction_type == "sample":
        return (t**2 / t.clamp(min=0.1) ** 2).clamp(max=1.0)
    return (1 - t) ** 2 + (t / damage_std) ** 2


def spread(t: Tensor, like: Tensor) -> Tensor:
    """t [B] with trailing axes of length one, to go with `like` [B,…]."""
    return t.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
