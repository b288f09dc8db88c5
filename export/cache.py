"""Which engine fits: a key over all that it depends on, kept in the manifest.

An earlier export's engine is reused only if its whole key is equal, and is run only by the library
and on a GPU of its key; otherwise the field that differs is named.
"""

import hashlib
import shutil
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from export.engines import Engine, Shapes, Target, engine_file, gpu
from export.libraries import ExportError, library
from export.manifest import file_hash, verify


def engine_key(
    graph: Path, target: Target, shapes: Shapes, precision: str, weights: str
) -> dict[str, Any]:
    """All that an engine of this ONNX file depends on; shapes: of its profile.

    TensorRT tunes for the very GPU; TensorRT-RTX builds for all of some compute capabilities.
    """
    here = None if target.capabilities else gpu()
    return {
        "weights": weights,
        "graph": graph_hash(graph),
        "profile": shapes,
        "precision": precision,
        "library": target.library,
        "version": library(target.library).__version__,
        "gpu": here["name"] if here else "any",
        "capabilities": [here["capability"]] if here else list(target.capabilities),
        "workspace": target.workspace,
        "kernels": source_hash(),
    }


def target_of(key: Mapping[str, Any]) -> Target:
    """What an engine of this key was built for."""
    capabilities = tuple(key["capabilities"]) if key["gpu"] == "any" else ()
    return Target(key["library"], capabilities, key["workspace"])


def graph_hash(path: Path) -> str:
    """Of an ONNX file and the weights beside it."""
    parts = sorted(path.parent.glob(f"{path.name}*"))
    return hashlib.sha256("".join(map(file_hash, parts)).encode()).hexdigest()


def source_hash() -> str:
    """Of the kernels' sources."""
    digest = hashlib.sha256()
    spec = find_spec("mimkernels")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()


def earlier(folder: Path) -> dict[str, Any] | None:
    """The manifest of an earlier export that is still whole."""
    try:
        return verify(folder)
    except ExportError:
        return None


def reuse(
    manifest: Mapping[str, Any] | None, source: Path, work: Path, graph: str, key: Mapping[str, Any]
) -> tuple[Engine | None, str]:
    """An earlier export's engine copied into `work`, or why not: nothing, or what differs."""
    engines = (manifest or {}).get("engines", {}).get(key["library"], {})
    entry = engines.get(graph)
    if entry is None:
        return None, ""
    difference = differs(entry["key"], key)
    if difference:
        return None, difference
    for name in (entry["file"], entry["report"]):
        shutil.copyfile(source / name, work / name)
    return Engine(graph, key["library"], entry["file"], entry["report"], 0.0, reused=True), ""


def differs(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """The first field of a key that differs, with both values; empty if none does."""
    for field in (*wanted, *sorted(set(found) - set(wanted))):
        if found.get(field) != wanted.get(field):
            return f"{field}: expected {wanted.get(field)!r}, got {found.get(field)!r}"
    return ""


def refuse_foreign(folder: Path, graph: str, entry: Mapping[str, Any], weights: str) -> None:
    """ExportError unless an engine fits its graph, the installed library and the GPU.

    entry: of the manifest, `engines.<library>.<graph>`. weights: the manifest's.
    """
    key = entry["key"]
    name = engine_file(graph, key["library"])
    here = gpu()
    if here is None:
        raise ExportError(f"{name}: expected an NVIDIA GPU that torch can use, found none")
    wanted = {
        "weights": weights,
        "graph": graph_hash(folder / f"{graph}.onnx"),
        "version": library(key["library"]).__version__,
    }
    if key["gpu"] != "any":
        wanted["gpu"] = here["name"]
    for field, value in wanted.items():
        if key[field] != value:
            raise ExportError(
                f"{name}: {field}: expected {value!r}, got {key[field]!r}; export again"
            )
    if here["capability"] not in key["capabilities"]:
        got = ", ".join(key["capabilities"])
        raise ExportError(
            f"{name}: capabilities: expected one with {here['capability']}, the GPU's, got {got}; "
            "export again"
        )
