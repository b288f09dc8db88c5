"""Cases of the ops that route tokens one by one."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.kernel_cases.base import Case, Draw, Size, liger, where_grouped
from mimkernels import Route, grouped_linear, topk_route
from mimkernels.costs import cost
from mimkernels.grouped_linear import grouped_linear_reference
from mimkernels.topk_route import topk_route_reference


def topk_route_case(size: Size, draw: Draw) -> Case:
    logits = draw(size.pictures * size.tokens, 4 * size.experts)
    k = size.slots
    return Case(
        "topk_route",
        size,
        [logits],
        partial(topk_route, k=k, backend="triton"),
        partial(topk_route_reference, k=k, norm="softmax"),
        {"liger": liger()},
        cost(topk_route, logits, k),
    )


def grouped_linear_case(size: Size, draw: Draw) -> Case:
    """The second layer of a mixture's MLP: sorted rows in, weighted tokens out."""
    tokens = size.pictures * size.tokens
    scores = draw(tokens, size.experts)
    route = topk_route(scores, size.slots, backend="torch")
    x = draw(tokens * size.slots, size.channels)
    weight = draw(size.experts, size.channels, size.channels, scale=size.channels**-0.5)
    bounds = [0, *route.offsets.tolist()]

    def add_up(rows: Tensor, route: Route) -> Tensor:
        slots = rows[route.inverse].unflatten(0, route.experts.shape)
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
        {"cuBLAS loop": loop, "grouped_mm": where_grouped(grouped, x), "liger": liger()},
        cost(grouped_linear, x, weight, route, gather=False, combine=True),
    )
