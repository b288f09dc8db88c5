"""Rectified flow (MiM-DiT, Eq. 1; arXiv 2209.03003) and what a network may predict in it.

x_t = (1−t)·x0 + t·ε with t from 0 (picture) to 1 (noise); velocity v = ε − x0 = dx_t/dt.
"""

import torch
from torch import Tensor

PREDICTION_TYPES = ("velocity", "sample", "residual")


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t [B,…] for t [B]."""
    t = spread(t, x0)
    return (1 - t) * x0 + t * noise


def network_input(
    prediction_type: str, x_t: Tensor, t: Tensor, z_lq: Tensor, damage_std: float
) -> Tensor:
    """What the network reads at time t [B]; x_t, z_lq [B,c,h,w].

    x_t itself, except for "residual": there the mean of x0 given both observations, a sufficient
    statistic of them (see `to_velocity`). It is z_lq at t = 1 and x_t at t = 0; x_t alone would add
    full-strength noise to every token while most of what is known lies in z_lq.
    """
    if prediction_type != "residual":
        return x_t
    t = spread(t, x_t)
    near, far = 1 - t, (t / damage_std) ** 2
    return (near * x_t + far * z_lq) / (near**2 + far)


def to_velocity(
    prediction_type: str, output: Tensor, x_t: Tensor, t: Tensor, z_lq: Tensor, damage_std: float
) -> Tensor:
    """The network's raw output as a velocity; all [B,c,h,w], t [B] in (0, 1].

    - "velocity": the output itself.
    - "sample": the output is x̂0, and v = (x_t − x̂0)/t.
    - "residual": the output F corrects the mean of x0 given two Gaussian observations of it, x_t
      and the damaged z_lq (standard deviation s = `damage_std`, flat prior):
      x̂0 = [(1−t)·x_t + (t/s)²·z_lq]/n + (t/√n)·F, n = (1−t)² + (t/s)².
      A skip from z_lq that fades as x_t becomes the better witness. Substituted into
      v = (x_t − x̂0)/t the division by t cancels, so small t magnifies nothing.
    """
    if prediction_type == "velocity":
        return output
    t = spread(t, x_t)
    if prediction_type == "sample":
        return (x_t - output) / t
    w = damage_std**-2
    n = (1 - t) ** 2 + w * t**2
    return ((w * t - (1 - t)) * x_t - w * t * z_lq) / n - output / n.sqrt()


def loss_weight(prediction_type: str, t: Tensor, damage_std: float) -> Tensor:
    """Weight of the squared velocity error, [B]: makes the loss plain in the network's own output.

    For "sample" that is a constant in x̂0 clipped at t = 0.1 (t²·clip(1/t², 100)); for "residual"
    it is n.
    """
    if prediction_type == "velocity":
        return torch.ones_like(t)
    if prediction_type == "sample":
        return (t**2 / t.clamp(min=0.1) ** 2).clamp(max=1.0)
    return (1 - t) ** 2 + (t / damage_std) ** 2


def spread(t: Tensor, like: Tensor) -> Tensor:
    """t [B] with trailing axes of length one, to go with `like` [B,…]."""
    return t.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))
