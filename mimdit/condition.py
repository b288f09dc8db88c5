"""What the denoiser knows of a damaged picture, and what may take its place to be faster."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from mimdit.mim import Routing


@dataclass(frozen=True)
class Condition:
    """All that the denoiser needs of a damaged picture; the same for every step.

    latents z_lq [B,c,h,w]; tokens: m_l [B,K,D] for each of the L blocks; the routing taken.
    """

    latents: Tensor
    tokens: tuple[Tensor, ...]
    routing: Routing

    @property
    def bytes(self) -> int:
        """Of what is held for the blocks."""
        held = (value for value in vars(self).values() if isinstance(value, tuple))
        return sum(x.numel() * x.element_size() for tensors in held for x in tensors)


class Accelerator(Protocol):
    """What makes the model faster, from outside (`mimdit.engine`)."""

    def mixtures(
        self, z: Tensor, grid: tuple[int, int], layers: slice, routing: Routing | None = None
    ) -> tuple[Tensor, Routing]:
        """As the model's `mim`."""
        ...

    def condition(self, given: Condition) -> Condition:
        """A condition in the form that `predict` takes."""
        ...

    def release(self) -> None:
        """Give back memory that is kept for later calls."""
        ...

    def steps(self, timesteps: Tensor, pooled: list[Tensor]) -> AbstractContextManager[None]:
        """Inside, all times are among `timesteps` [S] and pooled texts among these, [1,P] each."""
        ...

    def predict(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        condition: Any,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
    ) -> Tensor:
        """As the model's own."""
        ...
