"""The model's velocity of a whole latent, and the steps from noise to a picture."""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import cast

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from mimdit.condition import Condition
from mimdit.mim import Routing
from mimdit.options import check_generators
from mimdit.steering import steer
from mimdit.tile_loop import TileLoop, pool_tiles
from mimdit.tiling import Tiling
from mimdit.transformer import MiMDiTTransformer2DModel

# Elements of latents that take a step at once.
_TOGETHER = 2**22


@dataclass
class Denoiser:
    """Velocity at (latents [B,c,h,w], t): tiles are blended, and by default share one routing.

    prompts: text embeddings ([1,T,C], [1,P]); of two, guidance moves from the second to the first.
    tile_batch: tiles a forward pass; the last pass is filled up, so that all have one shape.
    device: where the model runs, by default that of z_lq. shared: one routing for a whole picture,
    so that its tiles never disagree; else every tile has its own. experts: see `steering.steer`.
    keep: bytes of conditions that are kept for the next step; others are computed anew.
    passed: called after every forward pass.
    """

    model: MiMDiTTransformer2DModel
    z_lq: Tensor
    tiling: Tiling
    prompts: Sequence[tuple[Tensor, Tensor]]
    guidance_scale: float
    tile_batch: int
    device: torch.device | None = None
    shared: bool = True
    experts: Mapping[str, float] = field(default_factory=dict)
    keep: int = 0
    passed: Callable[[], object] = lambda: None
    routing: Routing = field(init=False)
    _loop: TileLoop[Condition] = field(init=False)

    def __post_init__(self) -> None:
        """Routing from the statistics of all tiles, which are read one pass after the other."""
        self.device = self.device or self.z_lq.device
        to = {"device": self.device, "dtype": self.model.dtype}
        self.prompts = [(text.to(**to), pooled.to(**to)) for text, pooled in self.prompts]
        parts = (self.z_lq, self.tiling, self.tile_batch)
        means = pool_tiles(self.model.pool_condition, *parts, self.device, self.shared)
        model, mim, prompts = self.model, self.model.mim, self.prompts
        self.routing = routing = steer(mim.route(means), mim.groups, self.experts)
        # Nothing refers to this object, so that its conditions go with it at once.
        self._loop = TileLoop(
            *parts,
            lambda z, rows: model.encode_condition(z, routing.pictures(rows)),
            lambda x, t, condition: _velocities(model, prompts, x, t, condition),
            self.guidance_scale,
            self.device,
            self.shared,
            self.keep,
            self.passed,
        )

    def __call__(self, latents: Tensor, t: Tensor) -> Tensor:
        return self._loop(latents, t)

    def steps(self, timesteps: Tensor) -> AbstractContextManager[None]:
        """To be entered around calls with these times alone, [S]."""
        engine = self.model.engine
        if engine is None:
            return nullcontext()
        assert self.device is not None
        return engine.steps(timesteps.to(self.device), [pooled for _, pooled in self.prompts])


def _velocities(
    model: MiMDiTTransformer2DModel,
    prompts: Sequence[tuple[Tensor, Tensor]],
    x: Tensor,
    t: Tensor,
    condition: Condition,
) -> list[Tensor]:
    return [
        model(
            x,
            t,
            condition,
            encoder_hidden_states=text.expand(len(x), -1, -1),
            pooled_projections=pooled.expand(len(x), -1),
            return_dict=False,
        )[0].float()
        for text, pooled in prompts
    ]


def draw_noise(
    like: Tensor, generator: torch.Generator | list[torch.Generator] | None = None
) -> Tensor:
    """Noise of a shape, drawn where the generator lives: the same wherever latents are kept.

    Raises ValueError for a list that is not one generator, or one for each of the B pictures.
    """
    if isinstance(generator, list):
        check_generators(len(generator), len(like))
    first = generator[0] if isinstance(generator, list) else generator
    device = like.device if first is None else first.device
    noise = randn_tensor(like.shape, generator=generator, device=device, dtype=like.dtype)
    return noise.to(like.device)


def sample(
    scheduler: FlowMatchEulerDiscreteScheduler,
    denoiser: Denoiser,
    latents: Tensor,
    steps: int,
    step_end: Callable[[int, Tensor, Tensor], Tensor],
) -> Tensor:
    """Latents after all steps from noise; `step_end(i, t, latents)` may replace them."""
    scheduler.set_timesteps(steps, device=latents.device)
    timesteps = cast(Tensor, scheduler.timesteps)
    with denoiser.steps(timesteps):
        for i, t in enumerate(timesteps):
            latents = _stepped(scheduler, denoiser(latents, t), t, latents)
            latents = step_end(i, t, latents)
    return latents


def _stepped(
    scheduler: FlowMatchEulerDiscreteScheduler, velocity: Tensor, t: Tensor, latents: Tensor
) -> Tensor:
    """The latents after one step; where they are large, in place of the velocity.

    An Euler step holds two more tensors of the size of its latents, so it takes some rows at a
    time; schedulers that draw noise or remember a step take all.
    """
    rows = max(_TOGETHER * latents.shape[-2] // latents.numel(), 1)
    plain = type(scheduler) is FlowMatchEulerDiscreteScheduler
    if rows >= latents.shape[-2] or not plain or scheduler.config["stochastic_sampling"]:
        # Diffusers declares FloatTensor, which no torch function is typed to return.
        return scheduler.step(velocity, t, latents, return_dict=False)[0]  # pyright: ignore
    bands = [*zip(velocity.split(rows, dim=-2), latents.split(rows, dim=-2), strict=True)]
    for v, x in bands:
        # A scheduler counts its steps, and all of these are one.
        counts = scheduler if v is bands[-1][0] else copy.copy(scheduler)
        v.copy_(counts.step(v, t, x, return_dict=False)[0])  # pyright: ignore
    return velocity
