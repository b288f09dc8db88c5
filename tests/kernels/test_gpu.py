"""Compiled kernels on a real GPU, at the sizes of SD3.5-medium."""

from collections.abc import Callable

import pytest
import torch

from mimkernels import (
    expert_combine,
    expert_depthwise3x3,
    expert_linear,
    image_gate,
    window_attention,
)
from mimkernels.expert_combine import expert_combine_reference
from mimkernels.expert_depthwise3x3 import expert_depthwise3x3_reference
from mimkernels.expert_linear import expert_linear_reference
from mimkernels.image_gate import image_gate_reference
from mimkernels.window_attention import window_attention_reference
from tests.kernels.common import compare

pytestmark = pytest.mark.gpu
TOKENS, WIDTH, EXPERTS, SLOTS = 1024, 384, 4, 2


def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
    g = torch.Generator("cuda").manual_seed(sum(shape))
    return (torch.randn(shape, generator=g, device="cuda") * scale).bfloat16()


def calls() -> dict[str, tuple[Callable, Callable, list[torch.Tensor]]]:
    """Each op's kernel, its reference, and arguments for both."""
    index = torch.tensor([[0, 3], [2, 1]], device="cuda")
    x, slots = draw(2, TOKENS, WIDTH), draw(2, SLOTS, TOKENS, WIDTH)
    weight, bias = draw(EXPERTS, 3 * WIDTH, WIDTH, scale=WIDTH**-0.5), draw(EXPERTS, 3 * WIDTH)
    planes, kernels = draw(2, SLOTS, 32, 32, 3 * WIDTH), draw(EXPERTS, 3 * WIDTH, 3, 3)
    gate, residual = draw(2, SLOTS).sigmoid(), draw(2, TOKENS, 3 * WIDTH)
    return {
        "expert_linear": (expert_linear, expert_linear_reference, [x, weight, index, bias]),
        "expert_depthwise3x3": (
            expert_depthwise3x3,
            expert_depthwise3x3_reference,
            [planes, kernels, index],
        ),
        "expert_combine": (
            lambda x, w, i, g, b, r: expert_combine(x, w, i, g, bias=b, residual=r),
            lambda x, w, i, g, b, r: expert_combine_reference([x], [w], [i], [g], [b], r),
            [slots, weight, index, gate, bias, residual],
        ),
        "window_attention": (
            lambda x, t, i: window_attention(x, t, window=8, heads=12, shift=4, index=i),
            lambda x, t, i: window_attention_reference(x, t, i, window=8, heads=12, shift=(4, 4)),
            [draw(2, SLOTS, 64, 64, 3 * WIDTH), draw(EXPERTS, 225, 12), index],
        ),
        "image_gate": (
            lambda x, w, b: image_gate(x, w, b, groups=4, experts=4, k=2)[1],
            lambda x, w, b: image_gate_reference(x, w, b, 4, 4, 2)[1],
            [draw(24, 2, TOKENS, WIDTH), draw(24, 20, WIDTH), draw(24, 20)],
        ),
    }


NAMES = (
    "expert_linear",
    "expert_depthwise3x3",
    "expert_combine",
    "window_attention",
    "image_gate",
)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_at_full_size(name: str) -> None:
    compare(*calls()[name])


@pytest.mark.parametrize("name", NAMES)
def test_forward_never_waits_for_the_device_and_is_captured(name: str) -> None:
    op, _, arguments = calls()[name]
    wanted = op(*arguments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        op(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = op(*arguments)
    found.zero_()
    graph.replay()
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", NAMES)
def test_compiled_forward_and_backward(name: str) -> None:
    op, reference, arguments = calls()[name]
    compare(torch.compile(op, fullgraph=True), reference, arguments)


def test_offsets_beyond_two_to_the_31() -> None:
    """2.4 billion elements of x: int32 offsets would wrap."""
    x = torch.zeros(1, 2, 1_600_000, 768, dtype=torch.bfloat16, device="cuda")
    x[0, 1, -1] = 1
    weight = torch.ones(1, 16, 768, dtype=torch.bfloat16, device="cuda")
    index = torch.zeros(1, 2, dtype=torch.int64, device="cuda")
    out = expert_linear(x, weight, index)
    assert (out[0, 1, -1] == 768).all()
    assert not out[0, 1, :-1].any()
