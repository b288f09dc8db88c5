"""Compiled kernels on a real GPU, at the sizes of SD3.5-medium."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from mimkernels import (
    Route,
    channel_attention,
    expert_combine,
    expert_depthwise3x3,
    expert_linear,
    gated_residual_layernorm_modulate,
    grouped_linear,
    image_gate,
    joint_qkv,
    layernorm_modulate,
    squeeze_excite,
    topk_route,
    window_attention,
)
from tests.kernels.calls import NAMES as SMALL_NAMES
from tests.kernels.calls import calls as small_calls
from tests.kernels.calls import tensors
from tests.kernels.common import compare, with_gradients

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
TOKENS, WIDTH, EXPERTS, SLOTS = 1024, 384, 4, 2
Op = Callable[..., Any]


def draw(*shape: int, scale: float = 1.0) -> Tensor:
    g = torch.Generator("cuda").manual_seed(sum(shape))
    return (torch.randn(shape, generator=g, device="cuda") * scale).bfloat16()


def joined(out: Any) -> Tensor:
    """All floating-point results of a call in one tensor, as `compare` takes them."""
    return torch.cat([x.flatten() for x in tensors(out) if x.is_floating_point()])


def calls() -> dict[str, tuple[Op, list[Tensor]]]:
    """Each op, with a choice of the backend, and its arguments."""
    index = torch.tensor([[0, 3], [2, 1]], device="cuda")
    x, slots = draw(2, TOKENS, WIDTH), draw(2, SLOTS, TOKENS, WIDTH)
    weight, bias = draw(EXPERTS, 3 * WIDTH, WIDTH, scale=WIDTH**-0.5), draw(EXPERTS, 3 * WIDTH)
    gate, residual = draw(2, SLOTS).sigmoid(), draw(2, TOKENS, 3 * WIDTH)
    hidden = WIDTH // 16
    route = topk_route(draw(TOKENS, EXPERTS), SLOTS, backend="torch")
    vectors = [draw(2, WIDTH) + i for i in range(3)]
    return {
        "expert_linear": (expert_linear, [x, weight, index, bias]),
        "expert_depthwise3x3": (
            expert_depthwise3x3,
            [draw(2, SLOTS, 32, 32, 3 * WIDTH), draw(EXPERTS, 3 * WIDTH, 3, 3), index],
        ),
        "expert_combine": (
            lambda x, w, i, g, b, r, backend=None: expert_combine(
                x, w, i, g, bias=b, residual=r, backend=backend
            ),
            [slots, weight, index, gate, bias, residual],
        ),
        "window_attention": (
            lambda x, t, i, backend=None: window_attention(
                x, t, window=8, heads=12, shift=4, index=i, backend=backend
            ),
            [draw(2, SLOTS, 64, 64, 3 * WIDTH), draw(EXPERTS, 225, 12), index],
        ),
        "window_attention, padded, several tiles": (
            lambda x, t, p, backend=None: window_attention(
                x, t, window=16, heads=12, shift=(8, 5), pad_value=p, backend=backend
            ),
            [draw(2, 50, 65, 3 * WIDTH), draw(961, 12), draw(3 * WIDTH)],
        ),
        "channel_attention": (
            lambda q, k, v, t, p, i, backend=None: channel_attention(
                q, k, v, t, heads=6, proj=p, index=i, backend=backend
            ),
            [
                *draw(2, SLOTS, TOKENS, 3 * WIDTH).chunk(3, dim=-1),
                draw(EXPERTS, 6).exp(),
                draw(EXPERTS, WIDTH, WIDTH, scale=WIDTH**-0.5),
                index,
            ],
        ),
        "squeeze_excite": (
            lambda x, a, b, c, d, i, w, backend=None: squeeze_excite(
                x, a, b, c, d, index=i, weight=w, backend=backend
            ),
            [
                x + draw(2, 1, WIDTH),
                draw(EXPERTS, hidden, WIDTH, scale=WIDTH**-0.5),
                draw(EXPERTS, hidden),
                draw(EXPERTS, WIDTH, hidden, scale=hidden**-0.5),
                draw(EXPERTS, WIDTH),
                index,
                gate,
            ],
        ),
        "layernorm_modulate": (
            lambda x, *flat, backend=None: joined(layernorm_modulate(x, *flat, backend=backend)),
            [x, *vectors, draw(2, WIDTH) - 1],
        ),
        "gated_residual_layernorm_modulate": (
            lambda *flat, backend=None: joined(
                gated_residual_layernorm_modulate(*flat, backend=backend)
            ),
            [x, draw(2, TOKENS, WIDTH) + 1, *vectors],
        ),
        "joint_qkv": (
            lambda x, y, q, k, backend=None: joined(
                joint_qkv([x, y], [q, None], [k, None], heads=6, backend=backend)
            ),
            [draw(2, TOKENS, 3 * WIDTH), draw(2, 333, 3 * WIDTH), draw(64) + 1, draw(64) - 1],
        ),
        "grouped_linear": (
            lambda x, w, b, *r, backend=None: grouped_linear(
                x, w, Route(*r), b, combine=True, backend=backend
            ),
            [draw(TOKENS, WIDTH), weight, bias, *route],
        ),
        "topk_route": (
            lambda x, backend=None: topk_route(x, SLOTS, backend=backend).weights,
            [draw(TOKENS, 64)],
        ),
        "image_gate": (
            lambda x, w, b, backend=None: joined(
                image_gate(x, w, b, groups=4, experts=4, k=2, backend=backend)
            ),
            [draw(24, 2, TOKENS, WIDTH), draw(24, 20, WIDTH), draw(24, 20)],
        ),
    }


NAMES = (
    "expert_linear",
    "expert_depthwise3x3",
    "expert_combine",
    "window_attention",
    "window_attention, padded, several tiles",
    "channel_attention",
    "squeeze_excite",
    "layernorm_modulate",
    "gated_residual_layernorm_modulate",
    "joint_qkv",
    "grouped_linear",
    "topk_route",
    "image_gate",
)


def reference(op: Op) -> Op:
    return lambda *arguments: op(*arguments, backend="torch")


def test_every_op_has_a_case() -> None:
    assert set(calls()) == set(NAMES)
    assert {name.split(",")[0] for name in NAMES} == set(SMALL_NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_at_full_size(name: str) -> None:
    op, arguments = calls()[name]
    compare(lambda *given: op(*given, backend="triton"), reference(op), arguments)


# Torch says so of the mode itself, when it is switched on.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("name", SMALL_NAMES)
def test_forward_never_waits_for_the_device_and_is_captured(name: str) -> None:
    op, arguments = small_calls("cuda")[name]
    with torch.no_grad():
        # The first compiles and loads.
        wanted = tensors(op(*arguments))
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            op(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = tensors(op(*arguments))
        for x in found:
            x.zero_()
        graph.replay()
        torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_the_same_input_gives_the_same_bits(name: str) -> None:
    op, arguments = calls()[name]
    first, second = (with_gradients(op, arguments) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_compiled_forward_and_backward(name: str) -> None:
    torch.compiler.reset()
    op, arguments = calls()[name]
    compare(torch.compile(op, fullgraph=True), reference(op), arguments)


@pytest.mark.parametrize("grid", [(64, 64), (50, 65)], ids=str)
def test_window_attention_needs_memory_for_its_output_alone(grid: tuple[int, int]) -> None:
    qkv, table = draw(2, *grid, 3 * WIDTH), draw(225, 12)
    with torch.no_grad():
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            # What was asked for: the allocator may hand out larger pieces.
            before = torch.cuda.memory_stats()["requested_bytes.all.current"]
            out = window_attention(qkv, table, window=8, heads=12, shift=4, backend="triton")
            peak = torch.cuda.memory_stats()["requested_bytes.all.peak"] - before
            assert peak == out.numel() * out.element_size()
            del out


def test_offsets_beyond_two_to_the_31() -> None:
    """2.4 billion elements of x: int32 offsets would wrap."""
    x = torch.zeros(1, 2, 1_600_000, 768, dtype=torch.bfloat16, device="cuda")
    x[0, 1, -1] = 1
    weight = torch.ones(1, 16, 768, dtype=torch.bfloat16, device="cuda")
    index = torch.zeros(1, 2, dtype=torch.int64, device="cuda")
    out = expert_linear(x, weight, index, backend="triton")
    assert (out[0, 1, -1] == 768).all()
    assert not out[0, 1, :-1].any()
