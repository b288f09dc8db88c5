"""Optimisers and their learning rates."""

import math
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

from training.config import Settings


def optimizers(
    model: nn.Module,
    learning_rate: float,
    matrix_learning_rate: float,
    weight_decay: float = 0.0,
    kind: str = "muon",
) -> list[Optimizer]:
    """Of the parameters that require a gradient.

    - "muon": Muon (Jordan et al., 2024) for the backbone's hidden matrices, AdamW for everything
      else. Muon with the update size of arXiv 2502.16982. The experts' banks, embeddings, the
      output layer and the modulation by time stay with AdamW.
    - "adam", "adamw": torch's, for everything. "adam8bit": that of bitsandbytes.

    Raises ValueError where bitsandbytes is needed and missing.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "adam":
        return [torch.optim.Adam(trained, learning_rate, weight_decay=weight_decay)]
    if kind == "adamw":
        return [AdamW(trained, learning_rate, weight_decay=weight_decay)]
    if kind == "adam8bit":
        return [_adam8bit(trained, learning_rate, weight_decay)]
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            hidden = name.startswith("transformer_blocks.") and ".norm" not in name
            (matrices if hidden and parameter.ndim == 2 else rest).append(parameter)
    found: list[Optimizer] = []
    if matrices:
        found.append(
            Muon(
                matrices,
                matrix_learning_rate,
                weight_decay=weight_decay,
                adjust_lr_fn="match_rms_adamw",
            )
        )
    if rest:
        found.append(AdamW(rest, learning_rate, betas=(0.9, 0.95), weight_decay=weight_decay))
    return found


def _adam8bit(trained: list[nn.Parameter], rate: float, decay: float) -> Optimizer:
    try:
        from bitsandbytes.optim import Adam8bit  # pyright: ignore[reportMissingImports]
    # Builds for another CUDA version fail with other errors than a missing package does.
    except Exception as error:
        raise ValueError(
            "optimizer: adam8bit needs bitsandbytes: pip install bitsandbytes"
        ) from error
    # Its annotation of the decay says int.
    options: dict[str, Any] = {"lr": rate, "weight_decay": decay}
    return Adam8bit(trained, **options)


def rate_factor(step: int, settings: Settings, floor: float = 0.02) -> float:
    """What a step's learning rates are multiplied by.

    Linear warm-up over `warmup` steps; then 1 ("constant"), or a half cosine down to `floor` at
    `steps` ("cosine").
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    if settings.schedule == "constant":
        return 1.0
    done = min((step - settings.warmup) / max(settings.steps - settings.warmup, 1), 1.0)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(done * math.pi))


def set_rates(optimisers: list[Optimizer], step: int, settings: Settings) -> None:
    """Learning rates for a step; they follow from its number and need not be stored."""
    for optimizer in optimisers:
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            group["lr"] = group["initial_lr"] * rate_factor(step, settings)
