"""No op waits for the device, in forward or backward, and every op can be exported."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mimkernels import layernorm_modulate
from mimkernels.backend import noting_launches
from mimkernels.explain import recorded, without_data
from tests.kernels.calls import NAMES, calls, tensors
from tests.kernels.common import interpreted

aten = torch.ops.aten
# Their results have values, or shapes, that only the device knows.
WAITING = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.is_nonzero, aten.equal}


class NoWaiting(TorchDispatchMode):
    """Fails on a copy from the device to the host, and on what needs a value on the host."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        came = {x.device.type for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        left = {x.device.type for x in tree_leaves(out) if isinstance(x, Tensor)}
        assert func.overloadpacket not in WAITING, func
        assert not ("cuda" in came and "cpu" in left), f"{func} copies to the host"
        assert came != {"cpu", "cuda"} or func.overloadpacket != aten.copy_, f"{func} copies"
        return out


@pytest.mark.parametrize("name", NAMES)
def test_forward_does_not_wait_for_the_device(name: str) -> None:
    with FakeTensorMode(), noting_launches(), NoWaiting(), torch.no_grad():
        op, arguments = calls("cuda")[name]
        op(*arguments)


@pytest.mark.parametrize("name", NAMES)
def test_launches_and_gradients_need_no_data(name: str) -> None:
    """Tensors on "meta" have none: to wait for it, or to copy it, raises."""
    op, arguments = calls("cpu")[name]
    leaves = [without_data(x).requires_grad_(x.is_floating_point()) for x in arguments]
    with recorded("sm_90") as launches:
        out = [x for x in tensors(op(*leaves)) if x.is_floating_point()]
        forward = len(launches)
        torch.autograd.grad(out, [x for x in leaves if x.requires_grad], out, allow_unused=True)
    assert forward > 0
    # The routers' gradients are a few small products of torch's.
    assert len(launches) > forward or name == "image_gate"


def test_batches_that_no_grid_holds() -> None:
    """CUDA's own error, an invalid argument, would not say which."""
    x, shift = torch.empty(65_536, 1, 8, device="meta"), torch.empty(1, 8, device="meta")
    sentence = r"batch: expected at most 65535 pictures .*, got a grid of \[1, 65536\]"
    with recorded("sm_90") as launches:
        layernorm_modulate(x[1:], shift, shift)
        with pytest.raises(ValueError, match=sentence):
            layernorm_modulate(x, shift, shift)
    assert len(launches) == 1


WAITS = {
    "cpu": lambda x: x.cpu(),
    "item": lambda x: x.sum().item(),
    "mask": lambda x: x[x > 0],
    "copy": lambda x: torch.empty(4).copy_(x),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS.keys())
def test_waiting_is_found(wait: Any) -> None:
    with pytest.raises((AssertionError, RuntimeError)), FakeTensorMode(), NoWaiting():
        wait(torch.randn(4, device="cuda"))
    with pytest.raises(RuntimeError):
        wait(torch.randn(4, device="meta"))


@interpreted
@pytest.mark.parametrize("name", NAMES)
def test_exported_program_calls_the_kernels(name: str) -> None:
    op, arguments = calls("cpu")[name]

    class Module(torch.nn.Module):
        def forward(self, *arguments: Tensor) -> Any:
            return op(*arguments)

    program = torch.export.export(Module(), tuple(arguments))
    called = [str(node.target) for node in program.graph.nodes]
    assert any(target.startswith("mimkernels.") for target in called)
    found = tensors(program.module()(*arguments))
    for a, b in zip(found, tensors(op(*arguments)), strict=True):
        assert torch.equal(a, b)
