"""The velocity of a whole latent, tile by tile, and the grids it can be computed on."""

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
from mimdit.steering import steer
from mimdit.tiling import Tiling
from mimdit.transformer import MiMDiTTransformer2DModel

# Places of a patch grid, in patches: the usual one, half a patch off along both axes, along one.
_PLACES = ((0.0, 0.0), (0.5, 0.5), (0.0, 0.5), (0.5, 0.0))
SHIFTS = (1, 2, 4)


def grid_places(shifts: int, patch: int) -> list[tuple[int, int]]:
    """(down, right) of the first `shifts` grids in pixels, for patches of `patch` pixels."""
    return [(int(y * patch), int(x * patch)) for y, x in _PLACES[:shifts]]


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
    _kept: dict[int, Condition] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """Routing from the statistics of all tiles, which are read one pass after the other."""
        self.device = self.device or self.z_lq.device
        to = {"device": self.device, "dtype": self.model.dtype}
        self.prompts = [(text.to(**to), pooled.to(**to)) for text, pooled in self.prompts]
        found, total = [], torch.zeros((), device=self.device)
        for tiles in self.tiling.chunks(self.tile_batch):
            cut = self.tiling.cut(self.z_lq, tiles, self.device)
            pooled = self.model.pool_condition(cut)
            if self.shared:
                total = total + pooled.unflatten(1, (-1, len(self.z_lq))).sum(1)
            else:
                found.append(pooled)
        means = total / len(self.tiling.corners) if self.shared else torch.cat(found, dim=1)
        mim = self.model.mim
        self.routing = steer(mim.route(means), mim.groups, self.experts)

    def __call__(self, latents: Tensor, t: Tensor) -> Tensor:
        return self.tiling.blend(
            lambda tiles: self._tiles(tiles, latents, t), latents, self.tile_batch
        )

    def steps(self, timesteps: Tensor) -> AbstractContextManager[None]:
        """To be entered around calls with these times alone, [S]."""
        engine = self.model.engine
        if engine is None:
            return nullcontext()
        assert self.device is not None
        return engine.steps(timesteps.to(self.device), [pooled for _, pooled in self.prompts])

    def _tiles(self, tiles: slice, latents: Tensor, t: Tensor) -> Tensor:
        x = self._cut(latents, tiles)
        condition, time = self._condition(tiles), t.expand(len(x)).to(x.device)
        parts = [
            self.model(
                x,
                time,
                condition,
                encoder_hidden_states=text.expand(len(x), -1, -1),
                pooled_projections=pooled.expand(len(x), -1),
                return_dict=False,
            )[0].float()
            for text, pooled in self.prompts
        ]
        self.passed()
        if len(parts) == 2:
            parts = [parts[1] + self.guidance_scale * (parts[0] - parts[1])]
        return parts[0][: (tiles.stop - tiles.start) * len(latents)]

    def _cut(self, plane: Tensor, tiles: slice) -> Tensor:
        """Tiles [n·B,c,h,w] of one pass; the first is repeated where the last pass has too few."""
        x, pictures = self.tiling.cut(plane, tiles, self.device), len(plane)
        missing = self._missing(tiles)
        return torch.cat([x, x[:pictures].repeat(missing, 1, 1, 1)]) if missing else x

    def _missing(self, tiles: slice) -> int:
        whole = min(self.tile_batch, len(self.tiling.corners))
        return whole - (tiles.stop - tiles.start)

    def _condition(self, tiles: slice) -> Condition:
        if tiles.start in self._kept:
            return self._kept[tiles.start]
        pictures = torch.arange(len(self.z_lq))
        numbers = [*range(tiles.start, tiles.stop), *[tiles.start] * self._missing(tiles)]
        if self.shared:
            rows = pictures.repeat(len(numbers))
        else:
            rows = (torch.tensor(numbers)[:, None] * len(pictures) + pictures).flatten()
        found = self.model.encode_condition(
            self._cut(self.z_lq, tiles), self.routing.pictures(rows)
        )
        held = sum(condition.bytes for condition in self._kept.values())
        if held + found.bytes <= self.keep:
            self._kept[tiles.start] = found
        return found


def draw_noise(
    like: Tensor, generator: torch.Generator | list[torch.Generator] | None = None
) -> Tensor:
    """Noise of a shape, drawn where the generator lives: the same wherever latents are kept."""
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
            # Diffusers declares FloatTensor, which no torch function is typed to return.
            latents = scheduler.step(
                denoiser(latents, t),  # pyright: ignore[reportArgumentType]
                t,  # pyright: ignore[reportArgumentType]
                latents,  # pyright: ignore[reportArgumentType]
                return_dict=False,
            )[0]
            latents = step_end(i, t, latents)
    return latents
