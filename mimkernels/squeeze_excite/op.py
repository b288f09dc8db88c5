"""`squeeze_excite`: channels scaled by what two small layers read off their means."""

from typing import Any

import torch
from torch import Tensor

from mimkernels.autocast import autocast
from mimkernels.backend import runs_triton
from mimkernels.checks import check_device, check_float, check_index, check_like, check_shape
from mimkernels.gradients import kernel_backward
from mimkernels.registry import kernel_op
from mimkernels.squeeze_excite.reference import ACTIVATIONS, GATES, squeeze_excite_reference


def squeeze_excite(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    *,
    activation: str = "relu",
    gate: str = "sigmoid",
    index: Tensor | None = None,
    weight: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """x ⊙ s, s = gate(W2·act(W1·mean(x) + b1) + b2) (squeeze-and-excitation, arXiv 1709.01507).

    With index, x ⊙ Σ_j weight_j·s_j over the experts that a picture picked.

    Args:
        x: [B,T,C]; the mean is that of the T tokens.
        w1, b1: [R,C] and [R], the layer down to R channels; with index banks [E,R,C] and [E,R].
        w2, b2: [C,R] and [C], the layer back; with index [E,C,R] and [E,C].
        activation: "relu" or "silu". gate: "sigmoid" or "hardsigmoid".
        index: [B,k] int32 or int64. weight: [B,k], by default 1; its type may differ from that of
            x.
        backend: see `mimkernels.backend`.

    Returns:
        [B,T,C] in the type of x; means, layers and gates are float32 or wider.

    Raises:
        ValueError: shapes, types, devices or strides that do not fit, an unknown activation or
            gate; on the CPU also an index that is no expert's number.
    """
    x, w1, b1, w2, b2 = autocast(x, w1, b1, w2, b2)
    for name, known, value in (("activation", ACTIVATIONS, activation), ("gate", GATES, gate)):
        if value not in known:
            raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")
    _check(x, w1, b1, w2, b2, index, weight)
    bank = (w1, b1, w2, b2)
    if not runs_triton(backend, x):
        return squeeze_excite_reference(x, *bank, index, weight, activation=activation, gate=gate)
    if index is None:
        bank = tuple(v.unsqueeze(0) for v in bank)
    return _SqueezeExcite.apply(x, *bank, index, weight, activation, gate)


def _check(
    x: Tensor,
    w1: Tensor,
    b1: Tensor,
    w2: Tensor,
    b2: Tensor,
    index: Tensor | None,
    weight: Tensor | None,
) -> None:
    check_shape("x", x, (None, None, None))
    check_float("x", x)
    front = () if index is None else (None,)
    check_shape("w1", w1, (*front, None, x.shape[2]))
    *front, hidden, channels = w1.shape
    if not hidden:
        raise ValueError(f"w1: expected at least 1 hidden channel, got shape {list(w1.shape)}")
    check_shape("b1", b1, (*front, hidden))
    check_shape("w2", w2, (*front, channels, hidden))
    check_shape("b2", b2, (*front, channels))
    for name, v in (("w1", w1), ("b1", b1), ("w2", w2), ("b2", b2)):
        check_like(name, v, "x", x)
        check_float(name, v)
    if index is not None:
        check_shape("index", index, (x.shape[0], None))
        check_device("index", index, "x", x)
        check_index("index", index, front[0])
    if weight is not None:
        if index is None:
            raise ValueError("index: expected together with weight, got None")
        check_shape("weight", weight, index.shape)
        check_float("weight", weight)
        check_device("weight", weight, "x", x)


class _SqueezeExcite(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor,
        w2: Tensor,
        b2: Tensor,
        index: Tensor | None,
        weight: Tensor | None,
        activation: str,
        gate: str,
    ) -> Tensor:
        bank = (w1, b1, w2, b2)
        out, *saved = _forward(x, *bank, index, weight, activation, gate)
        ctx.save_for_backward(x, *bank, index, weight, *saved)
        ctx.activation, ctx.gate = activation, gate
        return out

    @staticmethod
    @kernel_backward
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Between the two passes over tokens a few products of [B,k,C]: not worth a kernel."""
        x, w1, b1, w2, b2, index, weight, mean, scale, before_act, before_gate = ctx.saved_tensors
        dscale = _backward_scale(grad, x)
        gated, slope = _gate(ctx.gate, before_gate)  # [B,k,C]
        dgate, dweight = dscale.unsqueeze(1), None
        if weight is not None:
            dweight = (dgate * gated).sum(-1).to(weight.dtype)
            dgate = dgate * weight.to(dscale).unsqueeze(-1)
        dgate = dgate * slope
        if index is None:
            index = torch.zeros(len(x), 1, dtype=torch.int32, device=x.device)
        hidden, slope = _activation(ctx.activation, before_act)  # [B,k,R]
        dhidden = torch.einsum("bkc,bkcr->bkr", dgate, w2[index].to(dgate)) * slope
        experts = torch.arange(len(w1), device=index.device)
        hit = (index.flatten() == experts[:, None]).unsqueeze(-1)  # [E,B·k,1]
        dgate_e, hidden_e, dhidden_e, mean_e = (
            torch.where(hit, v.flatten(0, 1), 0)
            for v in (dgate, hidden, dhidden, mean.unsqueeze(1).expand(-1, index.shape[1], -1))
        )
        dx = None
        if ctx.needs_input_grad[0]:
            dmean = torch.einsum("bkr,bkrc->bc", dhidden, w1[index].to(dhidden))
            dx = _rescale(grad, scale, dmean / max(x.shape[1], 1))
        return (
            dx,
            (dhidden_e.transpose(1, 2) @ mean_e).to(w1.dtype),
            dhidden_e.sum(1).to(b1.dtype),
            (dgate_e.transpose(1, 2) @ hidden_e).to(w2.dtype),
            dgate_e.sum(1).to(b2.dtype),
            None,
            dweight,
            None,
            None,
        )


def _activation(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """act(z) and its derivative."""
    if name == "relu":
        return z.relu(), (z > 0).to(z)
    s = z.sigmoid()
    return z * s, s * (1 + z * (1 - s))


def _gate(name: str, z: Tensor) -> tuple[Tensor, Tensor]:
    """gate(z) and its derivative."""
    if name == "sigmoid":
        s = z.sigmoid()
        return s, s * (1 - s)
    return GATES[name](z), (z.abs() < 3).to(z) / 6


def _launch_forward(*arguments: Any) -> tuple[Tensor, ...]:
    from mimkernels.squeeze_excite import kernel

    return kernel.forward(*arguments)


def _launch_backward_scale(grad: Tensor, x: Tensor) -> Tensor:
    from mimkernels.squeeze_excite import kernel

    return kernel.backward_scale(_dense(grad), x)


def _launch_rescale(grad: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    from mimkernels.squeeze_excite import kernel

    return kernel.rescale(_dense(grad), scale, shift.contiguous())


def _dense(grad: Tensor) -> Tensor:
    """Expanded gradients (of a sum, say) have strides of zero."""
    return grad if grad.stride(-1) == 1 else grad.contiguous()


def _fake_forward(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, index: Tensor | None, *_: Any
) -> tuple[Tensor, ...]:
    wide = torch.promote_types(x.dtype, torch.float32)
    slots = 1 if index is None else index.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape[0], x.shape[2], dtype=wide),
        x.new_empty(x.shape[0], x.shape[2], dtype=wide),
        x.new_empty(x.shape[0], slots, w1.shape[1], dtype=wide),
        x.new_empty(x.shape[0], slots, x.shape[2], dtype=wide),
    )


_forward = kernel_op(
    "squeeze_excite(Tensor x, Tensor w1, Tensor b1, Tensor w2, Tensor b2, Tensor? index, "
    "Tensor? weight, str activation, str gate) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _launch_forward,
    _fake_forward,
)
_backward_scale = kernel_op(
    "squeeze_excite_backward_scale(Tensor grad, Tensor x) -> Tensor",
    _launch_backward_scale,
    lambda grad, x: x.new_empty(
        x.shape[0], x.shape[2], dtype=torch.promote_types(x.dtype, torch.float32)
    ),
)
_rescale = kernel_op(
    "squeeze_excite_rescale(Tensor x, Tensor scale, Tensor shift) -> Tensor",
    _launch_rescale,
    lambda x, scale, shift: x.new_empty(x.shape),
)
