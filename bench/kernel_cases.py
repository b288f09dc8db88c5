"""What `bench.kernels` measures: for each op its arguments, its reference and its comparators.

All variants of a case take the same tensors, and run on a CPU, too.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkernels import (
    Route,
    expert_combine,
    expert_depthwise3x3,
    expert_linear,
    grouped_linear,
    image_gate,
    topk_route,
)
from mimkernels.backend import interpreting
from mimkernels.costs import Costs, cost
from mimkernels.expert_combine import expert_combine_reference
from mimkernels.expert_depthwise3x3 import expert_depthwise3x3_reference
from mimkernels.expert_linear import expert_linear_reference
from mimkernels.grouped_linear import grouped_linear_reference
from mimkernels.image_gate import image_gate_reference
from mimkernels.image_gate.reference import gate_reference
from mimkernels.topk_route import topk_route_reference

# Largest error allowed, relative to the largest value of the float64 reference.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
GROUPS = 4
# A call on the case's tensors, or why there is none.
Variant = Callable[..., Any] | str
Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Size:
    """Tokens T and channels C of each of B pictures, which picks k of E experts, in L layers."""

    tokens: int
    channels: int
    experts: int = 4
    slots: int = 2
    layers: int = 24
    pictures: int = 1


FULL = tuple(Size(tokens, channels) for tokens in (1024, 4096) for channels in (384, 1536))
# For checks on a CPU: no size that a tile divides, and more than one picture.
SMALL = tuple(Size(t, c, layers=2, pictures=2) for t, c in ((12, 16), (20, 40)))


@dataclass(frozen=True)
class Case:
    """An op at one size. kernel, reference and comparators are called with `tensors`."""

    op: str
    size: Size
    tensors: list[Tensor]
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    comparators: dict[str, Variant]
    costs: Costs


def make(op: str, size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Case:
    """The case of one op, with random tensors of this type on this device."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    return CASES[op](size, draw)


def variants(case: Case) -> dict[str, Variant]:
    """All that is compared, the kernel first."""
    x = case.tensors[0]
    on_gpu = x.device.type == "cuda"
    kernel: Variant = case.kernel
    if not on_gpu and not interpreting():
        kernel = "needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)"
    elif not on_gpu and x.dtype == torch.bfloat16:
        kernel = "Triton's interpreter has no bfloat16 arithmetic"
    # On a CPU only whether the reference is traced into one graph: code generation takes long.
    compiler = "inductor" if on_gpu else "aot_eager"
    compiled = torch.compile(case.reference, fullgraph=True, dynamic=False, backend=compiler)
    ours: dict[str, Variant] = {"triton": kernel, "eager": case.reference, "compile": compiled}
    return ours | case.comparators


def _picks(size: Size, draw: Draw) -> tuple[Tensor, list[list[int]]]:
    """Different experts for each picture [B,k], also as numbers that the host knows."""
    scores = draw(size.pictures, size.experts).float()
    index = scores.argsort(dim=-1, stable=True)[:, : size.slots].contiguous()
    return index, index.tolist()


def _liger() -> str:
    return "has no such op" if find_spec("liger_kernel") else "not installed"


def _grouped(run: Callable[..., Any], x: Tensor) -> Variant:
    """`run`, or why `grouped_mm` is not compared."""
    if x.device.type == "cpu":
        return run
    if x.dtype != torch.bfloat16:
        return "takes bfloat16 only"
    fast = torch.cuda.get_device_capability(x.device) in ((9, 0), (10, 0))
    return run if fast else "asks the host for the offsets except on sm_90 and sm_100"


def _grouped_product(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """x [B,1,T,K] or [B,k,T,K], weight [E,N,K], index [B,k] → [B,k,T,N] with one grouped product.

    Slots are put in the order of their experts and back on the device.
    """
    slots, tokens = index.shape[1], x.shape[2]
    experts = torch.arange(len(weight), device=index.device)
    counts = (index.flatten()[:, None] == experts).sum(0)
    order = index.flatten().argsort(stable=True)
    source = order if x.shape[1] == slots else order // slots
    rows = x.flatten(0, 1).index_select(0, source).flatten(0, 1)  # [B·k·T,K]
    ends = (counts.cumsum(0) * tokens).int()
    y = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends).unflatten(0, (-1, tokens))
    return y.index_select(0, order.argsort()).unflatten(0, index.shape)


