"""A pipeline as a folder: graphs, prompts, parity report and manifest."""

import copy
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from export.graphs import graphs_of, traceable
from export.libraries import ExportError, versions
from export.manifest import finished_folder, weights_hash, write_manifest
from export.onnx_export import Limits, Written, export_onnx
from export.parity import Check, Picture, Size, check_graphs, check_picture
from export.runtime import ExportedPipeline
from export.tensorrt_rtx import Engine, build_engine
from mimdit.codec import codec_factor
from mimdit.pipeline import _MIN_TOKENS, MiMDiTPipeline
from mimdit.sampling import SHIFTS, grid_places

PROMPTS, PARITY = "prompts.npz", "parity.json"
_LIBRARIES = (
    *("mimdit", "torch", "diffusers"),
    *("onnx", "onnxscript", "onnxruntime", "tensorrt-rtx"),
)


@dataclass(frozen=True)
class Settings:
    """What to export: sizes that the graphs take, and sizes (in tokens) to check them at.

    picture: restored for the check, too. capabilities: of GPUs that TensorRT-RTX engines are built
    for; none builds none.
    """

    limits: Limits
    sizes: Sequence[Size]
    precision: str = "fp32"
    opset: int = 18
    check: bool = True
    device: str = "cpu"
    picture: Picture | None = None
    capabilities: Sequence[str] = ()


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
    limits = settings.limits
    config = pipe.transformer.config
    side = min(config["sample_size"] // config["patch_size"], limits.side[1])
    tokens = limits.batch[1] * side**2
    written: list[Written] = []
    checks: list[Check] = []
    engines: list[Engine] = []
    size: dict[str, float] = {}
    failed = target.with_name(f"{target.name}.failed")
    folder = target
    try:
        with finished_folder(target) as work:
            for graph in graphs_of(pipe):
                progress(f"exporting {graph.name}")
                takes = _codec_limits(pipe, limits) if "vae" in graph.name else limits
                with traceable(pipe, tokens):
                    written.append(export_onnx(graph, work, takes, settings.opset))
                if settings.capabilities:
                    progress(f"building an engine of {graph.name}")
                    engines.append(build_engine(work, graph, takes, side, settings.capabilities))
            _write_prompts(pipe, work / PROMPTS)
            progress("hashing")
            entries = {
                "model": {"name": name, "weights": weights_hash((pipe.transformer, pipe.vae))},
                "precision": settings.precision,
                "opset": settings.opset,
                "limits": {"batch": limits.batch, "side": limits.side},
                "graphs": {w.graph: {"file": w.file, "nodes": w.nodes} for w in written},
                "engines": {
                    e.graph: {"file": e.file, "capabilities": list(settings.capabilities)}
                    for e in engines
                },
                "runtime": _runtime(pipe, scheduler),
                "versions": versions(*_LIBRARIES),
            }
            write_manifest(work, entries | {"parity": "not checked"})
            if settings.check:
                checks = _check(pipe, work, settings, progress)
                passed = all(c.passed for c in checks)
                report = {"passed": passed, "checks": [c.as_dict() for c in checks]}
                text = json.dumps(report, indent=1, allow_nan=False, ensure_ascii=False)
                (work / PARITY).write_text(text + "\n")
                write_manifest(work, entries | {"parity": "passed" if passed else "failed"})
            size = {x.file: _megabytes(work, x.file) for x in (*written, *engines)}
            if not all(c.passed for c in checks):
                _put_aside(work, failed)
                folder = failed
                raise _FailedError
    except _FailedError:
        pass
    return Export(folder, written, checks, engines, size)


def _codec_limits(pipe: MiMDiTPipeline, limits: Limits) -> Limits:
    """The codec takes whole pictures, not tiles."""
    patch = codec_factor(pipe.vae) * pipe.transformer.config["patch_size"]
    low, high = limits.side
    largest = max(high, pipe.vae.tile_sample_min_size // patch)
    return Limits(limits.batch, (min(low, 8), largest))


def _check(
    pipe: MiMDiTPipeline, work: Path, settings: Settings, progress: Callable[[str], None]
) -> list[Check]:
    """What is shipped is what is checked: the files, read back."""
    progress("loading the graphs")
    exported = ExportedPipeline(work, settings.device)
    wide = None if settings.precision == "fp32" else _in_float32(pipe)
    checks = check_graphs(
        pipe, exported.graphs, settings.precision, settings.sizes, wide, progress=progress
    )
    if settings.picture is not None:
        progress("restoring a picture")
        checks.append(check_picture(pipe, exported, settings.precision, settings.picture))
    return checks


def _in_float32(pipe: MiMDiTPipeline) -> MiMDiTPipeline:
    """The same rounded weights, computed with in float32."""
    return MiMDiTPipeline(
        copy.deepcopy(pipe.transformer).float(), copy.deepcopy(pipe.vae).float(), pipe.scheduler
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
    patch = codec_factor(codec) * config["patch_size"]
    vae = isinstance(codec, AutoencoderKL)
    return {
        "codec": "vae" if vae else "pixel",
        "factor": codec_factor(codec),
        "largest": int(codec.tile_sample_min_size) if vae else None,
        "patch_size": config["patch_size"],
        "sample_size": config["sample_size"],
        "min_tokens": _MIN_TOKENS,
        "default_steps": pipe.config["default_steps"],
        "default_shifts": pipe.config["default_shifts"],
        "places": {str(n): grid_places(n, patch) for n in SHIFTS},
        "prompts": list(config["prompts"]),
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
