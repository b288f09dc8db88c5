"""All comparisons of one exported folder with its model."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from export.backends import check_engines
from export.cache import target_of
from export.checks import GATES, Check
from export.graphs import graphs_of
from export.libraries import ExportError
from export.limits import Limits
from export.locate import Locator
from export.manifest import verify
from export.parity import check_drawn, check_graphs, located
from export.pictures import Picture, check_picture, check_steps
from export.runtime import ExportedPipeline
from export.sessions import require_precision
from export.weights import check_weights
from mimdit.pipeline import MiMDiTPipeline

# Of the steps that are compared one by one, and of a picture's.
STEPS = 8


def compare(
    pipe: MiMDiTPipeline,
    folder: Path,
    device: str,
    programs: dict[str, Any],
    progress: Callable[[str], None],
) -> list[Check]:
    """What is shipped is what is checked: the files, read back. ONNX first, then engines that fit.

    Where ONNX Runtime does not compute in the folder's precision, engines alone.

    pipe: on the CPU, in the folder's precision. programs: see `Locator`.

    Raises:
        ExportError: a file of the folder is not what it was, or cannot run here.
    """
    manifest = verify(folder)
    precision, settings = manifest["precision"], manifest["checks"]
    limits = Limits(tuple(manifest["limits"]["batch"]), tuple(manifest["limits"]["side"]))
    sizes = [tuple(size) for size in settings["sizes"]]
    locate = Locator(pipe, folder, limits, manifest["opset"], GATES[precision], programs, progress)
    checks = [check_weights(folder / f"{graph.name}.onnx", graph) for graph in graphs_of(pipe)]
    wide = None if precision == "fp32" else _in_float32(pipe)
    names = _runtimes(folder, manifest, device, progress)
    for name in names:
        engines = manifest["engines"].get(name, {})
        look = replace(locate, target=next((target_of(e["key"]) for e in engines.values()), None))
        progress(f"loading the graphs in {name}")
        with _advice():
            exported = ExportedPipeline(folder, device, torch.get_num_threads(), name)
        onnx = name == "onnxruntime"
        found = check_graphs(
            pipe,
            exported.graphs,
            precision,
            sizes,
            wide,
            progress=progress,
            locate=look,
        )
        progress("checking every step")
        found += located(
            list(check_steps(pipe, exported.graphs, precision, (1, *sizes[0][1:]), STEPS)),
            look,
        )
        if settings["picture"] is not None:
            progress("restoring a picture")
            picture = Picture(**settings["picture"])
            found.append(check_picture(pipe, exported, precision, picture))
        checks += found if onnx else [check.of(name) for check in found]
    if "onnxruntime" in names:
        progress("checking with drawn weights")
        checks += check_drawn(pipe, folder, device, precision, sizes[0], locate=locate)
    return checks


def require_comparable(precision: str, device: str, opset: int) -> None:
    """ExportError where ONNX Runtime cannot run graphs of this precision for a comparison."""
    with _advice():
        require_precision(precision, device, opset)


@contextmanager
def _advice() -> Iterator[None]:
    try:
        yield
    except ExportError as error:
        raise ExportError(f"{error}; --no-check leaves the comparison out") from error


def _runtimes(
    folder: Path, manifest: dict[str, Any], device: str, progress: Callable[[str], None]
) -> list[str]:
    """ONNX Runtime, and the libraries of engines that this machine can run."""
    found: list[str] = []
    for name in manifest["engines"]:
        try:
            check_engines(folder, manifest, name)
        except ExportError:
            continue
        found.append(name)
    try:
        require_comparable(manifest["precision"], device, manifest["opset"])
    except ExportError as error:
        if not found:
            raise
        progress(f"leaving out ONNX Runtime ({error})")
        return found
    return ["onnxruntime", *found]


def _in_float32(pipe: MiMDiTPipeline) -> MiMDiTPipeline:
    """The same rounded weights, computed with in float32."""
    return MiMDiTPipeline(
        copy.deepcopy(pipe.transformer).float(), copy.deepcopy(pipe.vae).float(), pipe.scheduler
    )
