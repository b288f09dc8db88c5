"""ONNX files as engines of TensorRT (10 and 11) and of TensorRT-RTX, whose interfaces agree.

TensorRT-RTX builds ahead of time without a GPU, for the compute capabilities that it is given;
TensorRT builds for the GPU that it finds. Types are those of the graph: strong typing, a flag in
TensorRT 10, is all that TensorRT 11 has. No engine can be refitted: refitting has lost biases.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from export.libraries import ExportError, library
from export.sessions import Messages
from mimdit.errors import first_line

if TYPE_CHECKING:
    # The runtime, which imports this module, does without the network's.
    from export.graphs import Graph
    from export.limits import Limits

NAMES = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
_SUFFIX = {"tensorrt": "trt", "tensorrt_rtx": "rtx"}
Shapes = dict[str, list[list[int]]]


@dataclass(frozen=True)
class Target:
    """What engines are built with and for.

    library: tensorrt or tensorrt_rtx. capabilities: of GPUs ("89", "120"), for TensorRT-RTX.
    workspace: bytes that a layer may use at most; None leaves it to the library.
    """

    library: str
    capabilities: tuple[str, ...] = ()
    workspace: int | None = None


@dataclass(frozen=True)
class Engine:
    """An engine: of which graph and library, its file, the report of its layers, and the seconds
    it took; reused: from an earlier export."""

    graph: str
    library: str
    file: str
    report: str
    seconds: float
    reused: bool = False


def engine_file(graph: str, library_name: str) -> str:
    """The name of an engine's file."""
    return f"{graph}.{_SUFFIX[library_name]}.engine"


def gpu() -> dict[str, str] | None:
    """Name and compute capability ("89") of the GPU that torch would use; None without one."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return {"name": torch.cuda.get_device_name(), "capability": f"{major}{minor}"}


def require(target: Target) -> None:
    """ExportError that says all that is missing to build for this target."""
    missing = []
    try:
        library(target.library)
    except ExportError as error:
        missing.append(str(error))
    if target.library == "tensorrt" and gpu() is None:
        missing.append(
            "TensorRT builds on an NVIDIA GPU that torch can use, and found none; "
            "--trt-rtx builds without one"
        )
    if missing:
        raise ExportError("; ".join(missing))
    for capability in target.capabilities:
        _capability(library(target.library), capability)


def build_engine(
    folder: Path,
    graph: "Graph",
    limits: "Limits",
    usual: int,
    target: Target,
    progress: Callable[[str], None] = lambda _: None,
) -> Engine:
    """Write an engine, and a report of its layers, beside `<name>.onnx`.

    usual: tokens along a side that the engine is tuned for; it takes all sizes of `limits`.

    Raises:
        ExportError: no library, an unknown capability, or a graph that it cannot build.
        KeyboardInterrupt: stopped by the user, between two steps of the builder.
    """
    trt = library(target.library)
    start = time.perf_counter()
    logger = Messages.of(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(_flags(trt))
    parser = trt.OnnxParser(network, logger)
    # By path, so that weights beside the file are found.
    if not parser.parse_from_file(str(folder / f"{graph.name}.onnx")):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        first = errors[0] if errors else None
        # A file that is no graph has no nodes.
        named = first is not None and first.node_name()
        node = f"{first.node_operator()} {named}" if first and named else "the file"
        reason = first_line(Exception(first.desc())) if first else logger.reason()
        raise ExportError(f"{graph.name}: {NAMES[target.library]} cannot parse {node}: {reason}")
    _decompose_attention(trt, network)
    config = builder.create_builder_config()
    config.add_optimization_profile(
        _profile(builder, network, profile_shapes(graph, _inputs(network), limits, usual))
    )
    # Products of float32 keep float32's precision.
    config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if target.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, target.workspace)
    if target.capabilities:
        config.num_compute_capabilities = len(target.capabilities)
        for i, capability in enumerate(target.capabilities):
            config.set_compute_capability(_capability(trt, capability), i)
    monitor = _monitor(trt, lambda text: progress(f"{graph.name}: {text}"))
    config.progress_monitor = monitor
    serialized = builder.build_serialized_network(network, config)
    if monitor.stopped:
        raise KeyboardInterrupt
    if serialized is None:
        raise ExportError(
            f"{graph.name}: {NAMES[target.library]} cannot build it: {logger.reason()}"
        )
    path = folder / engine_file(graph.name, target.library)
    data = memoryview(serialized)
    path.write_bytes(data)
    report = path.with_suffix(".layers.json")
    text = json.dumps(_layers(trt, logger, data), indent=1, ensure_ascii=False)
    report.write_text(text + "\n", encoding="utf-8")
    seconds = time.perf_counter() - start
    return Engine(graph.name, target.library, path.name, report.name, seconds)


def profile_shapes(
    graph: "Graph", inputs: Mapping[str, Sequence[int]], limits: "Limits", usual: int
) -> Shapes:
    """The smallest, usual and largest shape of every input; −1 marks the axes that vary."""
    (least, most), (low, high) = limits.batch, limits.side
    sizes = [(least, low), (least, min(max(usual, low), high)), (most, high)]
    shapes: Shapes = {}
    for name, given in inputs.items():
        shapes[name] = []
        for batch, side in sizes:
            known = {
                "batch": batch,
                "rows": side * graph.step,
                "columns": side * graph.step,
                "tokens": side**2,
            }
            axes = graph.axes[name]
            shapes[name].append([known[axes[i]] if n == -1 else n for i, n in enumerate(given)])
    return shapes


def _flags(trt: Any) -> int:
    """Of a strongly typed network; TensorRT 11 has no other, nor needs the flag."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _inputs(network: Any) -> dict[str, tuple[int, ...]]:
    values = (network.get_input(i) for i in range(network.num_inputs))
    return {value.name: tuple(value.shape) for value in values}


