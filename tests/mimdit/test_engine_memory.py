"""What the engine holds, against what it plans, by the allocator's own record."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

from mimdit import accelerate
from mimdit.engine import Plan, plan
from mimdit.presets import build
from mimdit.transformer import MiMDiTTransformer2DModel

# Modulations, routings, texts and the like; small beside the buffers below.
SMALL = 2**18


class Memory(NamedTuple):
    """Bytes beyond those before a call: at most, and after it."""

    peak: int
    left: int


def memory(run: Callable[[], Any]) -> Memory:
    """Every allocation and release of torch's allocator, those inside of operators, too."""
    with profile(profile_memory=True) as record:
        result = run()
    assert record.kineto_results is not None
    events = [e for e in record.kineto_results.events() if e.name() == "[memory]"]
    held = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    del result
    return Memory(int(held.max()), int(held[-1]))


def tiny(**options: Any) -> tuple[MiMDiTTransformer2DModel, Tensor, Plan]:
    """Where buffers weigh more than weights and everything small; damaged latents; the plan."""
    torch.manual_seed(0)
    options = {"prediction_type": "velocity", "out_channels": 48, "num_layers": 3} | options
    model = build("tiny", **options).randomize_(0).requires_grad_(False).eval()
    z = torch.randn(1, 48, 48, 48, generator=torch.Generator().manual_seed(0))
    return model, z, plan(model, tuple(z.shape))


@torch.no_grad()
def picture(model: MiMDiTTransformer2DModel, z: Tensor, anew: bool = False) -> Tensor:
    """Two steps of someone's own loop; anew: the condition in each of them."""
    x, condition = torch.zeros_like(z), model.encode_condition(z)
    for time in (1000.0, 500.0):
        given = model.encode_condition(z) if anew else condition
        x = x - model(x, torch.tensor([time]), given).sample / 2
    return x


@pytest.mark.parametrize("options", [{}, {"qk_norm": "rms_norm"}], ids=["plain", "qk norm"])
def test_memory_is_the_references_and_the_stated_buffers(options: dict[str, Any]) -> None:
    model, z, planned = tiny(**options)
    model.use_literal_attention()
    picture(model, z)
    reference = memory(lambda: picture(model, z, anew=True))
    accelerate(model)
    engine = memory(lambda: picture(model, z))
    stated = planned.buffers + planned.condition
    assert stated > 8 * SMALL
    assert engine.peak <= reference.peak + stated
    # What stays is what is stated, to the byte but for what is small.
    assert stated <= engine.left - z.nbytes < stated + SMALL
    # The next picture of the shape needs no buffers of its own.
    again = memory(lambda: picture(model, z))
    assert again.peak <= reference.peak + planned.condition
    assert abs(again.left - z.nbytes) < SMALL


@torch.no_grad()
def test_a_step_holds_no_more_than_planned_nor_than_the_references() -> None:
    model, z, planned = tiny()
    model.use_literal_attention()
    peaks = []
    for enabled in (False, True):
        target = accelerate(model, enabled=enabled)
        t, condition = torch.tensor([500.0]), target.encode_condition(z)
        target(z, t, condition)
        step = memory(partial(target, z, t, condition))
        peaks.append(step.peak - z.nbytes)
    assert peaks[1] <= min(peaks[0], planned.activations + SMALL)


def test_the_cache_of_first_blocks_adds_what_is_stated() -> None:
    """Twice the image tokens for every call of a step, and nothing after a run."""
    model, z, planned = tiny()
    accelerate(model, first_block_cache=0.0)
    engine: Any = model.engine
    picture(model, z)
    tokens = 4 * model.inner_dim * planned.grid[0] * planned.grid[1]
    assert 2 * tokens <= engine._run.cache.bytes < 2 * tokens + 2 * z.nbytes
    with torch.no_grad(), engine.steps(torch.tensor([1000.0, 500.0]), [model.prompt()[1]]):
        picture(model, z)
    assert engine._run.cache.bytes == 0
