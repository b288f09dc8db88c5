"""The flags of `mimdit-train`, which are also the keys of presets and configuration files."""

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mimdit.presets import PRESETS as MODELS
from training import config
from training.config import (
    ABLATIONS,
    OPTIMIZERS,
    SCHEDULES,
    WEIGHTINGS,
    Model,
    Settings,
    in_turn,
    parse_stages,
)
from training.datasets.layouts import LAYOUTS

GROUPS = ("spatial", "channel", "swin", "se")


@dataclass(frozen=True)
class Flag:
    """A flag `--name`, the field that it sets, and how it is read; kind bool takes no value."""

    name: str
    field: str
    kind: type
    help: str
    choices: tuple[str, ...] | None = None
    many: bool = False

    @property
    def key(self) -> str:
        return self.name.replace("-", "_")


RUN = (
    Flag("output", "output", str, "folder of log, checkpoints and the model"),
    Flag("data", "data", str, "folder of pictures: of --dataset, else clean ones"),
    Flag(
        "dataset",
        "dataset",
        str,
        "layout of --data; without it the built-in pictures "
        "join those of --data, and damages are drawn on the fly",
        tuple(LAYOUTS),
    ),
    Flag("types", "types", str, "damages to take of the data set, such as 05Noise", many=True),
    Flag("mixtures", "mixtures", float, "share of mixtures among drawn damages"),
    Flag(
        "tiled",
        "tiled",
        float,
        "share of the steps that see larger crops as tiles with one routing, as large pictures are "
        "restored",
    ),
    Flag("max-train-steps", "steps", int, "steps of the optimiser"),
    Flag("gradient-accumulation-steps", "accumulation", int, "passes a step"),
    Flag(
        "total-batch-size",
        "total_batch",
        int,
        "pictures a step of all processes together, by as "
        "many passes as that takes; 0: whatever the passes make",
    ),
    Flag("optimizer", "optimizer", str, "muon: of hidden matrices, with AdamW", OPTIMIZERS),
    Flag("learning-rate", "learning_rate", float, "of AdamW and Adam"),
    Flag("matrix-learning-rate", "matrix_learning_rate", float, "of Muon"),
    Flag("lr-scheduler", "schedule", str, "after the warm-up", SCHEDULES),
    Flag("lr-warmup-steps", "warmup", int, "steps of linear warm-up"),
    Flag("weight-decay", "weight_decay", float, "decoupled; of adam added to the gradient"),
    Flag("max-grad-norm", "clip", float, "gradients are clipped to this norm; 0: not"),
    Flag("ema-decay", "ema", float, "of the averaged weights, which are what is saved"),
    Flag("time-mean", "t_mean", float, "of the logit-normal times"),
    Flag("time-std", "t_std", float, "of the logit-normal times"),
    Flag("pure-noise", "pure_noise", float, "share of draws at t = 1"),
    Flag("weighting-scheme", "weighting", str, "of the velocity's error", WEIGHTINGS),
    Flag("balance", "balance", float, "weight of load balancing"),
    Flag("mixed-precision", "mixed_precision", str, "of the passes", ("no", "bf16")),
    Flag("fsdp", "sharded", bool, "shard weights and optimiser states over processes (FSDP2)"),
    Flag("checkpointing-steps", "checkpointing_steps", int, "steps between checkpoints"),
    Flag("checkpoints-total-limit", "keep_checkpoints", int, "how many are kept; 0: all"),
    Flag("validation-steps", "validation_steps", int, "steps between validations; 0: none"),
    Flag("validation-size", "validation_size", int, "pixels a side"),
    Flag("validation-data", "validation_data", str, "folder of pictures to validate with"),
    Flag(
        "validation-dataset",
        "validation_dataset",
        str,
        "its layout; clean: every damage is drawn on the first pictures",
        tuple(LAYOUTS),
    ),
    Flag("logging-steps", "log_steps", int, "steps between rows of log.jsonl"),
    Flag("report-to", "report_to", str, "besides log.jsonl", ("none", "tensorboard")),
    Flag("cache-latents", "latents", str, "folder to keep latents in, computed once"),
    Flag("cache-pairs", "latents_pairs", int, "pairs in that cache"),
    Flag(
        "dataloader-num-workers",
        "workers",
        int,
        "processes that load, for each that trains and crop",
    ),
    Flag("seed", "seed", int, "of everything random"),
)
MODEL = (
    Flag("model", "preset", str, "size of a new model", tuple(MODELS)),
    Flag("init", "init", str, "a model to start from: tiny, or a folder such as mimdit-init's"),
    Flag("backbone", "backbone", str, "an SD3.5 folder or file to start a new model on"),
    Flag("gradient-checkpointing", "gradient_checkpointing", bool, "less memory, more time"),
    Flag("inference-steps", "inference_steps", int, "what the model recommends"),
    Flag("inference-shifts", "inference_shifts", int, "likewise, of the patch grid"),
)
# Settings of new models, as those of mimdit-init.
OPTIONS = (
    Flag("mim-dim", "mim_dim", int, "width of the mixtures"),
    Flag("groups", "groups", str, "kinds of the expert groups; may repeat", GROUPS, many=True),
    Flag("experts", "experts", int, "sub-experts a group"),
    Flag("top-k", "top_k", int, "active sub-experts"),
    Flag("inter", "inter", str, "between groups", ("dense", "sparse")),
    Flag("intra", "intra", str, "inside a group", ("dense", "sparse")),
    Flag("renormalize", "renormalize", bool, "let the active sub-experts' weights sum to one"),
)
# Keys that more than one field follows from.
_SHAPED = (
    Flag(
        "stages",
        "stages",
        str,
        "crop:batch:share of the steps, for each stage; batch is that of one process and pass; "
        "crops of 128:12+256:3:1 take turns, step by step",
    ),
    Flag("resolution", "resolution", int, "one stage of crops of so many pixels"),
    Flag("train-batch-size", "batch", int, "pictures of a process and pass, in every stage"),
    Flag("freeze-backbone", "freeze", bool, "train only the mixtures"),
)
_NEEDS = {
    "validation_data": "validation_steps",
    "validation_dataset": "validation_data",
    "cache_pairs": "cache_latents",
}
KEYS = {flag.key: flag for flag in (*RUN, *MODEL, *OPTIONS, *_SHAPED)}


