"""The model in other runtimes: ONNX Runtime, and TensorRT or TensorRT-RTX on a GPU."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from export.engines import Target, build_engine, gpu
from export.graphs import Conditioner, Denoiser, Graph, traceable
from export.libraries import ExportError, library
from export.limits import Limits
from export.onnx_export import export_onnx
from export.sessions import EngineSession, Session
from mimdit.condition import Condition
from mimdit.errors import first_line
from mimdit.mim import Routing
from mimdit.transformer import MiMDiTTransformer2DModel

Calls = tuple[Callable[[Tensor], Condition], Callable[[Tensor, Tensor, Condition], Tensor]]


class LeftOutError(RuntimeError):
    """Why a variant cannot run here, in one sentence."""


class Encoder(Conditioner):
    """z_lq → tokens and pooled, routed by itself."""

    name, outputs = "encoder", ("tokens", "pooled")
    axes: ClassVar = {"z_lq": Conditioner.axes["z_lq"]}

    def example(self, batch: int, rows: int, columns: int) -> dict[str, Tensor]:
        return {"z_lq": self.latents(batch, rows, columns)}

    # Fewer inputs than the graph that it stands for.
    def forward(self, z_lq: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = self.model.encode_condition(z_lq)
        return torch.stack(found.tokens).float(), found.routing.pooled.float()


class Network(Denoiser):
    """The denoiser without the arithmetic around it: what the network reads → raw output."""

    name, outputs = "network", ("output",)
    axes: ClassVar = {name: axes for name, axes in Denoiser.axes.items() if name != "z_lq"}

    def example(self, batch: int, rows: int, columns: int) -> dict[str, Tensor]:
        found = super().example(batch, rows, columns)
        return {name: found[name] for name in self.axes}

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x_t: Tensor,
        timestep: Tensor,
        tokens: Tensor,
        pooled: Tensor,
        text: Tensor,
        pooled_text: Tensor,
    ) -> Tensor:
        model, unread = self.model, cast(Tensor, None)
        condition = Condition(
            x_t, tokens.to(model.dtype).unbind(), Routing(unread, unread, unread, pooled)
        )
        x = x_t.to(model.dtype)
        return model.predict(x, timestep, condition, text, pooled_text).float()


def onnxruntime(model: MiMDiTTransformer2DModel, like: Tensor) -> Calls:
    """(encode, step) of ONNX files in ONNX Runtime, on the device of the model.

    Raises:
        LeftOutError: no onnx or onnxruntime, no provider for this device, or a model that it
            cannot run.
    """

    def load(path: Path, graph: Graph, limits: Limits) -> Callable[..., Any]:
        del graph, limits
        return Session(path, model.device.type, torch.get_num_threads())

    return _calls(model, like, load, ("onnx", "onnxscript", "onnxruntime"))


def tensorrt(model: MiMDiTTransformer2DModel, like: Tensor) -> Calls:
    """(encode, step) of the same files in TensorRT, or else TensorRT-RTX.

    Raises:
        LeftOutError: no GPU, neither package, or a model that they cannot build.
    """
    if model.device.type != "cuda":
        raise LeftOutError(f"it needs a GPU, and the model is on {model.device}")
    found: list[str] = []
    for name in ("tensorrt", "tensorrt_rtx"):
        try:
            library(name)
            found.append(name)
        except ExportError:
            continue
    if not found:
        raise LeftOutError("neither tensorrt nor tensorrt_rtx can be imported")
    name = found[0]

    def load(path: Path, graph: Graph, limits: Limits) -> Callable[..., Any]:
        here = gpu()
        assert here is not None
        # Only TensorRT-RTX builds for a GPU by its number.
        capabilities = (here["capability"],) if name == "tensorrt_rtx" else ()
        target = Target(name, capabilities)
        engine = build_engine(path.parent, graph, limits, limits.side[1], target)
        return EngineSession(path.parent / engine.file, name)

    return _calls(model, like, load, ("onnx", "onnxscript"))


def _calls(
    model: MiMDiTTransformer2DModel,
    like: Tensor,
    load: Callable[[Path, Graph, Limits], Callable[..., Any]],
    packages: tuple[str, ...],
) -> Calls:
    patch, batch = model.config["patch_size"], len(like)
    side = like.shape[-1] // patch
    limits = Limits((batch, batch), (side, side))
    pipe = cast(Any, SimpleNamespace(transformer=model, vae=None))
    try:
        for name in packages:
            library(name)
        graphs = [Encoder(model).eval(), Network(model).eval()]
        with tempfile.TemporaryDirectory() as folder:
            for graph in graphs:
                with torch.device(model.device), traceable(pipe, batch * side**2, batch):
                    export_onnx(graph, Path(folder), limits)
            encoder, network = (load(Path(folder) / f"{g.name}.onnx", g, limits) for g in graphs)
    # Exporters and runtimes fail in many ways.
    except Exception as error:
        raise LeftOutError(first_line(error)) from error
    text, pooled_text = (v.detach().float().cpu() for v in model.prompt(batch=batch))
    resident = getattr(network, "resident", lambda array: array)

    def encode(z: Tensor) -> Condition:
        out = encoder(z_lq=z.float().cpu())
        kept = tuple(resident(out[name]) for name in Encoder.outputs)
        return Condition(z, kept, Routing(*[z.new_empty(0)] * 4))

    def step(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        tokens, pooled = condition.tokens
        out = network(
            x_t=x.float().cpu(),
            timestep=t.float().cpu(),
            tokens=tokens,
            pooled=pooled,
            text=text,
            pooled_text=pooled_text,
        )
        return torch.as_tensor(out["output"]).to(x)

    return encode, step
