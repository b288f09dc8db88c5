"""Processes of a run, and tensors that they share.

`accelerate launch` and `torchrun` start them; accelerate says who is who, torch's own wrappers
share the gradients (DDP) or everything (FSDP2), on any device and backend.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from mimdit.transformer import MiMDiTTransformer2DModel
from training.step import FlowStep

T = TypeVar("T")
# How long processes wait for each other: one alone validates, and writes checkpoints, which may be
# large and go to a slow disk.
_PATIENCE = timedelta(hours=2)


class Team:
    """The processes of a run; `sharded`: weights, gradients and optimiser states are divided up."""

    def __init__(self, sharded: bool = False) -> None:
        launched = "LOCAL_RANK" in os.environ
        asked = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
        # Accelerate takes a launch without a GPU for one process unless told.
        cpu = asked or (launched and not torch.cuda.is_available())
        state = PartialState(cpu=cpu, timeout=_PATIENCE)
        assert state.device is not None
        self.device: torch.device = state.device
        self.processes, self.rank = state.num_processes, state.process_index
        self.main = state.is_main_process
        self.sharded = sharded or _asked_for_fsdp()
        if self.sharded and not dist.is_initialized():
            # With --cpu accelerate starts one, however many are asked for.
            raise ValueError(
                "--fsdp: expected several processes (accelerate launch --num_processes N without "
                "--cpu, or torchrun --nproc-per-node N), got one alone"
            )

    def wrap(self, step: FlowStep) -> nn.Module:
        """The module to call; with `sharded` the model's parameters become sharded in place."""
        step.to(self.device)
        if self.sharded:
            for block in step.model.transformer_blocks:
                fully_shard(block)
            fully_shard(step.model)
            for method in ("encode_condition", "pool_condition"):
                register_fsdp_forward_method(step.model, method)
            return step
        if self.processes == 1:
            return step
        # The one changing buffer, the routers' running mean, follows the pictures of all processes.
        return DistributedDataParallel(step, broadcast_buffers=False)

    def accumulating(self, wrapped: nn.Module, last: bool) -> Any:
        """Inside, gradients are shared only in the last pass of a step."""
        if self.sharded:
            assert isinstance(wrapped, FlowStep)
            # fully_shard made the model an FSDPModule.
            wrapped.model.set_requires_gradient_sync(last)  # pyright: ignore[reportCallIssue]
        if isinstance(wrapped, DistributedDataParallel) and not last:
            return wrapped.no_sync()
        return nullcontext()

    @contextmanager
    def gathered(self, model: MiMDiTTransformer2DModel) -> Iterator[None]:
        """Inside, the parameters of a sharded model outside its blocks, which pipelines read before
        they call it, are whole; they must not be changed meanwhile."""
        if not self.sharded:
            yield
            return
        # fully_shard made the model an FSDPModule.
        module: Any = model
        module.unshard()
        try:
            yield
        finally:
            module.reshard()

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over all processes; a new tensor without a gradient."""
        if self.processes == 1:
            return tensor.detach()
        out = tensor.detach().clone()
        dist.all_reduce(out)
        return out / self.processes

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        if self.processes == 1:
            return flag
        found = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(found, dist.ReduceOp.MAX)
        return bool(found)

    def gather(self, value: T) -> list[T]:
        """The values of all processes, in order."""
        if self.processes == 1:
            return [value]
        found: list[Any] = [None] * self.processes
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Until all processes are here."""
        if self.processes > 1:
            dist.barrier()

    def close(self) -> None:
        """Part; needed at the end of a command only."""
        if dist.is_initialized():
            dist.destroy_process_group()


def _asked_for_fsdp() -> bool:
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true", "yes")


def whole(tensor: Tensor) -> Tensor:
    """The full tensor; all processes must ask for a sharded one together."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def like(value: Tensor, example: Tensor) -> Tensor:
    """A full tensor on the device, and with the sharding, of an example."""
    value = value.to(example.device)
    if not isinstance(example, DTensor) or value.shape != example.shape:
        return value
    # Every process has read the same values.
    return distribute_tensor(value, example.device_mesh, example.placements, src_data_rank=None)


@torch.no_grad()
def unsharded(model: MiMDiTTransformer2DModel, sharded: bool) -> MiMDiTTransformer2DModel:
    """The model itself, or one in plain memory of the CPU with the sharded one's weights."""
    if not sharded:
        return model
    state = {name: whole(tensor).cpu() for name, tensor in model.state_dict().items()}
    with torch.device("meta"):
        plain = MiMDiTTransformer2DModel.from_config(model.config)
    plain.load_state_dict(state, assign=True)
    return plain.eval()
