"""A pipeline as a folder: graphs, engines, prompts, parity report and manifest."""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from export.cache import earlier, engine_key, reuse
from export.checks import Check
from export.compare import compare
from export.engines import Engine, Target, build_engine, profile_shapes
from export.graphs import graphs_of
from export.inputs import Size
from export.libraries import ExportError, versions
from export.limits import Limits, codec_side, graph_limits, tracing, usual_side
from export.manifest import finished_folder, link, refuse_other, weights_hash, write_manifest
from export.onnx_export import Written, export_onnx, input_shapes
from export.pictures import Picture
from mimdit.codec import codec_factor
from mimdit.pipeline import MiMDiTPipeline
from mimdit.planning import MIN_TOKENS

PROMPTS, PARITY = "prompts.npz", "parity.json"
_LIBRARIES = (
    *("mimdit", "torch", "diffusers"),
    *("onnx", "onnxscript", "onnxruntime", "tensorrt", "tensorrt-rtx"),
)


@dataclass(frozen=True)
class Settings:
    """What to export: sizes that the graphs take, and sizes (in tokens) to check them at.

    picture: restored for the check, too. targets: what engines are built for.
    """

    limits: Limits
    sizes: Sequence[Size]
    precision: str = "fp32"
    opset: int = 18
    check: bool = True
    device: str = "cpu"
    picture: Picture | None = None
    targets: Sequence[Target] = ()

    def as_dict(self) -> dict[str, Any]:
        """What `compare` needs again, for the manifest."""
        picture = None if self.picture is None else vars(self.picture)
        return {"sizes": [list(size) for size in self.sizes], "picture": picture}


@dataclass(frozen=True)
class Export:
    """What was written; passed is True if every gate held, or nothing was checked."""

    folder: Path
    graphs: list[Written]
    checks: list[Check]
    engines: list[Engine]
    megabytes: dict[str, float]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


class _FailedError(Exception):
    """Gates failed; the folder lies aside."""


def export_folder(
    pipe: MiMDiTPipeline,
    target: Path,
    settings: Settings,
    name: str = "",
    progress: Callable[[str], None] = lambda _: None,
) -> Export:
    """Write `target` whole, or leave it as it was; one that fails its gates lies in TARGET.failed.

    pipe: on the CPU, in the type of `settings.precision`. name: of the model, for the manifest.

    Raises:
        ExportError: a library, provider or scheduler that does not fit, or a folder in use.
    """
    scheduler = _scheduler(pipe)
    weights = weights_hash((pipe.transformer, pipe.vae))
    _enough_space(pipe, target, settings)
    failed = target.with_name(f"{target.name}.failed")
    if settings.check:
        refuse_other(failed)
    before = earlier(target) if settings.targets else None
    written: list[Written] = []
    checks: list[Check] = []
    engines: list[tuple[Engine, dict[str, Any]]] = []
    size: dict[str, float] = {}
    folder = target
    try:
        with finished_folder(target) as work:
            for graph in graphs_of(pipe):
                progress(f"exporting {graph.name}")
                takes = graph_limits(pipe, graph, settings.limits)
                with tracing(pipe, settings.limits):
                    written.append(export_onnx(graph, work, takes, settings.opset))
                for library in settings.targets:
                    usual = usual_side(pipe, settings.limits)
                    shapes = profile_shapes(graph, input_shapes(graph, takes), takes, usual)
                    path = work / written[-1].file
                    key = engine_key(path, library, shapes, settings.precision, weights)
                    engine, why = reuse(before, target, work, graph.name, key)
                    if engine is None:
                        reason = f", as {why}" if why else ""
                        progress(f"building an engine of {graph.name}{reason}")
                        engine = build_engine(work, graph, takes, usual, library, progress)
                    engines.append((engine, key))
            _write_prompts(pipe, work / PROMPTS)
            progress("hashing")
            entries = {
                "model": {"name": name, "weights": weights},
                "precision": settings.precision,
                "opset": settings.opset,
                "limits": {"batch": settings.limits.batch, "side": settings.limits.side},
                "checks": settings.as_dict(),
                "graphs": {w.graph: {"file": w.file, "nodes": w.nodes} for w in written},
                "engines": _engines(engines),
                "runtime": _runtime(pipe, scheduler),
                "versions": versions(*_LIBRARIES),
            }
            write_manifest(work, entries | {"parity": "not checked"})
            if settings.check:
                programs = {w.graph: w.program for w in written if w.program is not None}
                checks = compare(pipe, work, settings.device, programs, progress)
                write_report(work, entries, checks)
            files = [w.file for w in written] + [engine.file for engine, _ in engines]
            size = {file: _megabytes(work, file) for file in files}
            if not all(c.passed for c in checks):
                _put_aside(work, failed)
                folder = failed
                raise _FailedError
    except _FailedError:
        pass
    return Export(folder, written, checks, [engine for engine, _ in engines], size)


