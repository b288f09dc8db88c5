"""What all kernel tests share: the oracle's tolerances, gradients, and a poisoned allocator."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

# The interpreter runs on the CPU, and only it has float64.
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter's bfloat16 arithmetic is not the hardware's.
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
interpreted = pytest.mark.skipif(DEVICE == "cuda", reason="float64 needs the interpreter")

# Error allowed beyond the eager reference's, relative to the oracle's largest value.
FLOOR = {torch.float64: 1e-12, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
# A kernel may round twice as badly as the eager reference; gradients sum more terms.
FACTOR, GRADIENT_FACTOR = 2.0, 3.0


def assert_as_exact_as_eager(
    found: Tensor, eager: Tensor, oracle: Tensor, factor: float = FACTOR
) -> None:
    """The kernel's error against float64 is at most `factor` times the eager reference's."""
    assert found.shape == oracle.shape
    assert found.dtype == eager.dtype
    scale = oracle.detach().abs().max().clamp(min=1e-30) if oracle.numel() else 1.0
    error, eager_error = (
        float((x.detach().double() - oracle.detach()).abs().max() / scale) if x.numel() else 0.0
        for x in (found, eager)
    )
    assert error <= factor * eager_error + FLOOR[found.dtype], (error, eager_error)


def with_gradients(
    run: Callable[..., Tensor], inputs: Sequence[Tensor], seed: int = 7
) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of the floating-point inputs for a random output gradient."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    out = run(*leaves)
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    wanted = [x for x in leaves if x.requires_grad]
    return out, list(torch.autograd.grad(out, wanted, grad))


def compare(
    op: Callable[..., Tensor],
    reference: Callable[..., Tensor],
    inputs: Sequence[Tensor],
) -> None:
    """Forward and all gradients of an op against its reference in float64 and in its own type."""
    found, found_grads = with_gradients(op, inputs)
    eager, eager_grads = with_gradients(reference, inputs)
    exact = [x.double() if x.is_floating_point() else x for x in inputs]
    oracle, oracle_grads = with_gradients(reference, exact)
    assert_as_exact_as_eager(found, eager, oracle)
    for triple in zip(found_grads, eager_grads, oracle_grads, strict=True):
        assert_as_exact_as_eager(*triple, factor=GRADIENT_FACTOR)


@contextmanager
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New uninitialised tensors are NaN: what a kernel leaves out shows."""
    plain = torch.Tensor.new_empty

    def poisoned(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        out = plain(self, *args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(2**30)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", poisoned)
        yield
