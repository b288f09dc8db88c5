"""The engine: conditioning once, resident buffers, fused pieces, one CUDA graph per shape."""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor

from mimdit.attention import MiMJointAttnProcessor
from mimdit.condition import Condition
from mimdit.engine.modulation import Modulator, Table
from mimdit.engine.step import Block, run_blocks, unpatchify
from mimdit.engine.workspace import KeyValueCondition, Shape, Workspace, make_joint
from mimdit.transformer import MiMDiTTransformer2DModel

T = TypeVar("T")


def accelerate(target: T, *, enabled: bool = True, graph: bool | None = None, shapes: int = 4) -> T:
    """Make a pipeline or transformer faster, in place; its results stay the same up to rounding.

    Calls with gradients, and calls with `joint_attention_kwargs`, run the reference as before.

    Args:
        target: a `MiMDiTPipeline` or a `MiMDiTTransformer2DModel`.
        enabled: False gives the reference back.
        graph: capture each shape in a CUDA graph; by default where there is a GPU.
        shapes: how many shapes to keep buffers and graphs of; the least recently used one goes.

    Returns:
        `target`.

    Raises:
        TypeError: not a pipeline or transformer of this package.
        ValueError: attention processors that the engine does not know, weights that are moved in
            and out during a call (sequential offload), or a graph without a GPU.
    """
    model = getattr(target, "transformer", target)
    if not isinstance(model, MiMDiTTransformer2DModel):
        expected = "a MiMDiTPipeline or a MiMDiTTransformer2DModel"
        raise TypeError(f"target: expected {expected}, got {type(target).__name__}")
    model.engine = Engine(model, graph, shapes) if enabled else None
    return target


class Engine:
    """What `accelerate` attaches to a transformer."""

    def __init__(
        self, model: MiMDiTTransformer2DModel, graph: bool | None = None, shapes: int = 4
    ) -> None:
        if shapes < 1:
            raise ValueError(f"shapes: expected at least 1, got {shapes}")
        self.model, self.graph, self.shapes = model, graph, shapes
        self.workspaces: OrderedDict[Shape, Workspace] = OrderedDict()
        self._tables: dict[int, Table] = {}
        self._prepare()

    def _prepare(self) -> None:
        """Take the model's layers as they are now."""
        _check_blocks(self.model)
        self.workspaces.clear()
        modules = [cast(JointTransformerBlock, block) for block in self.model.transformer_blocks]
        self.blocks = [Block(block) for block in modules]
        self.modulator = Modulator(self.model)
        self._prepared = self._state()

    def _state(self) -> tuple[Any, ...]:
        """Changes when weights are moved or replaced, and when LoRAs come, go or are rescaled."""
        adapters = [
            (str(part.scaling), str(part.active_adapters), part.merged)
            for part in self.model.modules()
            if hasattr(part, "scaling") and hasattr(part, "active_adapters")
        ]
        return (*(p.data_ptr() for p in self.model.parameters()), *adapters)

    def _refresh(self) -> None:
        if self._state() != self._prepared:
            self._prepare()

    def condition(self, given: Condition) -> KeyValueCondition:
        """Keys and values of a condition's tokens, which are needed no more."""
        self._refresh()
        pairs = [b.keys_and_values(m) for b, m in zip(self.blocks, given.tokens, strict=True)]
        keys, values = zip(*pairs, strict=True)
        return KeyValueCondition(given.latents, (), given.routing, keys, values)

    @contextmanager
    def steps(self, timesteps: Tensor, pooled: list[Tensor]) -> Iterator[None]:
        """Inside, all times are among `timesteps` [S] and pooled texts among these, [1,P] each.

        Their modulations are computed together beforehand: the adaptive norms' weights, a quarter
        of SD3.5's, are then read once and not in every step.
        """
        self._refresh()
        if self.model.condition_embedder is not None:
            # Modulations depend on the picture, too.
            yield
            return
        tables = [Table(self.modulator, timesteps, p) for p in pooled]
        self._tables = {table.pointer: table for table in tables}
        try:
            yield
        finally:
            self._tables = {}

    def predict(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        condition: Condition | None,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
    ) -> Tensor:
        """As `MiMDiTTransformer2DModel.predict`."""
        model, grid = self.model, self.model.grid(hidden_states)
        if condition is not None and not isinstance(condition, KeyValueCondition):
            condition = self.condition(condition)
        kind = hidden_states.device.type
        cast_ = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        shape = Shape(
            len(hidden_states),
            grid,
            encoder_hidden_states.shape[1],
            condition.keys[0].shape[2] if condition is not None else 0,
            cast_ or hidden_states.dtype,
            hidden_states.device,
        )
        workspace = self._workspace(shape)
        workspace.load(condition)
        table = self._tables.get(pooled_projections.data_ptr())
        timestep = timestep.expand(len(hidden_states))
        flat = table(timestep) if table else self.modulator.embed(timestep, pooled_projections)
        x = model.pos_embed(hidden_states).contiguous()
        text = model.context_embedder(encoder_hidden_states)
        return unpatchify(model, workspace(x, flat, text), grid)

    def release(self) -> None:
        """Give back buffers and graphs; the next call makes new ones."""
        self.workspaces.clear()

    def _workspace(self, shape: Shape) -> Workspace:
        """The workspace of a shape, made now or used before."""
        if shape not in self.workspaces:
            while len(self.workspaces) >= self.shapes:
                self.workspaces.popitem(last=False)
            attn: Any = self.blocks[0].attn
            width = self.model.inner_dim // attn.heads
            joint = make_joint(shape, len(self.blocks), attn.heads, width)
            graphed = shape.device.type == "cuda" if self.graph is None else self.graph
            if graphed and shape.device.type != "cuda":
                raise ValueError(f"graph: expected a CUDA device, got {shape.device}")
            self.workspaces[shape] = Workspace(shape, self._step, joint, graphed)
        self.workspaces.move_to_end(shape)
        return self.workspaces[shape]

    def _step(self, x: Tensor, flat: Tensor, text: Tensor, joint: list[Any]) -> Tensor:
        h = run_blocks(self.blocks, x, text, self.modulator.split(flat), joint)
        return self.model.proj_out(h)


def _check_blocks(model: MiMDiTTransformer2DModel) -> None:
    for name, processor in model.attn_processors.items():
        joint = name.endswith(".attn.processor")
        if joint and not isinstance(processor, MiMJointAttnProcessor):
            raise ValueError(f"{name}: expected this package's own, got {type(processor).__name__}")
    hooked = [name for name, part in model.named_modules() if name and hasattr(part, "_hf_hook")]
    if hooked:
        raise ValueError(
            f"weights: expected all in one place, but accelerate moves {hooked[0]} in and out (use "
            "model offload instead of sequential offload)"
        )
