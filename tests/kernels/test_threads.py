"""What one thread asks of the ops is not what the others get."""

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial

import pytest
import torch

from mimkernels import expert_linear, use_backend
from mimkernels.expert_linear import expert_linear_reference
from mimkernels.explain import recorded
from mimkernels.launch import record
from tests.kernels.common import DEVICE, interpreted


def inputs() -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(2, 9, 16, generator=g), torch.randn(3, 8, 16, generator=g)
    return [v.to(DEVICE) for v in (x, weight, torch.tensor([[0, 2], [1, 1]]))]


def test_kernels_run_while_another_thread_records_launches() -> None:
    args = inputs()
    wanted = expert_linear(*args, backend="triton")
    with ThreadPoolExecutor(1) as other:
        with record() as launches:
            found = other.submit(expert_linear, *args, backend="triton").result()
        assert torch.equal(found, wanted) and not launches
        with recorded("sm_90") as launches:
            # By its own choice: on the CPU the reference.
            chosen = other.submit(expert_linear, *args).result()
        assert not launches
    assert torch.equal(chosen, expert_linear(*args))


@interpreted
def test_threads_may_leave_use_backend_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    args = inputs()
    monkeypatch.delenv("TRITON_INTERPRET")

    refused = partial(pytest.raises, ValueError, match="backend: 'triton' cannot run here")
    first, second = ExitStack(), ExitStack()
    first.enter_context(use_backend("torch"))
    second.enter_context(use_backend("triton"))
    with refused():
        expert_linear(*args)
    first.close()
    with refused():
        expert_linear(*args)
    second.close()
    assert torch.equal(expert_linear(*args), expert_linear_reference(*args))


@interpreted
def test_the_backend_of_compiled_functions() -> None:
    """Chosen around them and inside, with no graph breaks."""
    args, chosen = inputs(), []

    def run(*args: torch.Tensor) -> torch.Tensor:
        return expert_linear(*args)

    def run_inside(*args: torch.Tensor) -> torch.Tensor:
        with use_backend("triton"):
            return expert_linear(*args)

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        chosen.append(any("mimkernels" in str(n.target) for n in graph.graph.nodes))
        return graph

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    for name in ("triton", "torch", "triton", "torch"):
        with use_backend(name):
            compiled(*args)
    assert chosen == [True, False]
    torch.compile(run_inside, fullgraph=True, backend=backend)(*args)
    assert chosen == [True, False, True]
