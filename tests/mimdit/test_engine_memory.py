"""What the engine holds, against what it plans, by the allocator's own record."""

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd.profiler import profile

from mimdit import accelerate
from mimdit.engine import Plan, first_block, plan
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
    # Models of other tests must not be released meanwhile.
    gc.collect()
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
    own: Any = accelerate(model).engine
    engine = memory(lambda: picture(model, z))
    stated = planned.buffers + planned.condition
    assert stated > 8 * SMALL
    assert engine.peak <= reference.peak + stated
    # What stays is what is stated, to the byte but for what is small.
    assert stated <= engine.left - z.nbytes < stated + SMALL
    # The next picture of the shape needs no buffers of its own.
    (made,) = own.workspaces.values()
    again = memory(lambda: picture(model, z))
    assert again.peak <= reference.peak + planned.condition
    assert abs(again.left - z.nbytes) < SMALL
    (held,) = own.workspaces.values()
    assert held is made


def test_weights_are_stored_once() -> None:
    model, *_ = tiny()
    weights = sum(p.nbytes for p in model.parameters())
    engine: Any = accelerate(model).engine
    fused = [layers for b in engine.blocks for layers in (b.image_qkv, b.text_qkv)]
    held = [*model.parameters(), engine._keys_and_values.stack.weight]
    held += [x for layers in (*fused, engine.modulator.linears) for x in layers.joint]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in held}
    assert sum(storages.values()) == weights


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


@torch.no_grad()
def test_the_cache_of_first_blocks_adds_what_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the image tokens for every call of a step, and nothing after a run."""
    model, z, planned = tiny()
    accelerate(model, first_block_cache=0.0)
    engine: Any = model.engine
    # Sizes are known only of what was made under record; the next picture frees some of it.
    memory(lambda: picture(model, z))
    engine._run.cache.forget()
    tokens = 2 * 4 * model.inner_dim * planned.grid[0] * planned.grid[1]
    assert tokens > 4 * SMALL
    kept = memory(lambda: picture(model, z))
    assert tokens <= kept.left - z.nbytes < tokens + SMALL
    assert tokens <= engine._run.cache.bytes < tokens + 2 * z.nbytes
    engine._run.cache.forget()

    def run() -> Tensor:
        with engine.steps(torch.tensor([1000.0, 500.0]), [model.prompt()[1]]):
            return picture(model, z)

    assert abs(memory(run).left - z.nbytes) < SMALL and engine._run.cache.bytes == 0
    # Where nobody says when a run ends, pictures that follow each other drive out the first.
    monkeypatch.setattr(first_block, "_LOOSE", 2)

    def pictures() -> None:
        for i in range(4):
            other = z + i
            model(other, torch.tensor([500.0]), model.encode_condition(other))

    assert tokens < memory(pictures).left < 2 * (tokens + z.nbytes) + SMALL
