"""The velocity of a whole latent, tile by tile, and the grids it can be computed on."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mimdit.condition import Condition
from mimdit.mim import Routing
from mimdit.tiling import Tiling
from mimdit.transformer import MiMDiTTransformer2DModel

# Conditioning tokens beyond this many bytes are computed anew in every step instead of kept.
_CONDITION_BYTES = 2**30
# Places of a patch grid, in patches: the usual one, half a patch off along both axes, along one.
_PLACES = ((0.0, 0.0), (0.5, 0.5), (0.0, 0.5), (0.5, 0.0))
SHIFTS = (1, 2, 4)


def grid_places(shifts: int, patch: int) -> list[tuple[int, int]]:
    """(down, right) of the first `shifts` grids in pixels, for patches of `patch` pixels."""
    return [(int(y * patch), int(x * patch)) for y, x in _PLACES[:shifts]]


@dataclass
class Denoiser:
    """Velocity at (latents [B,c,h,w], t): tiles share one routing and are blended.

    prompts: text embeddings ([1,T,C], [1,P]); of two, guidance moves from the second to the first.
    tile_batch: tiles a forward pass.
    """

    model: MiMDiTTransformer2DModel
    z_lq: Tensor
    tiling: Tiling
    prompts: Sequence[tuple[Tensor, Tensor]]
    guidance_scale: float
    tile_batch: int
    routing: Routing = field(init=False)
    _kept: dict[int, Condition] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        """One routing for the whole picture, so that its tiles never disagree."""
        to = {"device": self.z_lq.device, "dtype": self.model.dtype}
        self.prompts = [(text.to(**to), pooled.to(**to)) for text, pooled in self.prompts]
        total = torch.zeros(())
        for tiles in self.tiling.chunks(self.tile_batch):
            pooled = self.model.pool_condition(self.tiling.cut(self.z_lq, tiles))
            total = total.to(pooled.device) + pooled.unflatten(1, (-1, len(self.z_lq))).sum(1)
        self.routing = self.model.mim.route(total / len(self.tiling.corners))

    def __call__(self, latents: Tensor, t: Tensor) -> Tensor:
        return self.tiling.blend(
            lambda tiles: self._tiles(tiles, latents, t), latents, self.tile_batch
        )

    def steps(self, timesteps: Tensor) -> AbstractContextManager[None]:
        """To be entered around calls with these times alone, [S]."""
        engine = self.model.engine
        if engine is None:
            return nullcontext()
        return engine.steps(timesteps.to(self.z_lq.device), [pooled for _, pooled in self.prompts])

    def _tiles(self, tiles: slice, latents: Tensor, t: Tensor) -> Tensor:
        x = self.tiling.cut(latents, tiles)
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
        if len(parts) == 1:
            return parts[0]
        return parts[1] + self.guidance_scale * (parts[0] - parts[1])

    def _condition(self, tiles: slice) -> Condition:
        if tiles.start in self._kept:
            return self._kept[tiles.start]
        cut = self.tiling.cut(self.z_lq, tiles)
        repeats = len(cut) // len(self.z_lq)
        found = self.model.encode_condition(cut, self.routing.repeat(repeats))
        if self._bytes() <= _CONDITION_BYTES:
            self._kept[tiles.start] = found
        return found

    def _bytes(self) -> int:
        """Of the conditioning tokens of all tiles."""
        model, size = self.model, self.tiling.size
        tokens = size[0] * size[1] // model.config["patch_size"] ** 2
        elements = len(self.z_lq) * len(self.tiling.corners) * tokens
        return elements * model.inner_dim * model.mim.layers * model.dtype.itemsize
