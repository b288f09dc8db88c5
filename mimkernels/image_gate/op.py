"""`image_gate`: all routers of a picture, of all layers at once."""

from typing import Any

import torch
from torch import Tensor

from mimkernels.backend import runs_triton
from mimkernels.checks import check_device, check_float, check_shape
from mimkernels.gradients import kernel_backward
from mimkernels.image_gate.reference import image_gate_reference
from mimkernels.registry import kernel_op


def image_gate(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    groups: int,
    experts: int,
    k: int,
    renormalize: bool = False,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of G groups of experts, and the k sub-experts picked in each, by the mean token.

    Args:
        x: [B,T,C], or [L,B,T,C] for the routers of L layers.
        weight: [G + G·E, C] (with L in front for layers): the router over groups, then one over the
            sub-experts of each group.
        bias: [G + G·E] likewise; minus weight·μ centres the mean token on μ.
        renormalize: let the k chosen weights sum to one.
        backend: see `mimkernels.backend`.

    Returns:
        inter [B,G], intra [B,G,k] (softmax weights, float32 or wider) and index [B,G,k] int32, in
        descending order, equal weights by ascending index; with L in front for layers.

    Raises:
        ValueError: shapes, types, devices or strides that do not fit, no tokens or groups, or k not
            in 1…E.
    """
    layered = x.ndim == 4
    if x.ndim not in (3, 4) or x.shape[-2] == 0:
        raise ValueError(f"x: expected [B,T,C] or [L,B,T,C] with tokens, got {list(x.shape)}")
    check_float("x", x)
    if groups < 1:
        raise ValueError(f"groups: expected 1 or more, got {groups}")
    front = x.shape[:1] if layered else ()
    routers = groups + groups * experts
    check_shape("weight", weight, (*front, routers, x.shape[-1]))
    check_float("weight", weight)
    check_device("weight", weight, "x", x)
    if bias is not None:
        check_shape("bias", bias, (*front, routers))
        check_float("bias", bias)
        check_device("bias", bias, "x", x)
    if not 1 <= k <= experts:
        raise ValueError(f"k: expected 1 to {experts} (the sub-experts of a group), got {k}")
    if not layered:
        x, weight = x.unsqueeze(0), weight.unsqueeze(0)
        bias = bias if bias is None else bias.unsqueeze(0)
    options = (groups, experts, k, renormalize)
    if runs_triton(backend, x):
        out = _ImageGate.apply(x, weight, bias, *options)
    else:
        out = image_gate_reference(x, weight, bias, *options)
    inter, intra, index = out
    return (inter, intra, index) if layered else (inter[0], intra[0], index[0])


class _ImageGate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        groups: int,
        experts: int,
        k: int,
        renormalize: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inter, intra, index, mean = _forward(x, weight, bias, groups, experts, k, renormalize)
        ctx.save_for_backward(weight, bias, mean, inter, intra, index)
        ctx.shape, ctx.dtype, ctx.options = x.shape, x.dtype, (groups, experts, renormalize)
        ctx.mark_non_differentiable(index)
        return inter, intra, index

    @staticmethod
    @kernel_backward
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dinter: Tensor, dintra: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        """A few products of [L,B,G+G·E]: nothing here is worth a kernel."""
        weight, bias, mean, inter, intra, index = ctx.saved_tensors
        groups, experts, renormalize = ctx.options
        logits = torch.einsum("lbc,lrc->lbr", mean, weight.to(mean))
        if bias is not None:
            logits = logits + bias.to(mean).unsqueeze(1)
        p = logits[..., groups:].unflatten(-1, (groups, experts)).softmax(-1)
        places = index.long()
        if renormalize:
            whole = p.gather(-1, places).sum(-1, keepdim=True)
            dintra = (dintra - (dintra * intra).sum(-1, keepdim=True)) / whole
        dp = torch.zeros_like(p).scatter(-1, places, dintra)
        dlogits = torch.cat(
            [_through_softmax(inter, dinter), _through_softmax(p, dp).flatten(-2)], dim=-1
        )
        dweight = torch.einsum("lbr,lbc->lrc", dlogits, mean).to(weight.dtype)
        dbias = dlogits.sum(1).to(bias.dtype) if bias is not None else None
        dmean = torch.einsum("lbr,lrc->lbc", dlogits, weight.to(mean)) / ctx.shape[2]
        dx = dmean.to(ctx.dtype).unsqueeze(2).expand(ctx.shape)
        return dx, dweight, dbias, None, None, None, None


def _through_softmax(p: Tensor, dp: Tensor) -> Tensor:
    return p * (dp - (p * dp).sum(-1, keepdim=True))


def _launch(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mimkernels.image_gate import kernel

    return kernel.forward(*arguments)


def _fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    experts: int,
    k: int,
    renormalize: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    front, wide = x.shape[:2], torch.promote_types(x.dtype, torch.float32)
    return (
        x.new_empty(*front, groups, dtype=wide),
        x.new_empty(*front, groups, k, dtype=wide),
        x.new_empty(*front, groups, k, dtype=torch.int32),
        x.new_empty(*front, x.shape[3], dtype=wide),
    )


_forward = kernel_op(
    "image_gate(Tensor x, Tensor weight, Tensor? bias, int groups, int experts, int k, "
    "bool renormalize) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch,
    _fake,
)
