"""What runs the graphs of a folder: ONNX Runtime, or engines where they fit."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.cache import refuse_foreign
from export.engines import gpu
from export.libraries import ExportError, library
from export.sessions import AnySession, EngineSession, Session

DEVICES = ("auto", "cpu", "cuda")


def open_graphs(
    folder: Path, manifest: Mapping[str, Any], device: str, threads: int, runtime: str
) -> tuple[str, dict[str, AnySession]]:
    """The graphs of a verified folder, and what runs them; arguments as `ExportedPipeline`'s.

    Raises:
        ExportError: no such engines, engines of other GPUs or versions, no such device, or one for
            which ONNX Runtime does not compute in the folder's precision.
    """
    known = ("auto", "onnxruntime", "tensorrt", "tensorrt_rtx")
    if runtime not in known:
        raise ExportError(f"runtime: expected one of {', '.join(known)}, got {runtime!r}")
    if device not in DEVICES:
        raise ExportError(
            f"device: expected {', '.join(DEVICES[:-1])} or {DEVICES[-1]} for an exported folder, "
            f"got {device!r}"
        )
    engines = manifest["engines"]
    wanted = [runtime] if runtime != "auto" else list(engines) if device != "cpu" and gpu() else []
    for name in (name for name in wanted if name != "onnxruntime"):
        try:
            return name, _engines(folder, manifest, name)
        except ExportError as error:
            if runtime != "auto":
                raise
            warnings.warn(f"{error}; ONNX Runtime takes its place", stacklevel=3)
    if device == "auto":
        cuda = "CUDAExecutionProvider" in library("onnxruntime").get_available_providers()
        try:
            if cuda:
                return "onnxruntime", _sessions(folder, manifest, "cuda", threads)
        # The same installation serves hosts without a GPU.
        except ExportError as error:
            warnings.warn(f"{error}; the CPU takes its place", stacklevel=3)
        device = "cpu"
    try:
        return "onnxruntime", _sessions(folder, manifest, device, threads)
    except ExportError as error:
        if manifest["precision"] != "bf16":
            raise
        raise ExportError(
            f"precision: expected one that onnxruntime computes in on {device}, got bf16 ({error})"
        ) from error


def _sessions(
    folder: Path, manifest: Mapping[str, Any], device: str, threads: int
) -> dict[str, AnySession]:
    return {
        name: Session(folder / entry["file"], device, threads)
        for name, entry in manifest["graphs"].items()
    }


def check_engines(folder: Path, manifest: Mapping[str, Any], name: str) -> None:
    """ExportError unless the folder's engines of a library are all there and can run here."""
    found = manifest["engines"].get(name, {})
    missing = [graph for graph in manifest["graphs"] if graph not in found]
    if missing:
        raise ExportError(f"{folder}: engines.{name}.{missing[0]}: expected an engine, found none")
    library(name)
    for graph, entry in found.items():
        refuse_foreign(folder, graph, entry, manifest["model"]["weights"])


def _engines(folder: Path, manifest: Mapping[str, Any], name: str) -> dict[str, AnySession]:
    check_engines(folder, manifest, name)
    entries = manifest["engines"][name].items()
    return {graph: EngineSession(folder / entry["file"], name) for graph, entry in entries}
