"""Speeds on a CPU, for pytest-benchmark: `pytest bench --benchmark-only`."""

from collections.abc import Callable

import pytest
import torch

from bench.variants import variants_of
from mimdit.presets import build

SIZES = [128, 256]
NAMES = ["reference", "reference-cached", "engine", "engine-int8"]


@pytest.fixture(scope="module", params=SIZES)
def calls(request: pytest.FixtureRequest) -> dict[str, Callable[[], torch.Tensor]]:
    """One step of `tiny` with random weights, in each variant that a CPU has."""
    model = build("tiny").randomize_(0).requires_grad_(False).eval()
    side = request.param // 4
    x, z = torch.randn(2, 1, 48, side, side)
    t = torch.full((1,), 500.0)
    found = {}
    with torch.no_grad():
        for variant in variants_of(model, z, NAMES)[0]:
            condition = variant.encode(z)
            found[variant.name] = lambda v=variant, c=condition: v.step(x, t, c)
    return found


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_step(benchmark: Callable, calls: dict[str, Callable], name: str) -> None:
    benchmark(calls[name])
