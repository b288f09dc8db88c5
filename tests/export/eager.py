"""Graphs as plain modules in place of their files: what they compute, without tracing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import folder
from export.folder import Settings, export_folder
from export.graphs import Graph, graphs_of, traceable
from export.limits import Limits
from export.onnx_export import Written
from export.runtime import ExportedPipeline
from mimdit.pipeline import MiMDiTPipeline


class EagerGraph:
    """A graph's module, called as `export.sessions.Session` is."""

    def __init__(self, pipe: MiMDiTPipeline, graph: Graph) -> None:
        self.pipe, self.graph = pipe, graph

    def resident(self, array: np.ndarray) -> np.ndarray:
        return array

    def __call__(self, **inputs: Any) -> dict[str, np.ndarray]:
        given = {name: torch.as_tensor(inputs[name]) for name in self.graph.axes}
        with traceable(self.pipe, 1024):
            found = self.graph(**given)
        parts = found if isinstance(found, tuple) else (found,)
        return {name: x.numpy() for name, x in zip(self.graph.outputs, parts, strict=True)}


def eager_graphs(pipe: MiMDiTPipeline) -> dict[str, Any]:
    """All graphs of a pipeline by name."""
    return {graph.name: EagerGraph(pipe, graph) for graph in graphs_of(pipe)}


def eager_runtime(
    pipe: MiMDiTPipeline, target: Path, limits: Limits, patch: pytest.MonkeyPatch
) -> ExportedPipeline:
    """The runtime over a folder whose graphs are `eager_graphs`."""

    def write(graph: Graph, work: Path, limits: Limits, opset: int) -> Written:
        file = f"{graph.name}.onnx"
        (work / file).write_bytes(b"")
        return Written(graph.name, file, 1, 0.0)

    with patch.context() as inner:
        inner.setattr(folder, "export_onnx", write)
        export_folder(pipe, target, Settings(limits, [], check=False))
        inner.setattr("export.runtime.open_graphs", lambda *_: ("eager", eager_graphs(pipe)))
        runtime = ExportedPipeline(target, "cpu")
    runtime.set_progress_bar_config(disable=True)
    return runtime
