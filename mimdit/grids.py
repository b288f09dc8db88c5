"""Pictures restored on shifted grids of patches, one after the other, and averaged."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mimdit.codec import Codec
from mimdit.memory import shrinking
from mimdit.mim import Routing
from mimdit.passes import PassCount, Progress
from mimdit.planning import PicturePlan
from mimdit.sampling import Denoiser, draw_noise, sample
from mimdit.tiled_codec import decode_tiles, encode_tiles
from mimdit.tiling import reflect_pad
from mimdit.transformer import MiMDiTTransformer2DModel

Place = tuple[int, int]


@dataclass
class GridRun:
    """How pictures are restored, whichever the grid.

    plan: of pictures of a size (height, width). replan: of a plan that memory did not hold, with
    another tile and batch. release: gives back what is kept for later. prompts, guidance_scale,
    shared and experts: of `Denoiser`. step_end: of `sample`. bar, progress: of `PassCount`.
    """

    model: MiMDiTTransformer2DModel
    codec: Codec
    scheduler: FlowMatchEulerDiscreteScheduler
    device: torch.device
    plan: Callable[[tuple[int, int]], PicturePlan]
    replan: Callable[[PicturePlan, tuple[int, int]], PicturePlan]
    release: Callable[[], None]
    prompts: Sequence[tuple[Tensor, Tensor]]
    guidance_scale: float
    shared: bool
    experts: Mapping[str, float]
    steps: int
    generator: torch.Generator | list[torch.Generator] | None
    step_end: Callable[[int, Tensor, Tensor], Tensor]
    bar: Any
    progress: Progress | None

    def restore(self, damaged: Tensor, places: Sequence[Place]) -> tuple[Tensor, Routing]:
        """Mean over grids that start at `places`, (down, right) in pixels, and the first's routing.

        damaged [B,3,H,W] in [0,1]; the result may leave that range a little.
        """
        count = self._count(damaged, places)
        mean: Tensor | None = None
        taken: list[Routing] = []
        for grid, place in enumerate(places):
            # Planned once more: memory is not what it was.
            plan = self._planned(damaged, place)
            latents, routing = self._latents(damaged, place, plan, grid, count)
            taken.append(routing)
            pixels = decode_tiles(self.codec, latents, plan.codec_tile, self.device, self.release)
            del latents
            (top, left), (height, width) = place, damaged.shape[-2:]
            pixels = pixels[..., top : top + height, left : left + width]
            share = len(places)
            mean = pixels.div_(share) if mean is None else mean.add_(pixels, alpha=1 / share)
            del pixels
        assert mean is not None
        return mean, taken[0]

    def latents(self, damaged: Tensor) -> tuple[Tensor, Routing]:
        """Restored latents [B,c,h,w], padded to whole tokens, on the grid that is not shifted."""
        places = [(0, 0)]
        plan = self._planned(damaged, places[0])
        return self._latents(damaged, places[0], plan, 0, self._count(damaged, places))

    def _count(self, damaged: Tensor, places: Sequence[Place]) -> PassCount:
        # Of each grid: a shifted one may need a row of tiles more.
        passes = [self.steps * self._planned(damaged, place).passes for place in places]
        return PassCount(self.bar, self.progress, passes)

    def _planned(self, damaged: Tensor, place: Place) -> PicturePlan:
        height, width = damaged.shape[-2:]
        return self.plan((height + place[0], width + place[1]))

    def _latents(
        self, damaged: Tensor, place: Place, plan: PicturePlan, grid: int, count: PassCount
    ) -> tuple[Tensor, Routing]:
        z_lq = self._encoded(damaged, place, plan)
        noise = draw_noise(z_lq, self.generator)
        now = plan

        def restore(side: int, batch: int) -> tuple[Tensor, Routing]:
            nonlocal now
            if (side, batch) != (plan.tile, plan.batch):
                now = self.replan(now, (side, batch))
            denoiser = Denoiser(
                self.model,
                z_lq,
                now.tiling,
                self.prompts,
                self.guidance_scale,
                tile_batch=now.batch,
                device=self.device,
                shared=self.shared,
                experts=self.experts,
                keep=now.keep,
                # Passes are what moves on visibly in a large picture.
                passed=count.begin(grid, now.passes * self.steps),
            )
            latents = sample(self.scheduler, denoiser, noise, self.steps, self.step_end)
            return latents, denoiser.routing

        return shrinking(restore, plan.tile, plan.batch, plan.least_tile, self.release)

    def _encoded(self, damaged: Tensor, place: Place, plan: PicturePlan) -> Tensor:
        """Latents of pictures that start at a place of the grid, reflected around."""
        moved = reflect_pad(damaged, *plan.size, *place)
        moved = reflect_pad(moved, *(side * plan.factor for side in plan.tiling.plane))
        return encode_tiles(
            self.codec, moved, plan.codec_tile, self.device, plan.home, self.release
        )
