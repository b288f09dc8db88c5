"""Cases of attention in windows, of channels and of squeeze-and-excitation, as MiM runs them:
every picture of every layer by experts of its own.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernel_cases.base import Case, Draw, Size, Variant, compiled, grid_of, liger, picks
from mimkernels import channel_attention, squeeze_excite, window_attention
from mimkernels.channel_attention import channel_attention_reference
from mimkernels.costs import cost
from mimkernels.squeeze_excite import squeeze_excite_reference
from mimkernels.window_attention import window_attention_reference

_REDUCTION = 16


def window_attention_case(size: Size, draw: Draw) -> Case:
    """The shifted layer.

    The reference rolls, partitions, and calls fused attention with bias and mask, as Swin's do.
    """
    # Heads of 32 channels where the width has them, windows of 8 on grids that have one.
    heads = max(size.channels // 32, 1)
    grid = grid_of(size.tokens)
    window = 8 if min(grid) >= 8 else 2
    qkv = draw(size.layers * size.pictures, size.slots, *grid, 3 * size.channels)
    table = draw(size.layers * size.experts, (2 * window - 1) ** 2, heads)
    index, _ = picks(size, draw, size.layers)
    shape = {"window": window, "heads": heads}
    op = partial(window_attention, **shape, shift=window // 2, backend="triton")
    return Case(
        "window_attention",
        size,
        [qkv, table, index],
        lambda qkv, table, index: op(qkv, table, index=index),
        partial(window_attention_reference, **shape, shift=(window // 2, window // 2)),
        {"liger": liger()},
        cost(window_attention, qkv, table, **shape, shift=window // 2, index=index),
    )


def channel_attention_case(size: Size, draw: Draw) -> Case:
    """Without a projection, which `expert_combine` multiplies with."""
    return _channel_attention(size, draw, "channel_attention", [])


def projected_channel_attention_case(size: Size, draw: Draw) -> Case:
    """With Restormer's last layer."""
    width = size.channels
    proj = draw(size.layers * size.experts, width, width, scale=width**-0.5)
    return _channel_attention(size, draw, "channel_attention_proj", [proj])


def _channel_attention(size: Size, draw: Draw, name: str, proj: list[Tensor]) -> Case:
    """The reference has its norms and its projection folded into the c×c matrices; Restormer's
    formula as published has not.
    """
    # Heads of 64 channels where the width has them.
    heads = max(size.channels // 64, 1)
    front = (size.layers * size.pictures, size.slots)
    qkv = draw(*front, size.tokens, 3 * size.channels)
    temperature = draw(size.layers * size.experts, heads).exp()
    index, _ = picks(size, draw, size.layers)

    def call(run: Any, qkv: Tensor, temperature: Tensor, index: Tensor, *proj: Tensor) -> Any:
        last = proj[0] if proj else None
        return run(*qkv.chunk(3, dim=-1), temperature, proj=last, index=index, heads=heads)

    def restormer(
        q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, proj: Any, index: Tensor, heads: int
    ) -> Tensor:
        # Heads and channels before tokens, [P,k,h,c,T], as Restormer arranges them.
        q, k, v = (x.unflatten(-1, (heads, -1)).movedim(2, -1) for x in (q, k, v))
        gram = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        attention = (gram * temperature[index][..., None, None]).softmax(dim=-1)
        out = (attention @ v).flatten(2, 3).mT
        return out if proj is None else out @ proj[index].mT

    published = partial(call, restormer)
    return Case(
        name,
        size,
        [qkv, temperature, index, *proj],
        partial(call, partial(channel_attention, backend="triton")),
        partial(call, channel_attention_reference),
        {
            "Restormer's": published,
            "Restormer's, compile": compiled(published, qkv),
            "liger": liger(),
        },
        call(partial(cost, channel_attention), qkv, temperature, index, *proj),
    )


def squeeze_excite_case(size: Size, draw: Draw) -> Case:
    """All slots of a picture scale it once, by the sum of their gates."""
    width, hidden = size.channels, max(size.channels // _REDUCTION, 1)
    pictures, experts = size.layers * size.pictures, size.layers * size.experts
    x = draw(pictures, size.tokens, width) + draw(pictures, 1, width)
    bank = [
        draw(experts, hidden, width, scale=width**-0.5),
        draw(experts, hidden),
        draw(experts, width, hidden, scale=hidden**-0.5),
        draw(experts, width),
    ]
    index, numbers = picks(size, draw, size.layers)
    weight = draw(pictures, size.slots).sigmoid()
    grid = grid_of(size.tokens)

    def kernel(x: Tensor, *rest: Tensor) -> Tensor:
        *bank, index, weight = rest
        return squeeze_excite(x, *bank, index=index, weight=weight, backend="triton")

    def torchvision(module: torch.nn.Module, x: Tensor, *rest: Tensor) -> Tensor:
        """A module for each pick, on a picture in the channels_last format."""
        w1, b1, w2, b2, _, weight = rest
        planes = x.unflatten(1, grid).permute(0, 3, 1, 2)  # [P,C,H,W]
        out = []
        for p, row in enumerate(numbers):
            scaled = []
            for j, e in enumerate(row):
                names = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
                values = (w1[e][:, :, None, None], b1[e], w2[e][:, :, None, None], b2[e])
                picked: dict[str, Tensor] = dict(zip(names, values, strict=True))
                one = torch.func.functional_call(module, picked, (planes[p : p + 1],))
                scaled.append(weight[p, j] * one)
            out.append(sum(scaled[1:], scaled[0]))
        return torch.cat(out).permute(0, 2, 3, 1).flatten(1, 2)

    return Case(
        "squeeze_excite",
        size,
        [x, *bank, index, weight],
        kernel,
        squeeze_excite_reference,
        {"torchvision loop": where_torchvision(torchvision, width, hidden), "liger": liger()},
        cost(squeeze_excite, x, *bank, index=index, weight=weight),
    )


def where_torchvision(run: Any, width: int, hidden: int) -> Variant:
    """`run` with torchvision's module, if it is installed."""
    try:
        from torchvision.ops import SqueezeExcitation
    except ImportError:
        return "not installed"
    # Its parameters are replaced in every call.
    return partial(run, SqueezeExcitation(width, hidden, torch.nn.ReLU))
