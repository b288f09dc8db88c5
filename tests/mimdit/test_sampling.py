"""Steps from noise to latents."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from mimdit import sampling
from mimdit.sampling import sample

LATENTS = torch.randn(2, 3, 10, 4, generator=torch.Generator().manual_seed(0))


class Velocity:
    """A field that depends on place and time; new memory at every call, as of blended tiles."""

    def __call__(self, latents: Tensor, t: Tensor) -> Tensor:
        return (latents * 3).sin() + t / 500 + torch.arange(10).view(-1, 1)

    def steps(self, timesteps: Tensor) -> Any:
        return nullcontext()


class Counted(FlowMatchEulerDiscreteScheduler):
    """Another scheduler, for all that is known of it."""


def run(scheduler: FlowMatchEulerDiscreteScheduler, steps: int = 3) -> tuple[Tensor, list[Tensor]]:
    """The result, and the latents after every step."""
    seen: list[Tensor] = []

    def step_end(i: int, t: Tensor, latents: Tensor) -> Tensor:
        seen.append(latents.clone())
        return latents

    torch.manual_seed(0)
    velocity: Any = Velocity()
    return sample(scheduler, velocity, LATENTS, steps, step_end), seen


@pytest.mark.parametrize("rows", [1, 3, 9])
def test_large_latents_take_a_step_some_rows_at_a_time(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = LATENTS.clone()
    whole, each = run(FlowMatchEulerDiscreteScheduler(shift=3.0))
    monkeypatch.setattr(sampling, "_TOGETHER", rows * LATENTS.numel() // 10)
    scheduler, sizes = FlowMatchEulerDiscreteScheduler(shift=3.0), set[int]()
    plain = FlowMatchEulerDiscreteScheduler.step

    def step(self: Any, velocity: Tensor, *rest: Any, **options: Any) -> Any:
        sizes.add(velocity.shape[-2])
        return plain(self, velocity, *rest, **options)

    monkeypatch.setattr(FlowMatchEulerDiscreteScheduler, "step", step)
    parts, each_parts = run(scheduler)
    assert max(sizes) == rows and scheduler.step_index == 3
    assert torch.equal(parts, whole)
    assert all(torch.equal(a, b) for a, b in zip(each, each_parts, strict=True))
    # Another attempt may start from the noise.
    assert torch.equal(LATENTS, before)


@pytest.mark.parametrize(
    "made",
    [Counted, lambda: FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)],
    ids=["another", "draws noise"],
)
def test_other_schedulers_see_whole_latents(made: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(made())
    monkeypatch.setattr(sampling, "_TOGETHER", 1)
    again, _ = run(made())
    assert torch.equal(again, whole)
