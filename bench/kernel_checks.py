"""Whether a variant of `bench.kernels` computes what the reference does in float64."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

# Torch is imported where it is used: `python -m bench.kernels --help` is quick.
if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from bench.kernel_cases import Case


def forward(
    run: Callable[..., Any], tensors: "Sequence[Tensor]", _: "Sequence[Tensor]"
) -> "list[Tensor]":
    """All outputs of a call."""
    import torch

    with torch.no_grad():
        return _listed(run(*tensors))


def gradients(
    run: Callable[..., Any], tensors: "Sequence[Tensor]", grads: "Sequence[Tensor]"
) -> "list[Tensor]":
    """Gradients of all floating-point inputs, given those of all floating-point outputs."""
    import torch

    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in tensors]
    out = [y for y in _listed(run(*leaves)) if y.is_floating_point()]
    return list(torch.autograd.grad(out, [x for x in leaves if x.requires_grad], grads))


PASSES: "dict[str, Callable[..., list[Tensor]]]" = {
    "forward": forward,
    "forward+backward": gradients,
}


def oracle(case: "Case") -> "tuple[list[Tensor], dict[str, list[Tensor]]]":
    """Gradients of the outputs to go back from, and each pass's results, in float64.

    The gradient is the output itself, as of ½‖y‖²: no sum over it cancels out. Where a GPU has no
    memory for it, which is several times that of the case, the CPU computes it.
    """
    import torch

    device = case.tensors[0].device
    try:
        return _oracle(case, device)
    except torch.OutOfMemoryError:
        if device.type == "cpu":
            raise
    torch.cuda.empty_cache()
    return _oracle(case, torch.device("cpu"))


def _oracle(case: "Case", device: "torch.device") -> "tuple[list[Tensor], dict[str, list[Tensor]]]":
    """`oracle`, computed on this device."""
    own = case.tensors[0].device
    placed = [x.to(device) for x in case.tensors]
    exact = [x.double() if x.is_floating_point() else x for x in placed]
    wanted = forward(case.reference, exact, [])
    pairs = zip(wanted, forward(case.reference, case.tensors, []), strict=True)
    grads = [y.to(own, plain.dtype) for y, plain in pairs if y.is_floating_point()]
    back = gradients(case.reference, exact, [y.to(device).double() for y in grads])
    found = {"forward": wanted, "forward+backward": back}
    return grads, {name: [x.to(own) for x in some] for name, some in found.items()}


def difference(found: "Sequence[Tensor]", wanted: "Sequence[Tensor]") -> float:
    """The largest error, relative to each tensor's largest value; integers must be equal."""
    worst = 0.0
    for x, exact in zip(found, wanted, strict=True):
        if x.shape != exact.shape:
            return float("inf")
        if exact.is_floating_point():
            scale = exact.abs().max().clamp(min=1e-30)
            error = float((x.double() - exact).abs().max() / scale)
        else:
            error = 0.0 if bool((x == exact).all()) else float("inf")
        # NaN compares with nothing; it must not pass.
        worst = max(worst, error) if error == error else float("inf")
    return worst


def _listed(out: Any) -> list[Any]:
    return list(out) if isinstance(out, (tuple, list)) else [out]
