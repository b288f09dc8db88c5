"""Weights inside ONNX files: compared with the model's, and exchanged for drawn ones.

Relative errors of outputs cannot see everything: a fresh model's ZeroLinear is zero, and hides
whatever the experts compute. So every weight in a file must equal the model's own, and the file's
graph is also run with drawn weights (`randomize_`), which hide nothing.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from export.checks import Check, relative_error
from export.graphs import Graph
from export.libraries import library
from export.optimizer import is_weight
from export.sessions import Session
from mimdit.transformer import MiMDiTTransformer2DModel

# What `randomize_` changes.
_DRAWN = ("mim.", "condition_embedder.")


def check_weights(path: Path, graph: Graph) -> Check:
    """Every weight in an ONNX file against the graph's module; names the first that differs."""
    onnx = library("onnx")
    model = onnx.load(path, load_external_data=False)
    own = graph.state_dict()
    count, worst, note = 0, 0.0, ""
    for stored in model.graph.initializer:
        if not is_weight(stored.name):
            continue
        count += 1
        found = onnx.numpy_helper.to_array(stored, base_dir=str(path.parent))
        error = float("nan")
        if stored.name in own and own[stored.name].shape == found.shape:
            # NumPy has no bfloat16 of its own.
            error = relative_error(found.astype("float64"), own[stored.name])
        if not error <= 0 and not note:
            worst, note = error, f"first that differs: {stored.name}"
    return Check(graph.name, "weights", "", worst, 0.0, note or f"{count} equal")


@contextmanager
def drawn_weights(model: MiMDiTTransformer2DModel, seed: int) -> Iterator[None]:
    """Inside, the model's mixtures and the embedding of pooled conditions are drawn."""
    kept = {k: v.clone() for k, v in model.state_dict().items() if k.startswith(_DRAWN)}
    model.randomize_(seed)
    try:
        yield
    finally:
        state = model.state_dict()
        with torch.no_grad():
            for name, value in kept.items():
                state[name].copy_(value)


def exchanged(path: Path, graph: Graph, device: str) -> dict[str, Any]:
    """The module's present values of what is drawn, for `Session(exchanged=…)`."""
    onnx = library("onnx")
    names = {w.name for w in onnx.load(path, load_external_data=False).graph.initializer}
    own = graph.state_dict()
    prefixes = tuple(f"model.{part}" for part in _DRAWN)
    wanted = sorted(name for name in names & set(own) if name.startswith(prefixes))
    return {name: _value(own[name], device) for name in wanted}


def drawn_session(path: Path, graph: Graph, device: str) -> Session:
    """An ONNX file's graph with the module's present values of what is drawn."""
    return Session(
        path, device, torch.get_num_threads(), exchanged(path, graph, device), rewritten=False
    )


def _value(x: Tensor, device: str) -> Any:
    ort = library("onnxruntime").OrtValue
    x = x.detach().contiguous()
    if x.dtype == torch.bfloat16:
        kind = library("onnx").TensorProto.BFLOAT16
        return ort.ortvalue_from_numpy_with_onnx_type(x.view(torch.int16).numpy(), kind)
    # ONNX Runtime takes such values from the CPU's memory.
    return ort.ortvalue_from_numpy(x.numpy(), "cpu", 0)