def _image_gate(size: Size, draw: Draw) -> Case:
    routers, front = GROUPS * (1 + size.experts), (size.layers, size.pictures)
    x = draw(*front, size.tokens, size.channels) + draw(*front, 1, size.channels)
    weight = draw(size.layers, routers, size.channels, scale=size.channels**-0.5)
    tensors = [x, weight, draw(size.layers, routers)]
    options: dict[str, Any] = {"groups": GROUPS, "experts": size.experts, "k": size.slots}

    def reference(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        return image_gate_reference(x, weight, bias, **options)

    def one_read(x: Tensor, weight: Tensor, bias: Tensor) -> Any:
        wide = torch.promote_types(x.dtype, torch.float32)
        return gate_reference(x.mean(2, dtype=wide), weight, bias, **options)

    return Case(
        "image_gate",
        size,
        tensors,
        partial(image_gate, **options, backend="triton"),
        reference,
        {"eager, no cast": one_read, "liger": _liger()},
        cost(image_gate, *tensors, **options),
    )


def _expert_linear(size: Size, draw: Draw) -> Case:
    columns = 3 * size.channels
    x = draw(size.pictures, size.tokens, size.channels)
    weight = draw(size.experts, columns, size.channels, scale=size.channels**-0.5)
    index, picks = _picks(size, draw)
    tensors = [x, weight, index, draw(size.experts, columns)]

    def loop(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            parts = [F.linear(x[b], weight[e], bias[e]) for b, row in enumerate(picks) for e in row]
            return torch.stack(parts).unflatten(0, index.shape)
        out = x.new_empty(*index.shape, x.shape[1], weight.shape[1])
        for b, row in enumerate(picks):
            for j, e in enumerate(row):
                torch.addmm(bias[e], x[b], weight[e].t(), out=out[b, j])
        return out

    def grouped(x: Tensor, weight: Tensor, index: Tensor, bias: Tensor) -> Tensor:
        return _grouped_product(x[:, None], weight, index) + bias[index].unsqueeze(2)

    return Case(
        "expert_linear",
        size,
        tensors,
        partial(expert_linear, backend="triton"),
        expert_linear_reference,
        {"cuBLAS loop": loop, "grouped_mm": _grouped(grouped, x), "liger": _liger()},
        cost(expert_linear, *tensors),
    )


def _expert_combine(size: Size, draw: Draw) -> Case:
    width, front = size.channels, (size.pictures, size.slots)
    x = [draw(*front, size.tokens, width) for _ in range(GROUPS)]
    weight = [draw(size.experts, width, width, scale=width**-0.5) for _ in range(GROUPS)]
    chosen = [_picks(size, draw) for _ in range(GROUPS)]
    gate = [draw(*front).sigmoid() for _ in range(GROUPS)]
    bias = [draw(size.experts, width) for _ in range(GROUPS)]
    residual = draw(size.pictures, size.tokens, width)
    index, picks = [index for index, _ in chosen], [numbers for _, numbers in chosen]

    def parts(flat: Sequence[Tensor]) -> list[Sequence[Tensor]]:
        """x, weight, index, gate and bias of all groups."""
        return [flat[i * GROUPS : (i + 1) * GROUPS] for i in range(5)]

    def kernel(*flat: Tensor) -> Tensor:
        *operands, bias = parts(flat)
        return expert_combine(*operands, bias=bias, residual=flat[-1], backend="triton")

    def reference(*flat: Tensor) -> Tensor:
        x, weight, index, gate, bias = parts(flat)
        return expert_combine_reference(x, weight, index, gate, bias, flat[-1])

    def loop(*flat: Tensor) -> Tensor:
        x, weight, index, gate, bias = parts(flat)
        # The product adds in place where no gradient forbids it.
        add = Tensor.addmm if torch.is_grad_enabled() else Tensor.addmm_
        rows = []
        for b, out in enumerate(flat[-1]):
            for bias_i, index_i, gate_i in zip(bias, index, gate, strict=True):
                out = out + gate_i[b] @ bias_i[index_i[b]]
            for x_i, weight_i, gate_i, experts in zip(x, weight, gate, picks, strict=True):
                for s, e in enumerate(experts[b]):
                    out = add(out, x_i[b, s] * gate_i[b, s], weight_i[e].t())
            rows.append(out)
        return torch.stack(rows) if len(rows) > 1 else rows[0].unsqueeze(0)

    def grouped(*flat: Tensor) -> Tensor:
        out = flat[-1]
        for x_i, weight_i, index_i, gate_i, bias_i in zip(*parts(flat), strict=True):
            y = _grouped_product(x_i, weight_i, index_i) + bias_i[index_i].unsqueeze(2)
            out = out + torch.einsum("bs,bstn->btn", gate_i, y)
        return out

    return Case(
        "expert_combine",
        size,
        [*x, *weight, *index, *gate, *bias, residual],
        kernel,
        reference,
        {"cuBLAS loop": loop, "grouped_mm": _grouped(grouped, residual), "liger": _liger()},
        cost(expert_combine, x, weight, index, gate, bias=bias, residual=residual),
    )


def _expert_depthwise3x3(size: Size, draw: Draw) -> Case:
    height = next(n for n in range(isqrt(size.tokens), 0, -1) if size.tokens % n == 0)
    channels = 3 * size.channels
    x = draw(size.pictures, size.slots, height, size.tokens // height, channels)
    index, picks = _picks(size, draw)
    tensors = [x, draw(size.experts, channels, 3, 3, scale=1 / 3), index]

    def loop(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        planes = []
        for b, row in enumerate(picks):
            for j, e in enumerate(row):
                plane = x[b, j : j + 1].permute(0, 3, 1, 2)  # [1,C,H,W], channels last
                planes.append(F.conv2d(plane, weight[e][:, None], padding=1, groups=x.shape[-1]))
        return torch.cat(planes).permute(0, 2, 3, 1).unflatten(0, index.shape)

    # cuDNN would round float32 operands to TF32.
    rounds = x.device.type == "cuda" and x.dtype == torch.float32
    return Case(
        "expert_depthwise3x3",
        size,
        tensors,
        partial(expert_depthwise3x3, backend="triton"),
        expert_depthwise3x3_reference,
        {"cuDNN loop": "cuDNN takes TF32 for float32" if rounds else loop, "liger": _liger()},
        cost(expert_depthwise3x3, *tensors),
    )


def _topk_route(size: Size, draw: Draw) -> Case:
    logits = draw(size.pictures * size.tokens, 4 * size.experts)
    k = size.slots
    return Case(
        "topk_route",
        size,
        [logits],
        partial(topk_route, k=k, backend="triton"),
        partial(topk_route_reference, k=k, norm="softmax"),
        {"liger": _liger()},
        cost(topk_route, logits, k),
    )


def _grouped_linear(size: Size, draw: Draw) -> Case:
    """The second layer of a mixture's MLP: sorted rows in, weighted tokens out."""
    tokens = size.pictures * size.tokens
    scores = draw(tokens, size.experts)
    route = topk_route(scores, size.slots, backend="torch")
    x = draw(tokens * size.slots, size.channels)
    weight = draw(size.experts, size.channels, size.channels, scale=size.channels**-0.5)
    bounds = [0, *route.offsets.tolist()]

    def add_up(rows: Tensor, route: Route) -> Tensor:
        slots = rows[route.inverse].unflatten(0, route.index.shape)
        return torch.einsum("nk,nkm->nm", route.weights.to(rows.dtype), slots)

    def loop(x: Tensor, weight: Tensor, *route: Tensor) -> Tensor:
        ranges = zip(bounds[:-1], bounds[1:], weight, strict=True)
        return add_up(torch.cat([x[a:b] @ w.t() for a, b, w in ranges]), Route(*route))

    def grouped(x: Tensor, weight: Tensor, *route: Tensor) -> Tensor:
        to = Route(*route)
        return add_up(F.grouped_mm(x, weight.transpose(1, 2), offs=to.offsets), to)

    def call(op: Callable[..., Tensor], **options: Any) -> Callable[..., Tensor]:
        def run(x: Tensor, weight: Tensor, *route: Tensor) -> Tensor:
            return op(x, weight, Route(*route), gather=False, combine=True, **options)

        return run

    return Case(
        "grouped_linear",
        size,
        [x, weight, *route],
        call(grouped_linear, backend="triton"),
        call(grouped_linear_reference),
        {"cuBLAS loop": loop, "grouped_mm": _grouped(grouped, x), "liger": _liger()},
        cost(grouped_linear, x, weight, route, gather=False, combine=True),
    )


CASES: dict[str, Callable[[Size, Draw], Case]] = {
    "image_gate": _image_gate,
    "expert_linear": _expert_linear,
    "expert_combine": _expert_combine,
    "expert_depthwise3x3": _expert_depthwise3x3,
    "topk_route": _topk_route,
    "grouped_linear": _grouped_linear,
}
