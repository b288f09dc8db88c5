"""Where a graph first differs from the model: node by node, on the same inputs.

torch's exporter names the values of an ONNX graph after the nodes of the program it traced. That
program runs once more in torch and the graph runs with all its values as outputs; the first value,
in the graph's own order, whose error well exceeds the gate is the place to look at. An engine is
built anew with what leaves each block as outputs: all values would leave nothing to fuse.
"""

import ast
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.checks import relative_error
from export.engines import Target, build_engine
from export.graphs import Graph, graphs_of
from export.libraries import library
from export.limits import Limits, graph_limits, tracing, usual_side
from export.manifest import link
from export.onnx_export import translate
from export.sessions import AnySession, EngineSession, Session
from export.weights import exchanged
from mimdit.errors import first_line
from mimdit.pipeline import MiMDiTPipeline

_SCOPES = "pkg.torch.onnx.name_scopes"
# A block of the backbone, and what lies in it.
_BLOCK = re.compile(r"(transformer_blocks\.\d+).*")
# Sines of large numbers and differences of near ones err more than what is made of them: values
# count that are this many times over the gate, or if there are none, so many.
_INNER = (10, 2)


@dataclass(frozen=True)
class Place:
    """A value of an ONNX graph: the node that makes it, its operator, and the module it stems
    from; block: of the backbone, where it lies in one."""

    value: str
    operator: str
    module: str
    error: float

    @property
    def block(self) -> int | None:
        found = re.search(r"transformer_blocks\.(\d+)", self.module)
        return int(found[1]) if found else None

    def __str__(self) -> str:
        block = "" if self.block is None else f"block {self.block}, "
        where = f" in {self.module}" if self.module else ""
        return f"{block}{self.operator} {self.value}{where}, error {self.error:.1e}"


@dataclass
class Locator:
    """Says where a graph of a folder first differs from the model that is now in `pipe`.

    programs: of `export_onnx`, by graph; those that are missing are traced anew, which takes as
    long as their export did. gate: see `first_difference`. target: of the engines that are looked
    into; None stands for ONNX Runtime.
    """

    pipe: MiMDiTPipeline
    folder: Path
    limits: Limits
    opset: int
    gate: float
    programs: dict[str, Any] = field(default_factory=dict)
    progress: Callable[[str], None] = lambda _: None
    target: Target | None = None

    def __call__(self, name: str, inputs: dict[str, Any], drawn: bool) -> str:
        """A sentence; `inputs` as in the check that failed, `drawn`: whether its weights were."""
        self.progress(f"looking for where {name} differs")
        graph = next(graph for graph in graphs_of(self.pipe) if graph.name == name)
        path = self.folder / f"{name}.onnx"
        try:
            takes = graph_limits(self.pipe, graph, self.limits)
            if name not in self.programs:
                with tracing(self.pipe, self.limits):
                    translated = translate(graph, takes, self.opset)
                self.programs[name] = translated.exported_program
            given = exchanged(path, graph, "cpu") if drawn else {}
            build = None if self.target is None else partial(self._engine, graph, takes)
            place = first_difference(path, self.programs[name], inputs, self.gate, given, build)
        # Of any library: what failed already must be reported all the same.
        except Exception as error:
            return f"no place found ({first_line(error)})"
        return f"first difference: {place}" if place else "no node is far off its traced one"

    def _engine(self, graph: Graph, takes: Limits, path: Path) -> AnySession:
        """An engine of `path`, the graph's file with more outputs, built beside it."""
        assert self.target is not None
        usual = usual_side(self.pipe, self.limits)
        built = build_engine(path.parent, graph, takes, usual, self.target, self.progress)
        return EngineSession(path.parent / built.file, built.library)


def first_difference(
    path: Path,
    program: torch.export.ExportedProgram,
    inputs: Mapping[str, Any],
    gate: float,
    exchanged: Mapping[str, Any] | None = None,
    build: Callable[[Path], AnySession] | None = None,
) -> Place | None:
    """The first value of an ONNX file well over the gate, on the CPU; None if there is none.

    program: of `onnx_export.export_onnx`. exchanged: see `Session`. build: what runs the file
    instead of ONNX Runtime; then only values that leave a block are compared.
    """
    onnx = library("onnx")
    model = onnx.load(path, load_external_data=False)
    outputs = [value.name for value in model.graph.output]
    reference = _values(program, inputs, outputs)
    nodes = {value: node for node in model.graph.node for value in node.output}
    modules = {value: _module(node) for value, node in nodes.items()}
    wanted = [value for value in nodes if value in reference]
    known: dict[str, Any] = {}
    if build is not None:
        # TensorRT asks for types.
        known = {value.name: value for value in model.graph.value_info}
        blocks = {value: _BLOCK.sub(r"\1", module) for value, module in modules.items()}
        left = {
            value
            for node in model.graph.node
            for value in node.input
            if blocks.get(value) != blocks[node.output[0]]
        }
        wanted = [value for value in wanted if value in left or value in outputs]
    for value in wanted:
        if value not in outputs:
            model.graph.output.append(known.get(value, onnx.ValueInfoProto(name=value)))
    # Weights in files of their own are named by files beside the graph's.
    data = path.with_name(f"{path.name}.data")
    folder = path.parent if data.is_file() else None
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as place:
        opened = Path(place, path.name)
        opened.write_bytes(model.SerializeToString())
        if data.is_file():
            link(data, opened.with_name(data.name))
        if build is not None:
            session = build(opened)
        else:
            threads = torch.get_num_threads()
            session = Session(opened, "cpu", threads, exchanged, rewritten=False)
        found = session(**inputs)
    errors = {value: _error(found[value], reference[value]) for value in wanted}
    for factor in _INNER:
        for value, error in errors.items():
            if not error <= factor * gate:
                return Place(value, nodes[value].op_type, modules[value], error)
    return None


def _module(node: Any) -> str:
    """Of the model, that a node stems from; empty where it is not known."""
    scopes = {p.key: p.value for p in node.metadata_props}.get(_SCOPES, "[]")
    # The last scope is the value itself.
    return next((s for s in reversed(ast.literal_eval(scopes)[:-1]) if s), "")


def _error(found: np.ndarray, reference: Tensor) -> float:
    """Relative, where masks put equal infinities in both."""
    a, b = torch.as_tensor(found), reference.detach().cpu()
    if a.shape == b.shape:
        same = torch.isinf(b) & (a == b)
        a, b = a.masked_fill(same, 0), b.masked_fill(same, 0)
    return relative_error(a, b)


def _values(
    program: torch.export.ExportedProgram, inputs: Mapping[str, Any], outputs: Sequence[str]
) -> dict[str, Tensor]:
    """Every tensor that a traced program computes, by the name of its node or output."""
    found: dict[str, Tensor] = {}

    class Recorder(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.op == "call_function" and isinstance(value, Tensor):
                found[n.name] = value
            return value

    # Its guards hold for the traced size alone where a size divides or not; its nodes for all.
    module = program.module(check_guards=False)
    names = [n.name for n in module.graph.nodes if n.op == "placeholder"]
    with torch.no_grad():
        last = Recorder(module).run(*(torch.as_tensor(inputs[name]) for name in names))
    results = last if isinstance(last, (tuple, list)) else [last]
    # A node may have the name of an output that it is not.
    return found | dict(zip(outputs, results, strict=True))
