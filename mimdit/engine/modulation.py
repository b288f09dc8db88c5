"""Shifts, scales and gates of all blocks, which depend on the time and the pooled text alone."""

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor

from mimdit.engine.linears import FusedLinear
from mimdit.transformer import MiMDiTTransformer2DModel


@dataclass(frozen=True)
class Adaptation:
    """Of one stream in one block, each [B,D]: before attention, after it, and around the MLP.

    The last text stream has only shift and scale. shift2, scale2, gate2: of the second attention.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor | None = None
    shift_mlp: Tensor | None = None
    scale_mlp: Tensor | None = None
    gate_mlp: Tensor | None = None
    shift2: Tensor | None = None
    scale2: Tensor | None = None
    gate2: Tensor | None = None


@dataclass(frozen=True)
class Modulation:
    """Adaptations of image and text stream of each block, and of the output."""

    image: tuple[Adaptation, ...]
    text: tuple[Adaptation, ...]
    out: Adaptation


class Modulator:
    """All adaptive norms' linear layers as one product [B,D] → [B,total]."""

    def __init__(self, model: MiMDiTTransformer2DModel) -> None:
        self.model, self.width = model, model.inner_dim
        blocks = [cast(JointTransformerBlock, block) for block in model.transformer_blocks]
        self._norms = adaptive_norms(model)
        # The last text norm and the output norm give scale before shift, all others the reverse.
        self._scale_first = [block.context_pre_only for block in blocks]
        self.linears = FusedLinear([cast(Any, norm).linear for norm in self._norms])

    def embed(self, timestep: Tensor, pooled: Tensor) -> Tensor:
        """Flat modulation [B,total] for timesteps [B] and pooled text [B,P]."""
        return self.linears(F.silu(self.model.time_text_embed(timestep, pooled)))

    def split(self, flat: Tensor) -> Modulation:
        """Views of a flat modulation [B,total]."""
        chunks = flat.unflatten(1, (-1, self.width)).unbind(1)
        image, text, place = [], [], 0
        for norm, scale_first in zip(self._norms[1::2], self._scale_first, strict=True):
            count = _chunks(self._norms[2 * len(image)])
            image.append(Adaptation(*chunks[place : place + count]))
            place += count
            count = _chunks(norm)
            own = chunks[place : place + count]
            text.append(Adaptation(*(own[::-1] if scale_first else own)))
            place += count
        out = Adaptation(chunks[place + 1], chunks[place])
        return Modulation(tuple(image), tuple(text), out)


def adaptive_norms(model: MiMDiTTransformer2DModel) -> list[Any]:
    """Those of each block's image and text stream, then the output's; each has a `linear` layer."""
    blocks = [cast(Any, block) for block in model.transformer_blocks]
    norms = [norm for block in blocks for norm in (block.norm1, block.norm1_context)]
    return [*norms, model.norm_out]


def _chunks(norm: Any) -> int:
    return norm.linear.out_features // norm.linear.in_features


class Table:
    """Modulations of all steps of a picture, from one product; looked up on the device."""

    def __init__(self, modulator: Modulator, timesteps: Tensor, pooled: Tensor) -> None:
        """timesteps [S]; pooled [1,P]."""
        self.timesteps = timesteps
        self.pointer = pooled.data_ptr()
        self.rows = modulator.embed(timesteps, pooled.expand(len(timesteps), -1))  # [S,total]

    def __call__(self, timestep: Tensor) -> Tensor:
        """[B,total] for timesteps [B], each one of the table's."""
        place = (self.timesteps == timestep[:, None]).to(torch.uint8).argmax(1)
        return self.rows[place]
