"""Graphs as ONNX files."""

import re
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import Dim

from export.graphs import Graph
from export.libraries import ExportError, library
from export.limits import Limits
from export.optimizer import optimize
from mimdit.errors import first_line


@dataclass(frozen=True)
class Written:
    """An ONNX file: its name, nodes, the seconds it took, and the traced program it was made of."""

    graph: str
    file: str
    nodes: int
    seconds: float
    program: Any = field(default=None, repr=False, compare=False)


def export_onnx(graph: Graph, folder: Path, limits: Limits, opset: int = 18) -> Written:
    """Write `<name>.onnx` into `folder`; weights beyond 1.5 GB lie beside it, in `.onnx.data`.

    To be called inside `graphs.traceable`.

    Raises:
        ExportError: onnx or onnxscript is missing, or an operator that ONNX cannot express.
        OSError: the file cannot be written.
    """
    onnx = library("onnx")
    start = time.perf_counter()
    exported = translate(graph, limits, opset)
    path = folder / f"{graph.name}.onnx"
    exported.save(path)
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(str(path))
    seconds = time.perf_counter() - start
    return Written(graph.name, path.name, len(model.graph.node), seconds, exported.exported_program)


def translate(graph: Graph, limits: Limits, opset: int) -> Any:
    """A graph as torch's `ONNXProgram`; to be called inside `graphs.traceable`.

    Raises:
        ExportError: an operator that ONNX cannot express, or sizes that torch cannot trace.
    """
    library("onnxscript")
    batch, rows, columns = limits.traced()
    example = graph.example(batch, rows, columns)
    with warnings.catch_warnings():
        # Of torch, about its own translation.
        warnings.simplefilter("ignore")
        shapes = dynamic_shapes(graph, example, limits)
        try:
            program = torch.export.export(graph, (), example, dynamic_shapes=shapes)
        # Of torch's solver too, which gives up on some sizes that vary (Swin, patches of one).
        except Exception as error:
            one = "; give one size (--sizes HxW)" if limits.side[0] < limits.side[1] else ""
            raise ExportError(
                f"{graph.name}: torch.export cannot trace it ({first_line(error)}){one}"
            ) from error
        try:
            exported: Any = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=list(example),
                output_names=list(graph.outputs),
                custom_translation_table=_translations(opset),
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise ExportError(f"{graph.name}: {_unknown(error)}") from error
        optimize(exported.model, graph.outputs)
    _tidy(exported.model, graph)
    return exported


def _unknown(error: BaseException) -> str:
    """What torch's exporter could not translate, from its pages of advice."""
    reason: BaseException | None = error
    while reason is not None:
        found = re.search(r"op='([^']+)'", str(reason))
        if found:
            return f"expected operators that ONNX has, got {found[1]}"
        error, reason = reason, reason.__cause__
    return f"torch.onnx cannot translate it ({first_line(Exception(str(error)))})"


def dynamic_shapes(
    graph: Graph, example: dict[str, Tensor], limits: Limits
) -> dict[str, dict[int, Any]]:
    """`torch.export`'s description of the axes that vary; those with one size are fixed."""
    (low, high), (small, large) = limits.batch, limits.side
    known: dict[str, Any] = {}
    if low < high:
        known["batch"] = Dim("batch", min=low, max=high)
    if small < large:
        known["tokens"] = Dim("tokens", min=small**2, max=large**2)
        for name in ("rows", "columns"):
            dim = Dim(name, min=small, max=large)
            known[name] = graph.step * dim if graph.step > 1 else dim
    return {
        name: {i: known[axis] for i, axis in graph.axes[name].items() if axis in known}
        for name in example
    }


def input_shapes(graph: Graph, limits: Limits) -> dict[str, list[int]]:
    """Shapes of all inputs as in the ONNX file; −1 marks the axes that vary."""
    example = graph.example(*limits.traced())
    varying = dynamic_shapes(graph, example, limits)
    return {
        name: [-1 if i in varying[name] else n for i, n in enumerate(x.shape)]
        for name, x in example.items()
    }


def _tidy(model: Any, graph: Graph) -> None:
    """Name the varying axes of inputs and outputs, and drop the exporter's paths and traces."""
    ir = library("onnx_ir")
    for node in model.graph.all_nodes():
        for key in ("pkg.torch.onnx.stack_trace", "pkg.torch.onnx.fx_node"):
            node.metadata_props.pop(key, None)
    names: dict[str, str] = {}
    for value in model.graph.inputs:
        for axis, name in graph.axes[value.name].items():
            if not isinstance(value.shape[axis], int):
                scaled = name in ("rows", "columns") and graph.step > 1
                names[str(value.shape[axis])] = f"{graph.step}*{name}" if scaled else name
    for value in (*model.graph.inputs, *model.graph.outputs):
        sizes = (n if isinstance(n, int) else names.get(str(n), str(n)) for n in value.shape)
        value.shape = ir.Shape(sizes)


def _translations(opset: int) -> dict[Any, Any]:
    """Operators that torch's own table lacks, or translates only for constants."""
    op: Any = getattr(library("onnxscript"), f"opset{opset}")

    def sort(self: Any, stable: bool, dim: int = -1, descending: bool = False) -> Any:
        # ONNX promises what a stable sort does: TopK gives equal values to the lowest index first.
        del stable
        size = op.Constant(value_ints=[self.shape[dim]])
        return op.TopK(self, size, axis=dim, largest=int(descending), sorted=1)

    def remainder(self: Any, other: Any) -> Any:
        # Of places by a padded size; both round towards minus infinity.
        return op.Mod(self, op.CastLike(other, self))

    aten = torch.ops.aten
    return {aten.sort.stable: sort, aten.remainder.Scalar: remainder}
