"""Checkpoints: folders that are complete or not there at all.

A folder is written beside its place, flushed to the disk and then renamed; one that is dropped is
renamed before it is deleted. So whenever a run is killed, every `checkpoint-N` is whole. The format
is the same for one process, several, and sharded ones:

    model.safetensors      trained parameters, and the routers' running means
    ema.safetensors        averages of the trained parameters
    optimizer.bin, optimizer_1.bin …    `state_dict` of each optimiser
    state.json             the step, the number of processes, the settings of run and model
"""

import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Optimizer

from mimdit.errors import first_line
from mimdit.transformer import MiMDiTTransformer2DModel
from training.config import Settings
from training.parallel import Team, like, whole

_MODEL, _EMA, _STATE = "model.safetensors", "ema.safetensors", "state.json"


def found(out: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folders = [p for p in out.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return sorted(folders, key=step_of)


def step_of(folder: Path) -> int:
    """The number of steps taken before a checkpoint."""
    return int(folder.name.split("-")[1])


def locate(out: Path, resume: str) -> Path:
    """The folder meant by a path, by a name in a run's folder, or by "latest" of a run; ValueError
    where there is none."""
    if resume != "latest":
        for folder in (Path(resume), out / resume):
            if (folder / _STATE).is_file():
                return folder
        raise ValueError(f"resume: expected a checkpoint-N folder, got {resume}")
    folders = found(out)
    if not folders:
        raise ValueError(f"resume: expected a checkpoint-N folder in {out}, found none")
    return folders[-1]


class Checkpoint:
    """What a run's future depends on, besides its settings and the number of the step."""

    def __init__(
        self,
        model: MiMDiTTransformer2DModel,
        optimisers: Sequence[Optimizer],
        ema: EMAModel,
        settings: Settings,
        team: Team,
    ) -> None:
        self.optimisers, self.ema, self.settings, self.team = optimisers, ema, settings, team
        self.config = _plain(model)
        self.trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.buffers = {f"mim.{n}": b for n, b in model.mim.named_buffers()}

    def save(self, out: Path, step: int) -> None:
        """Write `checkpoint-step`, and drop the oldest beyond `keep_checkpoints`."""
        shadows = dict(zip(self.trained, self.ema.shadow_params, strict=True))
        main = self.team.main
        model, average = (_gathered(part, main) for part in (self.trained | self.buffers, shadows))
        states = [_gathered(optimizer.state_dict(), main) for optimizer in self.optimisers]
        if main:
            folder = out / f"checkpoint-{step}"
            unfinished = out / f".unfinished-{step}"
            clear(out)
            unfinished.mkdir()
            content = {"step": step, "processes": self.team.processes}
            content |= {"settings": asdict(self.settings), "model": self.config}
            with writing(unfinished, folder):
                save_file(model, unfinished / _MODEL)
                save_file(average, unfinished / _EMA)
                for i, state in enumerate(states):
                    torch.save(state, unfinished / _optimizer_name(i))
                (unfinished / _STATE).write_text(json.dumps(content, indent=1))
                move(unfinished, folder)
            for old in found(out)[: -self.settings.keep_checkpoints or None]:
                # With keep_checkpoints = 0 all stay; never the one just written.
                if self.settings.keep_checkpoints and old != folder:
                    _drop(old)
        self.team.wait()

    @torch.no_grad()
    def load(self, folder: Path) -> int:
        """Take over a checkpoint; returns its step. ValueError where it is of another model, or
        broken.

        Learning rates and the like are the settings', which may have changed since.
        """
        try:
            model, average = (load_file(folder / name) for name in (_MODEL, _EMA))
        except SafetensorError as error:
            raise ValueError(f"resume: {folder} is broken: {first_line(error)}") from error
        self._copy(self.trained | self.buffers, model, folder)
        self._copy(dict(zip(self.trained, self.ema.shadow_params, strict=True)), average, folder)
        step = json.loads((folder / _STATE).read_text())["step"]
        self.ema.optimization_step = step
        for i, optimizer in enumerate(self.optimisers):
            if not (folder / _optimizer_name(i)).is_file():
                raise ValueError(f"resume: {folder} was written with other optimisers")
            state = torch.load(folder / _optimizer_name(i), map_location="cpu", weights_only=True)
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            if len(parameters) != sum(len(g["params"]) for g in state["param_groups"]):
                raise ValueError(f"resume: {folder} was written with other optimisers")
            for number, values in state["state"].items():
                for name, value in values.items():
                    # Steps are scalars, and Adam counts them on the CPU.
                    if isinstance(value, Tensor) and value.ndim:
                        values[name] = like(value, parameters[number])
            own = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            optimizer.load_state_dict(state)
            for group, values in zip(optimizer.param_groups, own, strict=True):
                # The rate that `set_rates` starts from is again that of the settings.
                group.pop("initial_lr", None)
                group.update(values)
        return step

    @staticmethod
    def _copy(own: Mapping[str, Tensor], stored: Mapping[str, Tensor], folder: Path) -> None:
        wrong = sorted(own.keys() ^ stored.keys())
        wrong += [n for n in own.keys() & stored.keys() if own[n].shape != stored[n].shape]
        if wrong:
            raise ValueError(
                f"resume: {folder} is of another model or trains other parts: "
                f"{len(wrong)} tensors differ ({wrong[0]}, …)"
            )
        for name, tensor in own.items():
            tensor.copy_(like(stored[name], tensor))


def changes(
    folder: Path, settings: Settings, processes: int, model: MiMDiTTransformer2DModel | None = None
) -> list[str]:
    """Settings, and those of the model, that differ from what a checkpoint was written with, as
    "name: before → now", and the number of processes where steps have other pictures with it."""
    state = json.loads((folder / _STATE).read_text())
    # Shapes of tensors tell some models apart, but not their routing.
    before = state["settings"] | state.get("model", {})
    now = json.loads(json.dumps(asdict(settings))) | ({} if model is None else _plain(model))
    if not settings.total_batch and "processes" in state:
        before = before | {"processes": state["processes"]}
        now["processes"] = processes
    return [
        f"{name}: {before[name]} → {value}"
        for name, value in now.items()
        if name in before and before[name] != value
    ]


def set_aside_later(out: Path, step: int) -> list[Path]:
    """Rename the checkpoints of a run that are later than the step it goes on from: they are of
    another future, and "latest" must not find them. Returns their new places."""
    moved = []
    for later in found(out):
        if step_of(later) > step:
            aside = out / f"left-{later.name}"
            if aside.exists():
                _drop(aside)
            moved.append(later.rename(aside))
    return moved


def clear(out: Path) -> None:
    """Remove what a killed run left half-written or half-deleted."""
    for pattern in (".unfinished-*", ".dropped-*"):
        for folder in out.glob(pattern):
            shutil.rmtree(folder)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    unfinished = path.with_name(f".{path.name}.partial")
    unfinished.write_text(text)
    sync(unfinished)
    unfinished.replace(path)


def move(unfinished: Path, folder: Path) -> None:
    """Give a folder whose files are on the disk its name, in place of one that has it."""
    for file in unfinished.rglob("*"):
        sync(file)
    sync(unfinished)
    if folder.exists():
        _drop(folder)
    unfinished.rename(folder)
    sync(folder.parent)


@contextmanager
def writing(unfinished: Path, path: Path) -> Iterator[None]:
    """Of a file or folder: OSError, in one sentence, for all that fails; no half of it stays."""
    try:
        yield
    # A full disk is another error to each of the libraries that write.
    except (OSError, RuntimeError, SafetensorError) as error:
        if unfinished.is_dir():
            shutil.rmtree(unfinished, ignore_errors=True)
        else:
            unfinished.unlink(missing_ok=True)
        raise OSError(f"{path} cannot be written: {first_line(error)}") from error


def _plain(model: MiMDiTTransformer2DModel) -> dict[str, Any]:
    """The model's settings as JSON has them."""
    found = {k: v for k, v in dict(model.config).items() if not k.startswith("_")}
    return json.loads(json.dumps(found, default=str))


def _drop(folder: Path) -> None:
    moved = folder.with_name(f".dropped-{folder.name}")
    folder.rename(moved)
    shutil.rmtree(moved)


def _optimizer_name(i: int) -> str:
    return f"optimizer_{i}.bin" if i else "optimizer.bin"


def _gathered(tree: Any, keep: bool) -> Any:
    """Tensors in nested dictionaries as whole, contiguous ones on the CPU; all processes must help
    to gather sharded ones, only those that `keep` them get memory for them."""
    if isinstance(tree, Tensor):
        full = whole(tree)
        return full.cpu().contiguous() if keep else None
    if isinstance(tree, dict):
        return {key: _gathered(value, keep) for key, value in tree.items()}
    return tree
