"""ONNX files as TensorRT-RTX engines, built ahead of time.

Building takes no GPU; loading an engine does. Types are those of the graph (strong typing).
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.graphs import Graph
from export.libraries import ExportError, library
from export.onnx_export import Limits
from mimdit.errors import first_line


@dataclass(frozen=True)
class Engine:
    """A built engine: of which graph, its file, and the seconds it took."""

    graph: str
    file: str
    seconds: float


def build_engine(
    folder: Path, graph: Graph, limits: Limits, usual: int, capabilities: Sequence[str]
) -> Engine:
    """Write `<name>.rtx.engine` beside `<name>.onnx`, for GPUs of these capabilities ("89", "120").

    usual: tokens along a side that the engine is tuned for; it takes all sizes of `limits`.

    Raises:
        ExportError: no tensorrt_rtx, an unknown capability, or a graph that it cannot build.
    """
    trt = library("tensorrt_rtx")
    start = time.perf_counter()
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    # By path, so that weights beside the file are found.
    if not parser.parse_from_file(str(folder / f"{graph.name}.onnx")):
        error = parser.get_error(0)
        reason = first_line(Exception(error.desc()))
        raise ExportError(f"{graph.name}: TensorRT-RTX cannot parse {error.node_name()}: {reason}")
    config = builder.create_builder_config()
    config.add_optimization_profile(_profile(builder, network, graph, limits, usual))
    config.num_compute_capabilities = len(capabilities)
    for i, capability in enumerate(capabilities):
        known = getattr(trt.ComputeCapability, f"SM{capability}", None)
        if known is None or not config.set_compute_capability(known, i):
            raise ExportError(f"--sm: TensorRT-RTX does not build for {capability!r}")
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise ExportError(f"{graph.name}: TensorRT-RTX cannot build it; see its messages")
    path = folder / f"{graph.name}.rtx.engine"
    path.write_bytes(memoryview(engine))
    return Engine(graph.name, path.name, time.perf_counter() - start)


def _profile(builder: Any, network: Any, graph: Graph, limits: Limits, usual: int) -> Any:
    """The smallest, usual and largest shape of every input."""
    profile = builder.create_optimization_profile()
    (least, most), (low, high) = limits.batch, limits.side
    sizes = [(least, low), (least, min(max(usual, low), high)), (most, high)]
    for i in range(network.num_inputs):
        value = network.get_input(i)
        shapes = []
        for batch, side in sizes:
            known = {
                "batch": batch,
                "rows": side * graph.step,
                "columns": side * graph.step,
                "tokens": side**2,
            }
            axes = graph.axes[value.name]
            shapes.append([known[axes[k]] if n == -1 else n for k, n in enumerate(value.shape)])
        profile.set_shape(value.name, *shapes)
    return profile
