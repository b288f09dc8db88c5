"""The engine: conditioning once, resident buffers, fused pieces, one CUDA graph per shape."""

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn

from mimdit.condition import Condition
from mimdit.engine.checks import check_model, state_of
from mimdit.engine.first_block import Kept, Parts, threshold_of
from mimdit.engine.graphed import Graphed
from mimdit.engine.keys import KeysAndValues
from mimdit.engine.linears import FusedLinear
from mimdit.engine.modes import kept
from mimdit.engine.modulation import Modulator, Table
from mimdit.engine.plan import Plan, plan
from mimdit.engine.run import Run
from mimdit.engine.step import Block, Joint, Layer, normalise_output, run_blocks, unpatchify
from mimdit.engine.workspace import KeyValueCondition, Shape, Turns, Workspace, make_buffers
from mimdit.errors import first_line
from mimdit.memory import ran_out
from mimdit.mim import Routing
from mimdit.quantized import (
    KINDS,
    QuantizedLinear,
    check_quantization,
    quantizable,
    quantized_mixtures,
)
from mimdit.transformer import MiMDiTTransformer2DModel


class Engine:
    """Runs the steps of one transformer; options as of `accelerate`."""

    # How a block runs, how its layers with one input do, and whether blocks share the product that
    # makes keys and values of the conditioning.
    block: type[Block] = Block
    join: Callable[[Sequence[nn.Module]], Layer] = FusedLinear
    together: bool = True

    def __init__(
        self,
        model: MiMDiTTransformer2DModel,
        graph: bool | None = None,
        shapes: int = 4,
        *,
        compile: bool = False,
        quantize: str | None = None,
        first_block_cache: Any = None,
    ) -> None:
        if shapes < 1:
            raise ValueError(f"shapes: expected at least 1, got {shapes}")
        self.model, self.graph, self.shapes = model, graph, shapes
        self.compile, self.quantize = compile, quantize
        self.threshold = None if first_block_cache is None else threshold_of(first_block_cache)
        if self.threshold is not None and len(model.transformer_blocks) < 2:
            raise ValueError("first_block_cache: expected a model of two blocks or more, got one")
        self._start()
        self._prepare()

    def _start(self) -> None:
        self.workspaces: OrderedDict[Shape, Workspace] = OrderedDict()
        self._run = Run()
        # Steps of several threads share the buffers.
        self._lock, self._turns = threading.RLock(), Turns()
        self._prepared: tuple[Any, ...] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies of the model, in memory or pickled: no buffers and graphs."""
        names = ("model", "graph", "shapes", "compile", "quantize", "threshold")
        return {name: getattr(self, name) for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The model need not be complete yet.
        self.__dict__.update(state)
        self._start()

    @kept()
    def _prepare(self) -> None:
        """Take the model's layers as they are now."""
        check_model(self.model)
        self.workspaces.clear()
        if self.quantize is not None:
            check_quantization(self.quantize, self.model.device)
            self._mixtures = quantized_mixtures(self.model.mim, KINDS[self.quantize])
        modules = [cast(JointTransformerBlock, block) for block in self.model.transformer_blocks]
        self.blocks = [self.block(block, self._joined, self._alone) for block in modules]
        self._keys_and_values = KeysAndValues(self.blocks, self.together)
        self.modulator = Modulator(self.model)
        self._prepared = state_of(self.model, self.quantize is not None)

    def _joined(self, layers: Sequence[nn.Module]) -> Layer:
        """Layers with one input, as one product."""
        if self.quantize is not None and all(map(quantizable, layers)):
            return QuantizedLinear(layers, KINDS[self.quantize])
        return type(self).join(layers)

    def _alone(self, layer: nn.Module) -> Layer:
        if self.quantize is not None and quantizable(layer):
            return QuantizedLinear([layer], KINDS[self.quantize])
        return layer

    def _refresh(self) -> None:
        if state_of(self.model, self.quantize is not None) != self._prepared:
            self._prepare()

    def mixtures(
        self, z: Tensor, grid: tuple[int, int], layers: slice, routing: Routing | None = None
    ) -> tuple[Tensor, Routing]:
        """As the model's `mim`."""
        if self.quantize is None:
            return self.model.mim(z, grid, layers, routing)
        with self._lock:
            self._refresh()
            run = self._mixtures
        return run(z, grid, layers, routing)

    def condition(self, given: Condition) -> KeyValueCondition:
        """Keys and values of a condition's tokens, which are needed no more."""
        with self._lock:
            self._refresh()
            pairs = self._keys_and_values(given.tokens)
        return KeyValueCondition(given.latents, (), given.routing, pairs)

    def plan(
        self,
        latents: tuple[int, ...],
        steps: int = 40,
        device: str = "H200",
        text_tokens: int | None = None,
    ) -> Plan:
        """As `mimdit.engine.plan`, for this model; print it."""
        return plan(self.model, latents, steps, device, text_tokens)

    def prepare(self, timesteps: Tensor, pooled: Tensor | Sequence[Tensor] | None = None) -> None:
        """Compute the modulations of all steps at `timesteps` [S] together.

        The adaptive norms' weights, a quarter of SD3.5's, are then read once and not in every step.
        Holds for this thread's calls with these tensors of pooled text, [1,P] for any number of
        pictures or [B,P], by default the stored prompt's, until the next `prepare` or `release`.
        Calls with other texts compute their own, and those at other times do on a CPU; on a GPU,
        which would have to be waited for, they give NaN.
        """
        with self._lock:
            self._refresh()
        texts = self.model.prompt()[1] if pooled is None else pooled
        texts, run = [texts] if isinstance(texts, Tensor) else texts, self._run
        # Where modulations depend on the picture, too, there is no table.
        known = self.model.condition_embedder is None
        run.tables = [Table(self.modulator, timesteps, p) for p in texts] if known else []
        run.prepared = self._prepared

    @contextmanager
    def steps(self, timesteps: Tensor, pooled: list[Tensor]) -> Iterator[None]:
        """Inside, all times are among `timesteps` [S] and pooled texts among these, [1,P] each.

        As `prepare`, and nothing is kept behind it.
        """
        self.prepare(timesteps, pooled)
        try:
            with self._run.cache.run():
                yield
        finally:
            self._run.tables = []

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
        # Conditions were encoded by the weights as they are.
        if self._prepared is None or condition is None:
            with self._lock:
                self._refresh()
        if condition is not None and not isinstance(condition, KeyValueCondition):
            condition = self.condition(condition)
        kind = hidden_states.device.type
        casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        shape = Shape(
            len(hidden_states),
            grid,
            encoder_hidden_states.shape[1],
            condition.pairs[0].shape[4] if condition is not None else 0,
            torch.get_autocast_dtype(kind) if casts else hidden_states.dtype,
            hidden_states.device,
        )
        timestep = timestep.expand(len(hidden_states))
        table = self._run.table(self._prepared, timestep, pooled_projections)
        flat = table(timestep) if table else self.modulator.embed(timestep, pooled_projections)
        x = model.pos_embed(hidden_states).contiguous()
        text = model.context_embedder(encoder_hidden_states)
        kept = ()
        if self.threshold is not None:
            given = (encoder_hidden_states, pooled_projections)
            kept = (self._kept(shape, x, timestep, condition, given),)
        with self._lock, self._turns.of(shape.device):
            out = self._stepped(shape, condition, x, flat, text, *kept)
        return unpatchify(model, out, grid)

    def release(self) -> None:
        """Give back buffers and graphs; the next call makes new ones."""
        with self._lock:
            self.workspaces.clear()
        self._run.forget()

    @property
    def skipped(self) -> int:
        """Steps of this thread's last run that left out all blocks but the first."""
        return self._run.cache.skipped

    def _kept(
        self,
        shape: Shape,
        x: Tensor,
        timestep: Tensor,
        condition: Condition | None,
        given: tuple[Tensor, ...],
    ) -> Kept:
        """What the cache holds of this picture and branch of guidance."""
        if condition is not None:
            routing = condition.routing
            given = (condition.latents, *given, routing.inter, routing.intra, routing.index)
        return self._run.cache.find(shape, x, timestep, given)

    def _stepped(self, shape: Shape, condition: KeyValueCondition | None, *given: Any) -> Tensor:
        """Output tokens; where memory runs out, other shapes give up their buffers and graphs."""
        try:
            workspace = self._workspace(shape)
            workspace.load(condition)
            return workspace.run(*given)
        except (RuntimeError, MemoryError) as error:
            if not self.workspaces.keys() - {shape} or not ran_out(error):
                raise
            reason = first_line(error)
        # Outside the handler, which keeps the tensors of the failed call alive.
        self.workspaces.clear()
        if shape.device.type == "cuda":
            torch.cuda.empty_cache()
        warnings.warn(f"{reason}; trying again without what other sizes kept", stacklevel=2)
        return self._stepped(shape, condition, *given)

    def _workspace(self, shape: Shape) -> Workspace:
        """The workspace of a shape, made now or used before."""
        if shape not in self.workspaces:
            while len(self.workspaces) >= self.shapes:
                self.workspaces.popitem(last=False)
            attn: Any = self.blocks[0].attn
            width = self.model.inner_dim // attn.heads
            buffers = make_buffers(shape, len(self.blocks), attn.heads, width)
            graphed = shape.device.type == "cuda" if self.graph is None else self.graph
            if graphed and shape.device.type != "cuda":
                raise ValueError(f"graph: expected a CUDA device, got {shape.device}")
            run = self._runner(shape, buffers.joint, graphed)
            self.workspaces[shape] = Workspace(shape, buffers, run)
        self.workspaces.move_to_end(shape)
        return self.workspaces[shape]

    def _runner(self, shape: Shape, joint: list[Joint], graphed: bool) -> Callable[..., Any]:
        """A step over these buffers: compiled, captured, or as it is."""

        def made(function: Callable[..., Any], joint: list[Joint]) -> Callable[..., Any]:
            run = partial(function, joint=joint)
            if self.compile:
                run = torch.compile(run, dynamic=False, fullgraph=True)
            return Graphed(run, shape.device) if graphed else run

        if self.threshold is None:
            return made(self._step, joint)
        head, tail = made(self._head, joint), made(self._tail, joint)
        return Parts(head, tail, made(self._out, joint), self.threshold)

    def _step(self, x: Tensor, flat: Tensor, text: Tensor, joint: list[Joint]) -> Tensor:
        h = run_blocks(self.blocks, x, text, self.modulator.split(flat), joint)[2]
        return self.model.proj_out(h)

    def _head(self, x: Tensor, flat: Tensor, text: Tensor, joint: list[Joint]) -> Any:
        modulation = self.modulator.split(flat)
        return run_blocks(self.blocks, x, text, modulation, joint, range(1))[:2]

    def _tail(self, x: Tensor, flat: Tensor, text: Tensor, joint: list[Joint]) -> Tensor:
        modulation, others = self.modulator.split(flat), range(1, len(self.blocks))
        return run_blocks(self.blocks, x, text, modulation, joint, others)[0]

    def _out(self, x: Tensor, flat: Tensor, joint: list[Joint]) -> Tensor:
        del joint
        return self.model.proj_out(normalise_output(x, self.modulator.split(flat)))
