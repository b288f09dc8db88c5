"""The least that a call of an op costs: the one place that counts its FLOPs and bytes.

Bytes are those of the inputs, read once, and of the outputs, written once; a bank's experts count
as far as a call can pick them (the picks of one picture differ). FLOPs are multiplications and
additions of what the formula sums, without softmaxes and the like.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mimkernels.topk_route import Route


@dataclass(frozen=True)
class Cost:
    """FLOPs and bytes moved."""

    flops: int
    bytes: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def floor(self, peak: float, bandwidth: float) -> float:
        """Seconds that nothing can be faster than, at this many FLOP/s and bytes/s."""
        return max(self.flops / peak, self.bytes / bandwidth)


@dataclass(frozen=True)
class Costs:
    """A call and its gradients for all floating-point inputs."""

    forward: Cost
    backward: Cost


def cost(op: Callable[..., Any], *arguments: Any, **options: Any) -> Costs:
    """The costs of `op(*arguments, **options)`; tensors need no data (device "meta").

    Raises:
        ValueError: an op that is not in `COSTS`.
        TypeError: arguments that are not the op's.
    """
    count = COSTS[name_of(op)]
    given = inspect.signature(op).bind(*arguments, **options)
    given.apply_defaults()
    return count(**{k: v for k, v in given.arguments.items() if k != "backend"})


def name_of(op: Callable[..., Any]) -> str:
    """The name of an op, if it is one whose costs are known."""
    name = getattr(op, "__name__", str(op))
    if name not in COSTS:
        raise ValueError(f"op: expected one of {', '.join(COSTS)}, got {name}")
    return name


def image_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    experts: int,
    k: int,
    renormalize: bool,
) -> Costs:
    """x [(L,)B,T,C], weight [(L,)G+G·E,C]; the gradient of x is one row a picture, expanded."""
    means, channels = prod(x.shape[:-2]), x.shape[-1]
    wide = torch.promote_types(x.dtype, torch.float32).itemsize
    product = 2 * means * (groups + groups * experts) * channels
    routers = _read(weight) + _read(bias)
    out = means * groups * (wide + k * (wide + torch.int32.itemsize))
    forward = Cost(means * x.shape[-2] * channels + product, _read(x) + routers + out)
    rows = means * channels * (wide + x.element_size())
    return Costs(forward, Cost(2 * product, out + rows + 2 * routers))


def expert_linear(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor | None) -> Costs:
    """x [B,T,K] or [B,k,T,K], weight [E,N,K], index [B,k]."""
    columns, inner = weight.shape[1:]
    flops = 2 * index.numel() * x.shape[-2] * inner * columns
    out = index.numel() * x.shape[-2] * columns * x.element_size()
    read = _read(x) + _picked(weight, index) + _read(index)
    forward = Cost(flops, read + _picked(bias, index) + out)
    gradients = _whole(x) + _whole(weight) + _whole(bias)
    return Costs(forward, Cost(2 * flops, out + read + gradients))


def expert_combine(
    x: Tensor | Sequence[Tensor],
    weight: Tensor | Sequence[Tensor],
    index: Tensor | Sequence[Tensor],
    gate: Tensor | Sequence[Tensor],
    bias: Tensor | Sequence[Tensor | None] | None,
    residual: Tensor | None,
) -> Costs:
    """x [B,S,T,K], weight [E,N,K], index and gate [B,S], one or a sequence of each."""
    groups = [[v] if isinstance(v, Tensor) else list(v) for v in (x, weight, index, gate)]
    count = len(groups[0])
    biases = [bias] if isinstance(bias, Tensor) else list(bias or [None] * count)
    first, columns = groups[0][0], groups[1][0].shape[1]
    out = first.shape[0] * first.shape[2] * columns * first.element_size()
    forward, backward = Cost(0, _read(residual) + out), Cost(0, out)
    for x_i, weight_i, index_i, gate_i, bias_i in zip(*groups, biases, strict=True):
        flops = 2 * prod(x_i.shape) * columns
        read = _read(x_i) + _picked(weight_i, index_i) + _picked(bias_i, index_i)
        read += _read(index_i) + _read(gate_i)
        gradients = _whole(x_i) + _whole(weight_i) + _whole(bias_i) + _whole(gate_i)
        # The gradient of the residual is that of the output itself.
        forward += Cost(flops, read)
        backward += Cost(2 * flops, read + gradients)
    return Costs(forward, backward)


def expert_depthwise3x3(x: Tensor, weight: Tensor, index: Tensor) -> Costs:
    """x [B,k,H,W,C], weight [E,C,3,3], index [B,k]."""
    flops = 2 * 9 * x.numel()
    read = _read(x) + _picked(weight, index) + _read(index)
    forward = Cost(flops, read + _whole(x))
    return Costs(forward, Cost(2 * flops, _whole(x) + read + _whole(x) + _whole(weight)))


def topk_route(logits: Tensor, k: int, norm: str) -> Costs:
    """logits [N,E]; weights and four kinds of int32 places go out."""
    tokens, experts = logits.shape
    wide = torch.promote_types(logits.dtype, torch.float32).itemsize
    picked = tokens * k * (wide + torch.int32.itemsize)
    places = (2 * experts + 2 * tokens * k) * torch.int32.itemsize
    read = _read(logits) if norm == "softmax" else 0
    gradients = tokens * k * wide + picked + read + _whole(logits)
    return Costs(Cost(0, _read(logits) + picked + places), Cost(0, gradients))


def grouped_linear(
    x: Tensor, weight: Tensor, route: "Route", bias: Tensor | None, gather: bool, combine: bool
) -> Costs:
    """x [N,K] or [N·k,K], weight [E,M,K]; every expert may be picked."""
    (tokens, slots), (columns, inner) = route.experts.shape, weight.shape[1:]
    flops = 2 * tokens * slots * columns * inner
    out = tokens * (1 if combine else slots) * columns * x.element_size()
    read = _read(x) + _read(weight) + _read(route.permutation) + _read(route.offsets)
    read += _read(route.weights) if combine else 0
    gradients = _whole(x) + _whole(weight) + _whole(bias)
    gradients += _whole(route.weights) if combine else 0
    return Costs(Cost(flops, read + _read(bias) + out), Cost(2 * flops, out + read + gradients))


def layernorm_modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    shift2: Tensor | None,
    scale2: Tensor | None,
    eps: float,
) -> Costs:
    """x [B,T,C] in, one or two of its size out."""
    pairs = (shift, scale, None, None, shift2, scale2)
    return gated_residual_layernorm_modulate(x, None, None, *pairs, eps)


def gated_residual_layernorm_modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    y2: Tensor | None,
    gate2: Tensor | None,
    shift2: Tensor | None,
    scale2: Tensor | None,
    eps: float,
) -> Costs:
    """x, y (and y2) [B,T,C] in; the new x (unless y is None) and one or two outputs."""
    small = (y, y2, gate, gate2, shift, scale, shift2, scale2)
    out = _whole(x) * ((y is not None) + (1 if scale2 is None else 2))
    read = _read(x) + sum(_read(v) for v in small)
    again = read - _read(shift) - _read(shift2)
    gradients = _whole(x) + sum(_whole(v) for v in small)
    return Costs(Cost(0, read + out), Cost(0, out + again + gradients))


def joint_qkv(
    qkvs: Sequence[Tensor],
    q_norm_weights: Sequence[Tensor | None] | None,
    k_norm_weights: Sequence[Tensor | None] | None,
    heads: int,
    eps: float,
) -> Costs:
    """Each stream [B,T,3·h·d], or [B,T,2·h·d] without queries, is read and written once."""
    none, inner = [None] * len(qkvs), max(x.shape[2] for x in qkvs) // 3
    forward = backward = 0
    for x, *weights in zip(qkvs, q_norm_weights or none, k_norm_weights or none, strict=True):
        parts, small = x.shape[2] // inner, sum(_read(w) for w in weights)
        normed = sum(w is not None for w in weights[3 - parts :])
        forward += _read(x) + _whole(x) + small
        backward += 2 * _whole(x) + _read(x) * normed // parts + 2 * small
    return Costs(Cost(0, forward), Cost(0, backward))


def window_attention(
    qkv: Tensor,
    table: Tensor,
    window: int,
    heads: int,
    shift: int | tuple[int, int],
    scale: float | None,
    index: Tensor | None,
    pad_value: Tensor | None,
    roll_first: bool,
) -> Costs:
    """qkv [B,(k,)H,W,3C]; every token has M² keys."""
    flops, out = 4 * qkv.numel() // 3 * window**2, _whole(qkv) // 3
    tables = _read(table) if index is None else _picked(table, index) + _read(index)
    read = _read(qkv) + tables + _read(pad_value)
    gradients = _whole(qkv) + _whole(table) + _whole(pad_value)
    return Costs(Cost(flops, read + out), Cost(5 * flops // 2, out + read + gradients))


def channel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    heads: int,
    proj: Tensor | None,
    index: Tensor | None,
) -> Costs:
    """q, k, v [B,T,C] or [B,S,T,C]; a projection is multiplied with A, and then takes its place."""
    slots, (tokens, channels) = prod(q.shape[:-2]), q.shape[-2:]
    gram = 2 * slots * tokens * channels * channels // heads
    flops, banks = 2 * gram, (temperature, proj)
    if proj is not None:
        flops = gram + 2 * slots * channels**2 * (channels // heads + tokens)
    read = _read(q) + _read(k) + _read(v) + _read(index)
    read += sum(_read(w) if index is None else _picked(w, index) for w in banks)
    gradients = 3 * _whole(q) + sum(_whole(w) for w in banks)
    forward = Cost(flops, read + _whole(q))
    return Costs(forward, Cost(2 * flops, _whole(q) + read + gradients))


def squeeze_excite(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    activation: str,
    gate: str,
    index: Tensor | None,
    weight: Tensor | None,
) -> Costs:
    """x [B,T,C], w1 [R,C] and w2 [C,R], or banks of them; x need not be read twice."""
    slots = len(x) if index is None else index.numel()
    layers, banks = 4 * slots * prod(w1.shape[-2:]), (w1, b1, w2, b2)
    read = _read(x) + _read(index) + _read(weight)
    read += sum(_read(w) if index is None else _picked(w, index) for w in banks)
    gradients = _whole(x) + _whole(weight) + sum(_whole(w) for w in banks)
    forward = Cost(2 * x.numel() + layers, read + _whole(x))
    backward = Cost(4 * x.numel() + 2 * layers, _whole(x) + read + gradients)
    return Costs(forward, backward)


COSTS: dict[str, Callable[..., Costs]] = {
    count.__name__: count
    for count in (
        image_gate,
        topk_route,
        expert_linear,
        expert_combine,
        expert_depthwise3x3,
        grouped_linear,
        layernorm_modulate,
        gated_residual_layernorm_modulate,
        joint_qkv,
        window_attention,
        channel_attention,
        squeeze_excite,
    )
}


def _read(x: Tensor | None) -> int:
    """Bytes in memory: an expanded axis repeats the same ones."""
    if x is None or x.numel() == 0:
        return 0
    sizes = zip(x.shape, x.stride(), strict=True)
    return prod(size for size, stride in sizes if stride) * x.element_size()


def _whole(x: Tensor | None) -> int:
    return 0 if x is None else x.numel() * x.element_size()


def _picked(bank: Tensor | None, index: Tensor) -> int:
    """Bytes of as many experts [E,…] of a bank as `index` can pick."""
    if bank is None or not len(bank):
        return 0
    return _read(bank) * min(len(bank), index.numel()) // len(bank)