def check_folder(
    pipe: MiMDiTPipeline,
    target: Path,
    manifest: dict[str, Any],
    device: str,
    progress: Callable[[str], None] = lambda _: None,
) -> Export:
    """Compare an exported folder with its model again, and write down what came out.

    pipe: as for `export_folder`. manifest: of `verify`. A folder whose gates fail stays where it is
    and says so, whereupon the runtime refuses it.
    """
    entries = {k: v for k, v in manifest.items() if k not in ("format", "files", "sha256")}
    with finished_folder(target) as work:
        # Links: writing them would write those of the folder that is to be replaced.
        for name in manifest["files"]:
            if name != PARITY:
                link(target / name, work / name)
        write_manifest(work, entries | {"parity": "not checked"})
        checks = compare(pipe, work, device, {}, progress)
        write_report(work, entries, checks)
    graphs = [Written(k, g["file"], g["nodes"], 0.0) for k, g in manifest["graphs"].items()]
    engines = [
        Engine(graph, name, e["file"], e["report"], 0.0, reused=True)
        for name, entry in manifest["engines"].items()
        for graph, e in entry.items()
    ]
    size = {x.file: _megabytes(target, x.file) for x in (*graphs, *engines)}
    return Export(target, graphs, checks, engines, size)


def write_report(folder: Path, entries: dict[str, Any], checks: Sequence[Check]) -> None:
    """The checks as `parity.json`, and the verdict in the manifest."""
    passed = all(check.passed for check in checks)
    report = {"passed": passed, "checks": [check.as_dict() for check in checks]}
    text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / PARITY).write_text(text + "\n", encoding="utf-8")
    write_manifest(folder, entries | {"parity": "passed" if passed else "failed"})


def _engines(engines: Sequence[tuple[Engine, dict[str, Any]]]) -> dict[str, Any]:
    """By library and graph."""
    found: dict[str, Any] = {}
    for engine, key in engines:
        entry = {"file": engine.file, "report": engine.report, "key": key}
        found.setdefault(engine.library, {})[engine.graph] = entry
    return found


def _enough_space(pipe: MiMDiTPipeline, target: Path, settings: Settings) -> None:
    """ExportError where the disk cannot hold the weights, in graphs and engines."""
    parts = [p for part in (pipe.transformer, pipe.vae) for p in part.parameters()]
    wanted = sum(p.numel() * p.element_size() for p in parts) * (1 + len(settings.targets))
    place = next(p for p in (target, *target.absolute().parents) if p.exists())
    free = shutil.disk_usage(place).free
    if free < wanted:
        raise ExportError(
            f"{target}: expected at least {wanted / 1e9:.2f} GB of free disk space, "
            f"got {free / 1e9:.2f} GB"
        )


def _scheduler(pipe: MiMDiTPipeline) -> dict[str, float]:
    """What `runtime.euler_sigmas` needs; it knows statically shifted Euler steps alone."""
    scheduler, config = pipe.scheduler, dict(pipe.scheduler.config)
    other = [
        name
        for name in (
            "use_dynamic_shifting",
            "shift_terminal",
            "invert_sigmas",
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "stochastic_sampling",
        )
        if config.get(name)
    ]
    if type(scheduler) is not FlowMatchEulerDiscreteScheduler or other:
        got = ", ".join([type(scheduler).__name__, *other])
        raise ExportError(f"scheduler: expected plain FlowMatchEulerDiscreteScheduler, got {got}")
    return {
        "shift": float(scheduler.shift),
        "sigma_max": float(scheduler.sigma_max),
        "sigma_min": float(scheduler.sigma_min),
        "train_steps": int(config["num_train_timesteps"]),
    }


def _runtime(pipe: MiMDiTPipeline, scheduler: dict[str, float]) -> dict[str, Any]:
    """What the runtime needs to know of the pipeline."""
    config, codec = pipe.transformer.config, pipe.vae
    vae, mim = isinstance(codec, AutoencoderKL), pipe.transformer.mim
    return {
        "codec": "vae" if vae else "pixel",
        "factor": codec_factor(codec),
        "channels": config["in_channels"],
        "codec_side": codec_side(pipe) if vae else None,
        "patch_size": config["patch_size"],
        "sample_size": config["sample_size"],
        "min_tokens": MIN_TOKENS,
        "default_steps": pipe.config["default_steps"],
        "default_shifts": pipe.config["default_shifts"],
        "prompts": list(config["prompts"]),
        "mixtures": {"groups": list(mim.groups), "experts": mim.experts},
        "scheduler": scheduler,
    }


def _write_prompts(pipe: MiMDiTPipeline, path: Path) -> None:
    model = pipe.transformer
    text, pooled = (
        x.detach().float().cpu().numpy() for x in (model.prompt_embeds, model.pooled_prompt_embeds)
    )
    np.savez(path, text=text, pooled_text=pooled)


def _megabytes(folder: Path, file: str) -> float:
    """Of a graph and its weights."""
    return sum(path.stat().st_size for path in folder.glob(f"{file}*")) / 1e6


def _put_aside(work: Path, failed: Path) -> None:
    shutil.rmtree(failed, ignore_errors=True)
    work.rename(failed)
