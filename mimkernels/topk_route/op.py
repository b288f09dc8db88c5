"""`topk_route`: each token's k experts, and its rows sorted by expert, without a sort."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimkernels.backend import runs_triton
from mimkernels.checks import check_float
from mimkernels.gradients import kernel_backward
from mimkernels.registry import kernel_op
from mimkernels.topk_route.reference import NORMS, topk_route_reference

# A token's logits are one block in registers.
MAX_EXPERTS = 1024


class Route(NamedTuple):
    """Where N tokens go with k picks each; a slot is one pick, number token·k + pick.

    weights [N,k] (float32 or wider) and experts [N,k]: of the picks, the largest first.
    counts [E]: slots of each expert; offsets [E]: their cumulative sums, where each expert's rows
    end. permutation [N·k]: the slot in each row of the order sorted by expert, then by slot;
    inverse [N·k]: the row of each slot. All but weights are int32.
    """

    weights: Tensor
    experts: Tensor
    counts: Tensor
    offsets: Tensor
    permutation: Tensor
    inverse: Tensor


def topk_route(
    logits: Tensor, k: int, *, norm: str = "softmax", backend: str | None = None
) -> Route:
    """Route tokens to their k best experts.

    Args:
        logits: [N,E].
        k: picks of a token, 1…E; equal logits go to the lowest index.
        norm: weights are "softmax" over all experts, as they are; "topk": over the k picks;
            "sigmoid" of each logit.
        backend: see `mimkernels.backend`. The kernel takes at most 1024 experts.

    Raises:
        ValueError: shapes, types or strides that do not fit, k not in 1…E, an unknown norm.
    """
    if logits.ndim != 2:
        raise ValueError(f"logits: expected shape [N, E], got {list(logits.shape)}")
    check_float("logits", logits)
    if not 1 <= k <= logits.shape[1]:
        raise ValueError(f"k: expected 1 to {logits.shape[1]} (the experts), got {k}")
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, got {norm!r}")
    experts, lack = logits.shape[1], None
    if experts > MAX_EXPERTS:
        lack = f"the kernel expected at most {MAX_EXPERTS} experts, got {experts}"
    if not runs_triton(backend, logits, lack):
        return Route(*topk_route_reference(logits, k, norm))
    return Route(*_TopkRoute.apply(logits, k, norm))


class _TopkRoute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, k: int, norm: str) -> tuple[Tensor, ...]:
        weights, *places = _forward(logits, k, norm)
        ctx.save_for_backward(logits, weights, places[0])
        ctx.norm = norm
        ctx.mark_non_differentiable(*places)
        return weights, *places

    @staticmethod
    @kernel_backward
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dweights: Tensor, *_: Tensor
    ) -> tuple[Tensor | None, ...]:
        logits, weights, index = ctx.saved_tensors
        return _backward(logits, weights, index, dweights, ctx.norm), None, None


def _launch_forward(logits: Tensor, k: int, norm: str) -> tuple[Tensor, ...]:
    from mimkernels.topk_route import kernel

    return kernel.forward(logits, k, norm)


def _launch_backward(*arguments: Any) -> Tensor:
    from mimkernels.topk_route import kernel

    return kernel.backward(*arguments)


def _fake(logits: Tensor, k: int, norm: str) -> tuple[Tensor, ...]:
    tokens, experts = logits.shape
    return (
        logits.new_empty(tokens, k, dtype=torch.promote_types(logits.dtype, torch.float32)),
        logits.new_empty(tokens, k, dtype=torch.int32),
        *(logits.new_empty(experts, dtype=torch.int32) for _ in range(2)),
        *(logits.new_empty(tokens * k, dtype=torch.int32) for _ in range(2)),
    )


_forward = kernel_op(
    "topk_route(Tensor logits, int k, str norm) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake,
)
_backward = kernel_op(
    "topk_route_backward(Tensor logits, Tensor weights, Tensor index, Tensor dweights, str norm) "
    "-> Tensor",
    _launch_backward,
    lambda logits, weights, index, dweights, norm: logits.new_empty(logits.shape),
)