def parser() -> argparse.ArgumentParser:
    """Flags as in diffusers' training scripts; what is not given is left out of the result."""
    p = argparse.ArgumentParser(
        prog="mimdit-train",
        description="Train a MiM-DiT; under `accelerate launch` or torchrun in many processes.",
        epilog="Flags override the file of --config, which overrides the preset.",
        argument_default=argparse.SUPPRESS,
    )
    variants = f"tiny-ablation-* for the paper's tables 3 to 5 ({', '.join(ABLATIONS)})"
    names = ", ".join(n for n in config.PRESETS if "-ablation-" not in n)
    file = "a preset, or a .yaml, .toml or .json file whose keys are names of flags (and preset)"
    p.add_argument("--preset", metavar="NAME", help=f"{names}; {variants} (default tiny)")
    p.add_argument("--config", metavar="NAME|FILE", help=file)
    p.add_argument("--resume-from-checkpoint", metavar="FOLDER", help="or latest: go on with a run")
    d = Settings()
    for title, flags in (
        ("run", (*_SHAPED, *RUN)),
        ("model", MODEL),
        ("mixtures of a new model", OPTIONS),
    ):
        group = p.add_argument_group(title)
        for flag in flags:
            default = getattr(d, flag.field, None)
            text = flag.help + ("" if default in (None, False) else f" (tiny: {default})")
            if flag.kind is bool:
                either = argparse.BooleanOptionalAction
                group.add_argument(f"--{flag.name}", action=either, help=text)
            else:
                group.add_argument(
                    f"--{flag.name}",
                    type=flag.kind,
                    choices=flag.choices,
                    nargs="+" if flag.many else None,
                    help=text,
                )
    return p


