"""Cases of the ops of the mixture inside the mixture, routed by picture."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernel_cases.base import (
    Case,
    Draw,
    Size,
    grid_of,
    grouped_product,
    liger,
    where_grouped,
)
from bench.kernel_cases.base import picks as picks_of
from mimkernels import expert_combine, expert_depthwise3x3, expert_linear, image_gate
from mimkernels.costs import cost
from mimkernels.expert_combine import expert_combine_reference
from mimkernels.expert_depthwise3x3 import expert_depthwise3x3_reference
from mimkernels.expert_linear import expert_linear_reference
from mimkernels.image_gate import image_gate_reference
from mimkernels.image_gate.reference import gate_reference

GROUPS = 4


def image_gate_case(size: Size, draw: Draw) -> Case:
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
        {"eager, no cast": one_read, "liger": liger()},
        cost(image_gate, *tensors, **options),
    )


def expert_linear_case(size: Size, draw: Draw) -> Case:
    columns = 3 * size.channels
    x = draw(size.pictures, size.tokens, size.channels)
    weight = draw(size.experts, columns, size.channels, scale=size.channels**-0.5)
    index, picks = picks_of(size, draw)
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
        return grouped_product(x[:, None], weight, index) + bias[index].unsqueeze(2)

    return Case(
        "expert_linear",
        size,
        tensors,
        partial(expert_linear, backend="triton"),
        expert_linear_reference,
        {"cuBLAS loop": loop, "grouped_mm": where_grouped(grouped, x), "liger": liger()},
        cost(expert_linear, *tensors),
    )


def expert_combine_case(size: Size, draw: Draw) -> Case:
    width, front = size.channels, (size.pictures, size.slots)
    x = [draw(*front, size.tokens, width) for _ in range(GROUPS)]
    weight = [draw(size.experts, width, width, scale=width**-0.5) for _ in range(GROUPS)]
    chosen = [picks_of(size, draw) for _ in range(GROUPS)]
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
            y = grouped_product(x_i, weight_i, index_i) + bias_i[index_i].unsqueeze(2)
            out = out + torch.einsum("bs,bstn->btn", gate_i, y)
        return out

    return Case(
        "expert_combine",
        size,
        [*x, *weight, *index, *gate, *bias, residual],
        kernel,
        reference,
        {"cuBLAS loop": loop, "grouped_mm": where_grouped(grouped, residual), "liger": liger()},
        cost(expert_combine, x, weight, index, gate, bias=bias, residual=residual),
    )


def expert_depthwise3x3_case(size: Size, draw: Draw) -> Case:
    channels = 3 * size.channels
    x = draw(size.pictures, size.slots, *grid_of(size.tokens), channels)
    index, picks = picks_of(size, draw)
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
        {"cuDNN loop": "cuDNN takes TF32 for float32" if rounds else loop, "liger": liger()},
        cost(expert_depthwise3x3, *tensors),
    )