def _profile(builder: Any, network: Any, shapes: Shapes) -> Any:
    profile = builder.create_optimization_profile()
    for name in _inputs(network):
        profile.set_shape(name, *shapes[name])
    return profile


def _capability(trt: Any, capability: str) -> Any:
    known = getattr(trt.ComputeCapability, f"SM{capability}", None)
    if known is None:
        names = [name[2:] for name in dir(trt.ComputeCapability) if name.startswith("SM")]
        expected = ", ".join(sorted(names, key=int))
        raise ExportError(f"--sm: expected some of {expected}, got {capability!r}")
    return known


def _decompose_attention(trt: Any, network: Any) -> None:
    """Let attention become plain products where there is no kernel, as for float32."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if kind is not None and layer.type == kind:
            # Python sees a plain layer.
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _monitor(trt: Any, progress: Callable[[str], None]) -> Any:
    """A progress monitor that says what the builder does, and stops it at Ctrl-C."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.stopped = False
            # Of the phases that lie in no other one.
            self._steps: dict[str, int] = {}

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._steps[phase] = steps

        def step_complete(self, phase: str, step: int) -> bool:
            try:
                if phase in self._steps:
                    progress(f"{phase.lower()}, step {step + 1} of {self._steps[phase]}")
            # An exception must not pass through the library.
            except KeyboardInterrupt:
                self.stopped = True
            return not self.stopped

        def phase_finish(self, phase: str) -> None:
            self._steps.pop(phase, None)

    return Monitor()


def _layers(trt: Any, logger: Any, data: Any) -> dict[str, Any]:
    """The inspector's account of an engine; without a GPU to load it, what the builder said."""
    if gpu() is not None:
        engine = trt.Runtime(logger).deserialize_cuda_engine(data)
        if engine is not None:
            found = engine.create_engine_inspector()
            return json.loads(found.get_engine_information(trt.LayerInformationFormat.JSON))
    # One layer a line after the heading.
    return {"Layers": logger.layers.splitlines()[1:], "Source": "builder, no GPU to inspect it"}
