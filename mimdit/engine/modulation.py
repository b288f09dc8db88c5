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
        """timesteps [S]; pooled [1,P] for any number of pictures, or [B,P], in the model's type."""
        if timesteps.ndim != 1 or pooled.ndim != 2:
            found = f"{timesteps.ndim} and {pooled.ndim}"
            raise ValueError(f"timesteps, pooled: expected one axis and two, got {found}")
        if pooled.dtype != (dtype := modulator.model.dtype):
            raise ValueError(f"pooled: expected {dtype}, as the model, got {pooled.dtype}")
        self._pooled, self._version = pooled, _version(pooled)
        texts = pooled[:1] if _alike(pooled) else pooled
        count = len(texts)
        self._pictures = 0 if count == 1 else torch.arange(count, device=pooled.device)
        timesteps = timesteps.to(pooled.device)
        flat = modulator.embed(timesteps.repeat_interleave(count), texts.repeat(len(timesteps), 1))
        # The first row is for times that are not here.
        times = timesteps if timesteps.is_floating_point() else timesteps.float()
        self._times = F.pad(times, (1, 0), value=torch.nan)
        rows = flat.unflatten(0, (-1, count))
        self._rows = F.pad(rows, (0, 0, 0, 0, 1, 0), value=torch.nan)  # [1+S,count,total]

    def holds(self, timestep: Tensor, pooled: Tensor) -> bool:
        """Whether these are its texts, as they were, and on a CPU whether these are its times.

        Of times on a GPU nothing is known without waiting for it.
        """
        own = self._pooled
        if pooled.data_ptr() != own.data_ptr() or _version(pooled) != self._version:
            return False
        if isinstance(self._pictures, int):
            same = _alike(pooled)
        else:
            same = (pooled.shape, pooled.stride()) == (own.shape, own.stride())
        return same and (timestep.device.type != "cpu" or bool(self._found(timestep).any(1).all()))

    def __call__(self, timestep: Tensor) -> Tensor:
        """[B,total] for timesteps [B]; NaN for one that is not the table's."""
        place = self._found(timestep).to(torch.uint8).argmax(1)
        return self._rows[place, self._pictures]

    def _found(self, timestep: Tensor) -> Tensor:
        return self._times == timestep[:, None]


def _alike(pooled: Tensor) -> bool:
    """Whether all pictures have one text."""
    return len(pooled) == 1 or pooled.stride(0) == 0


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
