"""What a run is: settings, the presets of them, and files of overrides."""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

OPTIMIZERS = ("muon", "adam", "adamw", "adam8bit")
SCHEDULES = ("cosine", "constant")
WEIGHTINGS = ("none", "sigma_squared")
Sizes = int | tuple[int, ...]
Stage = tuple[Sizes, Sizes, float]


@dataclass(frozen=True)
class Settings:
    """How to train; the stages are (crop in pixels, pictures a pass, share of the steps).

    Several crops (128, 256) of a stage are taken in turn, step by step; pictures a pass are those
    of each, (12, 4), or one number for all.

    A pass is one process's forward and backward; a step is `accumulation` of them in every process,
    or as many as make `total_batch` pictures where that is given (0: it is not).

    clip: the norm that gradients are clipped to (0: they are not). data: a folder; dataset: its
    layout (`training.datasets.layouts`), None: clean pictures that join the built-in ones; types:
    damages to take of it. latents: folder of a cache of `latents_pairs` pairs.
    """

    output: str = "runs/tiny"
    steps: int = 3000
    stages: tuple[Stage, ...] = ((128, 12, 0.6), (256, 3, 0.4))
    learning_rate: float = 8e-4
    matrix_learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.995
    t_mean: float = 0.5
    t_std: float = 1.2
    pure_noise: float = 0.8
    weighting: str = "none"
    balance: float = 0.0
    mixtures: float = 0.25
    tiled: float = 0.0
    accumulation: int = 1
    checkpointing_steps: int = 250
    keep_checkpoints: int = 2
    seed: int = 0
    workers: int = 1
    data: str | None = None
    dataset: str | None = None
    types: tuple[str, ...] | None = None
    mixed_precision: str = "bf16"
    train_backbone: bool = True
    optimizer: str = "muon"
    schedule: str = "cosine"
    total_batch: int = 0
    sharded: bool = False
    log_steps: int = 25
    report_to: str = "none"
    validation_steps: int = 0
    validation_size: int = 256
    validation_data: str | None = None
    validation_dataset: str = "clean"
    latents: str | None = None
    latents_pairs: int = 10_000

    def __post_init__(self) -> None:
        total = sum(share for _, _, share in self.stages)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"stages: expected shares that add up to 1, got {total:g}")
        for crop, batch in (size for stage in self.stages for size in in_turn(stage)):
            if crop < 1 or batch < 1:
                raise ValueError(f"stages: expected crops and batches from 1, got {crop}:{batch}")
        for name, allowed in _ALLOWED.items():
            if getattr(self, name) not in allowed:
                expected = ", ".join(allowed)
                raise ValueError(f"{name}: expected one of {expected}, got {getattr(self, name)!r}")
        for name, least in _LEAST.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        for name in _SHARES:
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}: expected 0 to 1, got {getattr(self, name)}")


_ALLOWED = {
    "optimizer": OPTIMIZERS,
    "schedule": SCHEDULES,
    "weighting": WEIGHTINGS,
    "mixed_precision": ("no", "bf16"),
    "report_to": ("none", "tensorboard"),
}
_LEAST = {
    "steps": 1,
    "accumulation": 1,
    "checkpointing_steps": 1,
    "log_steps": 1,
    "latents_pairs": 1,
    "seed": 0,
    "warmup": 0,
    "keep_checkpoints": 0,
    "total_batch": 0,
    "workers": 0,
    "validation_steps": 0,
    "validation_size": 1,
    "learning_rate": 0,
    "matrix_learning_rate": 0,
    "weight_decay": 0,
    "clip": 0,
    "balance": 0,
    "t_std": 0,
}
_SHARES = ("ema", "mixtures", "tiled", "pure_noise")


@dataclass(frozen=True)
class Model:
    """What to train: `init` (a shipped model, a folder of `mimdit-init` or of a run), a new one on
    an SD3.5 backbone, or a preset of `mimdit.presets` with fresh weights; `options` replace single
    settings of new ones.

    inference_steps, inference_shifts: what the trained model recommends; None: as the one that it
    starts from, and of presets one step with four grids.
    """

    preset: str = "tiny"
    init: str | None = None
    backbone: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = False
    inference_steps: int | None = None
    inference_shifts: int | None = None

    def __post_init__(self) -> None:
        if self.inference_steps is not None and self.inference_steps < 1:
            raise ValueError(f"inference_steps: expected at least 1, got {self.inference_steps}")
        if self.inference_shifts not in (None, 1, 2, 4):
            raise ValueError(f"inference_shifts: expected 1, 2 or 4, got {self.inference_shifts}")


