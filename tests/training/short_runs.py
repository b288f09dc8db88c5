"""Settings of runs of seconds."""

from dataclasses import replace
from pathlib import Path

from training.config import Settings


def settings(folder: Path, steps: int) -> Settings:
    return Settings(
        output=str(folder),
        steps=steps,
        stages=((32, 3, 0.5), (64, 2, 0.5)),
        warmup=2,
        checkpointing_steps=2,
        workers=0,
        balance=0.01,
    )


def quick(folder: Path, steps: int, **changed: object) -> Settings:
    run = replace(settings(folder, steps), stages=((32, 1, 1.0),), checkpointing_steps=1)
    return replace(run, keep_checkpoints=0, log_steps=1, **changed)