def resolve(given: Mapping[str, Any]) -> tuple[Settings, Model]:
    """Settings and model of parsed flags: preset, then file, then flags.

    Raises ValueError for unknown presets, keys and values.
    """
    file: dict[str, Any] = {}
    name, source = given.get("preset"), given.get("config")
    if source in config.PRESETS:
        if name is not None and name != source:
            raise ValueError(f"--config: expected a file beside --preset {name}, got {source!r}")
        name = source
    elif source is not None:
        file = config.read(source, {*KEYS, "preset"})
        name = name or file.pop("preset", None)
        file.pop("preset", None)
    values = config.preset(name or "tiny") | {key: _checked(key, v) for key, v in file.items()}
    values |= {key: value for key, value in given.items() if key in KEYS}
    _settle_passes(values, given, file)
    for name, other in _NEEDS.items():
        if (name in given or name in file) and not values.get(other):
            flag, beside = (f"--{key.replace('_', '-')}" for key in (name, other))
            raise ValueError(f"{flag}: expected {beside} beside it, without which it does nothing")
    # A shape given by a flag wins over one of the preset or the file, whatever its form.
    if "stages" in given:
        for key in ("resolution", "train_batch_size"):
            if key not in given:
                values.pop(key, None)
    model = {flag.field: values[flag.key] for flag in MODEL if flag.key in values}
    options = {flag.field: values[flag.key] for flag in OPTIONS if flag.key in values}
    run = {flag.field: values[flag.key] for flag in RUN if flag.key in values}
    if run.get("types") is not None:
        run["types"] = tuple(run["types"])
    stages = parse_stages(values["stages"]) if "stages" in values else Settings().stages
    if "resolution" in values:
        stages = ((values["resolution"], in_turn(stages[0])[0][1], 1.0),)
    if "train_batch_size" in values:
        stages = tuple((crop, values["train_batch_size"], share) for crop, _, share in stages)
    frozen = values.get("freeze_backbone", False)
    settings = Settings(**run, stages=stages, train_backbone=not frozen)
    return settings, Model(**model, options=options)


def _settle_passes(values: dict[str, Any], *layers: Mapping[str, Any]) -> None:
    """Passes are given or follow from the total batch: the first layer to say so decides, and where
    none does the preset. ValueError where one layer says both."""
    for layer in layers:
        total = layer.get("total_batch_size")
        passes = layer.get("gradient_accumulation_steps")
        if total and passes is not None:
            raise ValueError(
                "--gradient-accumulation-steps: expected none beside --total-batch-size, which it "
                f"follows from, got {passes} and {total}"
            )
        if total is not None:
            return
        if passes is not None:
            values["total_batch_size"] = 0
            return


def _checked(key: str, value: Any) -> Any:
    """A file's value in the type of its flag; ValueError where it does not fit."""
    flag = KEYS[key]
    many = value if flag.many and isinstance(value, list) else [value]
    try:
        if flag.kind is bool or any(isinstance(one, bool) for one in many):
            if not (flag.kind is bool and isinstance(value, bool)):
                raise ValueError
            return value
        found = [flag.kind(one) for one in many]
        # 2.5 steps are not 2.
        if flag.kind is int and any(float(one) != n for one, n in zip(many, found, strict=True)):
            raise ValueError
        if flag.choices and not set(found) <= set(flag.choices):
            raise ValueError
    except (TypeError, ValueError):
        wanted = ", ".join(flag.choices) if flag.choices else flag.kind.__name__
        raise ValueError(f"--config: {key}: expected {wanted}, got {value!r}") from None
    return found if flag.many else found[0]