# Keys are the flags' names, with underscores. Not stated by the paper: learning rate (DiT4SR's),
# steps, moving average; see DESIGN.md.
PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "debug": {
        "model": "debug",
        "output": "runs/debug",
        "max_train_steps": 40,
        "stages": "32:4:1",
        "lr_warmup_steps": 4,
        "checkpointing_steps": 10,
        "logging_steps": 5,
        "mixed_precision": "no",
        "dataloader_num_workers": 0,
    },
    "paper": {
        "model": "sd35-medium",
        "output": "runs/paper",
        "max_train_steps": 100_000,
        "stages": "512:8:1",
        "total_batch_size": 128,
        "optimizer": "adam",
        "learning_rate": 5e-5,
        "lr_scheduler": "constant",
        "lr_warmup_steps": 0,
        "ema_decay": 0.9999,
        "time_mean": 0.0,
        "time_std": 1.0,
        "pure_noise": 0.0,
        "freeze_backbone": True,
        "gradient_checkpointing": True,
        "checkpointing_steps": 1000,
        "dataloader_num_workers": 8,
        "inference_steps": 40,
        "inference_shifts": 1,
    },
}
# Tables 3 to 5 of the paper: what each variant changes.
ABLATIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "no-intra": {"experts": 1, "top_k": 1},
    **{f"{kind}-only": {"groups": [kind] * 4} for kind in ("spatial", "channel", "swin", "se")},
    "sparse-sparse": {"inter": "sparse", "intra": "sparse"},
    "sparse-dense": {"inter": "sparse", "intra": "dense"},
}
PRESETS |= {
    f"{base}-ablation-{name}": PRESETS[base] | changed | {"output": f"runs/{base}-ablation-{name}"}
    for base in ("tiny", "debug")
    for name, changed in ABLATIONS.items()
}


def preset(name: str) -> dict[str, Any]:
    """The overrides of a preset; ValueError for an unknown one."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    return dict(PRESETS[name])


def read(path: str | Path, known: set[str]) -> dict[str, Any]:
    """Overrides in a YAML, TOML or JSON file; keys are flags' names, dashes or underscores.

    Raises ValueError for a file of another kind, one that is not a table, or an unknown key.
    """
    file = Path(path)
    if not file.is_file():
        expected = f"a preset ({', '.join(PRESETS)}) or a .yaml, .toml or .json file"
        raise ValueError(f"--config: expected {expected}, got {str(path)!r}")
    try:
        found = _parse(file)
    except (ValueError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ValueError(f"--config: {file} cannot be read: {first}") from None
    if not isinstance(found, dict):
        raise ValueError(f"--config: expected a table of settings in {file}, got {found!r}")
    values = {str(key).replace("-", "_"): value for key, value in found.items()}
    for key in values.keys() - known:
        near = get_close_matches(key, known, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"--config: expected names of flags in {file}, got {key!r}{hint}")
    return values


def _parse(file: Path) -> Any:
    text, kind = file.read_text(), file.suffix.lower()
    if kind == ".toml":
        return tomllib.loads(text)
    if kind == ".json":
        return json.loads(text)
    if kind not in (".yaml", ".yml"):
        raise ValueError(f"expected .yaml, .toml or .json, got {file.suffix!r}")
    # Comes with accelerate.
    import yaml

    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace("\n", " ")) from None


def in_turn(stage: Stage) -> tuple[tuple[int, int], ...]:
    """Crop, and pictures of a pass, of the steps of a stage in turn; ValueError where there are not
    as many of each."""
    crops = stage[0] if isinstance(stage[0], tuple) else (stage[0],)
    counts = stage[1] if isinstance(stage[1], tuple) else (stage[1],) * len(crops)
    if not crops or len(counts) != len(crops):
        raise ValueError(f"stages: expected as many batches as crops, got {counts} for {crops}")
    return tuple(zip(crops, counts, strict=True))


def parse_stages(text: str) -> tuple[Stage, ...]:
    """ "crop:batch:share;…" as stages, "crop:batch+crop:batch:share" as one whose crops take turns;
    ValueError where it does not parse."""
    try:
        return tuple(_parse_stage(stage) for stage in text.split(";"))
    except ValueError:
        expected = "crop:batch:share;…, such as 128:12:0.6;256:3:0.4 or 128:12+256:3:1"
        raise ValueError(f"--stages: expected {expected}, got {text!r}") from None


def _parse_stage(text: str) -> Stage:
    sizes, share = text.rsplit(":", 1)
    pairs = [size.split(":") for size in sizes.split("+")]
    found = [(int(crop), int(batch)) for crop, batch in pairs]
    if len(found) == 1:
        return *found[0], float(share)
    crops, counts = zip(*found, strict=True)
    return crops, counts, float(share)
