"""Faults put into ONNX files, as a broken exporter would: no hash gives them away."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper

Change = Callable[[Path], None]


def weight(graph: str, name: str, by: float = 0.5) -> Change:
    """One number of a weight is off."""

    def change(model: Any) -> None:
        stored = next(w for w in model.graph.initializer if w.name == name)
        value = numpy_helper.to_array(stored).copy()
        value.flat[value.size // 2] += by
        stored.CopyFrom(numpy_helper.from_array(value, name))

    return _within(graph, change)


def swapped_gate(path: Path) -> None:
    """The two experts of a slot pair get each other's weights; the reported weights stay right."""

    def change(model: Any) -> None:
        users = [node for node in model.graph.node if "intra" in node.input]
        assert users
        indices = numpy_helper.from_array(np.array([1, 0]), "swapped_indices")
        model.graph.initializer.append(indices)
        gather = helper.make_node("Gather", ["intra", "swapped_indices"], ["swapped"], axis=-1)
        for node in users:
            node.input[:] = ["swapped" if name == "intra" else name for name in node.input]
        _insert(model, gather, users[0])

    _within("conditioner", change)(path)


def later_experts(path: Path) -> None:
    """Off by one: the second and third best sub-experts instead of the best two."""

    def change(model: Any) -> None:
        top = {name for node in model.graph.node if node.op_type == "TopK" for name in node.output}
        slices = [n for n in model.graph.node if n.op_type == "Slice" and n.input[0] in top]
        assert len(slices) == 2
        for name, value in (("second", 1), ("fourth", 3)):
            model.graph.initializer.append(numpy_helper.from_array(np.array([value]), name))
        for node in slices:
            node.input[1], node.input[2] = "second", "fourth"

    _within("conditioner", change)(path)


def unknown_operator(graph: str) -> Change:
    """A node that no runtime knows."""

    def change(model: Any) -> None:
        model.graph.node[0].op_type = "Nonsense"

    return _within(graph, change)


def other_weights(module: torch.nn.Module) -> Change:
    """All weights become a module's own, as if it had been exported: not a fault."""

    def change(path: Path) -> None:
        model, own = onnx.load(path), module.state_dict()
        for stored in model.graph.initializer:
            if stored.name.removeprefix("model.") in own:
                value = own[stored.name.removeprefix("model.")].numpy()
                stored.CopyFrom(numpy_helper.from_array(value, stored.name))
        onnx.save(model, path)

    return change


def external(path: Path) -> None:
    """All weights lie beside the graph: not a fault."""
    onnx.save(
        onnx.load(path),
        path,
        save_as_external_data=True,
        location=f"{path.name}.data",
        size_threshold=1024,
    )


def both(*changes: Change) -> Change:
    """One after the other."""

    def change(path: Path) -> None:
        for one in changes:
            one(path)

    return change


def _within(graph: str, change: Callable[[Any], None]) -> Change:
    def edit(path: Path) -> None:
        if path.name == f"{graph}.onnx":
            model = onnx.load(path)
            change(model)
            onnx.save(model, path)

    return edit


def _insert(model: Any, node: Any, before: Any) -> None:
    nodes = list(model.graph.node)
    nodes.insert(nodes.index(before), node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
