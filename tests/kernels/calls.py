"""One small call of every op, for tests of what all ops have in common."""

from collections.abc import Callable

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

Call = tuple[Callable[..., object], list[Tensor]]


def calls(device: str) -> dict[str, Call]:
    """By name: a function of tensors alone that runs the kernel, and its arguments on `device`."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    def whole(*values: int) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    index = whole(0, 2, 1, 0).view(2, 2)
    # Two tokens: the first to experts 0 and 2, the second to 1 and 0.
    route = [
        draw(2, 2),
        index,
        whole(2, 1, 1),
        whole(2, 3, 4),
        whole(0, 3, 2, 1),
        whole(0, 3, 2, 1),
    ]
    slots, residual, gate = draw(2, 2, 9, 16), draw(2, 9, 8), draw(2, 2)
    return {
        "image_gate": (
            lambda x, w, b: image_gate(x, w, b, groups=2, experts=3, k=2, backend="triton"),
            [draw(3, 2, 9, 16), draw(3, 8, 16), draw(3, 8)],
        ),
        "topk_route": (lambda x: topk_route(x, 2, backend="triton"), [draw(9, 4)]),
        "expert_linear": (
            lambda x, w, i, b: expert_linear(x, w, i, b, backend="triton"),
            [draw(2, 9, 16), draw(3, 8, 16), index, draw(3, 8)],
        ),
        "expert_combine": (
            lambda x, w, i, g, b, r: expert_combine(
                x, w, i, g, bias=b, residual=r, backend="triton"
            ),
            [slots, draw(3, 8, 16), index, gate, draw(3, 8), residual],
        ),
        "expert_depthwise3x3": (
            lambda x, w, i: expert_depthwise3x3(x, w, i, backend="triton"),
            [draw(2, 2, 3, 3, 8), draw(3, 8, 3, 3), index],
        ),
        "grouped_linear": (
            lambda x, w, b, *r: grouped_linear(x, w, Route(*r), b, combine=True, backend="triton"),
            [draw(2, 16), draw(3, 8, 16), draw(3, 8), *route],
        ),
        "layernorm_modulate": (
            lambda x, *pair: layernorm_modulate(x, *pair, backend="triton"),
            [residual, draw(2, 8), draw(2, 8)],
        ),
        "gated_residual_layernorm_modulate": (
            lambda x, y, *rest: gated_residual_layernorm_modulate(x, y, *rest, backend="triton"),
            [residual, draw(2, 9, 8), draw(2, 8), draw(2, 8), draw(2, 8)],
        ),
        "window_attention": (
            lambda x, t, i: window_attention(
                x, t, window=2, heads=2, shift=1, index=i, backend="triton"
            ),
            [draw(2, 2, 3, 4, 12), draw(3, 9, 2), index],
        ),
        "channel_attention": (
            lambda q, k, v, t, p, i: channel_attention(
                q, k, v, t, heads=2, proj=p, index=i, backend="triton"
            ),
            [*draw(2, 2, 9, 48).chunk(3, -1), draw(3, 2), draw(3, 16, 16), index],
        ),
        "squeeze_excite": (
            lambda x, a, b, c, d, i, w: squeeze_excite(
                x, a, b, c, d, index=i, weight=w, backend="triton"
            ),
            [draw(2, 9, 16), draw(3, 4, 16), draw(3, 4), draw(3, 16, 4), draw(3, 16), index, gate],
        ),
        "joint_qkv": (
            lambda x, y, q, k: joint_qkv([x, y], [q, None], [k, None], heads=2, backend="triton"),
            [draw(2, 9, 24), draw(2, 5, 24), draw(4), draw(4)],
        ),
    }


NAMES = tuple(calls("cpu"))
# Shapes of the same arguments with as many sizes of one as the calls' options allow.
SMALLEST: dict[str, list[tuple[int, ...]]] = {
    "image_gate": [(1, 1, 1, 1), (1, 8, 1), (1, 8)],
    "topk_route": [(1, 2)],
    "expert_linear": [(1, 1, 1), (1, 1, 1), (1, 1), (1, 1)],
    "expert_combine": [(1, 1, 1, 1), (1, 1, 1), (1, 1), (1, 1), (1, 1), (1, 1, 1)],
    "expert_depthwise3x3": [(1, 1, 1, 1, 1), (1, 1, 3, 3), (1, 1)],
    "grouped_linear": [(1, 1), (1, 1, 1), *[(1, 1)] * 3, *[(1,)] * 4],
    "layernorm_modulate": [(1, 1, 1), (1, 1), (1, 1)],
    "gated_residual_layernorm_modulate": [(1, 1, 1), (1, 1, 1), (1, 1), (1, 1), (1, 1)],
    "window_attention": [(1, 1, 1, 1, 6), (1, 9, 2), (1, 1)],
    "channel_attention": [*[(1, 1, 1, 2)] * 3, (1, 2), (1, 2, 2), (1, 1)],
    "squeeze_excite": [(1, 1, 1), (1, 1, 1), (1, 1), (1, 1, 1), (1, 1), (1, 1), (1, 1)],
    "joint_qkv": [(1, 1, 6), (1, 1, 6), (1,), (1,)],
}


def tensors(out: object) -> list[Tensor]:
    """The results of a call as a list."""
    return list(out) if isinstance(out, tuple) else [out]  # pyright: ignore[reportReturnType]
