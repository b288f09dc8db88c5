"""`channel_attention`: attention between the channels of a head, over all tokens."""

from typing import Any

import torch
from torch import Tensor

from mimkernels.autocast import autocast
from mimkernels.backend import runs_triton
from mimkernels.channel_attention.reference import channel_attention_reference
from mimkernels.checks import check_device, check_float, check_index, check_like, check_shape
from mimkernels.gradients import kernel_backward
from mimkernels.registry import kernel_op

# The widest head whose c×c matrices fit into registers.
MAX_HEAD = 64


def channel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    *,
    heads: int,
    proj: Tensor | None = None,
    index: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Restormer's transposed attention (MDTA, arXiv 2111.09881, Eq. 1): v·Aᵀ, A = softmax(τ·q̂ᵀk̂).

    q̂ and k̂ have channels of unit length over the tokens; A is c×c for each head of c channels.

    Args:
        q, k, v: [B,T,C], or [B,S,T,C] for S slots of every picture; chunks of one [..,T,3C] need no
            copy. Channels in the order (heads, head width).
        temperature: [heads], or a bank [E,heads]; its type may differ from that of q.
        heads: a divisor of C; heads are at most 64 wide.
        proj: [C,C], or a bank [E,C,C]: the output projection, as in `F.linear`. It is multiplied
            with A first, so it costs no pass of its own.
        index: [B] or [B,S] int32 or int64: what each picture or slot takes of the banks.
        backend: see `mimkernels.backend`.

    Returns:
        The shape and type of q.

    Raises:
        ValueError: shapes, types, devices or strides that do not fit; on the CPU also an index
            that is no expert's number.
    """
    q, k, v, proj = autocast(q, k, v, proj)
    _check(q, k, v, temperature, heads, proj, index)
    if not runs_triton(backend, q):
        return channel_attention_reference(q, k, v, temperature, proj, index, heads=heads)
    slotted = q.ndim == 4
    if not slotted:
        q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    if index is None:
        temperature, proj = temperature[None], proj if proj is None else proj[None]
    elif not slotted:
        index = index.unsqueeze(1)
    out = _ChannelAttention.apply(q, k, v, temperature, proj, index, heads)
    return out if slotted else out.squeeze(1)


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    temperature: Tensor,
    heads: int,
    proj: Tensor | None,
    index: Tensor | None,
) -> None:
    if q.ndim not in (3, 4):
        raise ValueError(f"q: expected [B,T,C] or [B,S,T,C], got {list(q.shape)}")
    check_float("q", q)
    for name, x in (("k", k), ("v", v)):
        check_shape(name, x, q.shape)
        check_like(name, x, "q", q)
        check_float(name, x)
    channels = q.shape[-1]
    if heads < 1 or channels == 0 or channels % heads:
        raise ValueError(f"heads: expected a divisor of {channels} (q's last axis), got {heads}")
    if channels > heads * MAX_HEAD:
        raise ValueError(f"heads: expected heads of at most {MAX_HEAD}, got {channels // heads}")
    bank = () if index is None else (None,)
    check_shape("temperature", temperature, (*bank, heads))
    check_float("temperature", temperature)
    check_device("temperature", temperature, "q", q)
    bank = temperature.shape[:-1]
    if proj is not None:
        check_shape("proj", proj, (*bank, channels, channels))
        check_like("proj", proj, "q", q)
        check_float("proj", proj)
    if index is not None:
        check_shape("index", index, q.shape[:-2])
        check_device("index", index, "q", q)
        check_index("index", index, bank[0])


class _ChannelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        temperature: Tensor,
        proj: Tensor | None,
        index: Tensor | None,
        heads: int,
    ) -> Tensor:
        out, *saved = _forward(q, k, v, temperature, proj, index, heads)
        ctx.save_for_backward(q, k, v, temperature, proj, index, *saved)
        ctx.heads = heads
        return out

    @staticmethod
    @kernel_backward
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        saved, needed = ctx.saved_tensors, ctx.needs_input_grad
        dq, dk, dv, dslots, dproj = _backward(grad, *saved, ctx.heads, needed[4])
        dtemperature = None
        if needed[3]:
            dtemperature = _sum_by_expert(dslots, saved[5], len(saved[3])).to(saved[3].dtype)
        return dq, dk, dv, dtemperature, dproj if needed[4] else None, None, None


def _sum_by_expert(x: Tensor, index: Tensor | None, experts: int) -> Tensor:
    """x [B,S,heads] → [E,heads], in an order that repeats; too small to be worth a kernel."""
    if index is None:
        return x.sum((0, 1))[None]
    numbers = torch.arange(experts, device=index.device)
    hit = index.unsqueeze(-1) == numbers  # [B,S,E]
    return torch.where(hit.unsqueeze(-1), x.unsqueeze(-2), 0).sum((0, 1))


def _launch_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from mimkernels.channel_attention import kernel

    return kernel.forward(*arguments)


def _launch_backward(grad: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from mimkernels.channel_attention import kernel

    # Expanded gradients (of a sum, say) have strides of zero.
    return kernel.backward(grad if grad.stride(-1) == 1 else grad.contiguous(), *arguments)


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, proj: Any, index: Any, heads: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head, wide = q.shape[3] // heads, torch.promote_types(q.dtype, torch.float32)
    front = (*q.shape[:2], heads)
    return (
        q.new_empty(q.shape),
        q.new_empty(*front, head, head),
        q.new_empty(*front, head, head, dtype=wide),
        q.new_empty(*front, 2, head, dtype=wide),
    )


def _fake_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, proj: Tensor | None,
    index: Any, attention: Tensor, similarity: Tensor, norms: Tensor, heads: int, with_proj: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return (
        q.new_empty(q.shape),
        q.new_empty(q.shape),
        q.new_empty(q.shape),
        norms.new_empty(*q.shape[:2], heads),
        q.new_empty(proj.shape if proj is not None and with_proj else 0),
    )


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor temperature, Tensor? proj, Tensor? index"
_forward = kernel_op(
    f"channel_attention({_INPUTS}, int heads) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_backward = kernel_op(
    f"channel_attention_backward(Tensor grad, {_INPUTS}, Tensor attention, Tensor similarity, "
    "Tensor norms, int heads, bool with_proj) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_backward,
    _fake_backward,
)
