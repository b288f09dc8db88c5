"""Optimisers and their learning rates."""

import math

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer


def optimizers(
    model: nn.Module, learning_rate: float, matrix_learning_rate: float, weight_decay: float = 0.0
) -> list[Optimizer]:
    """Muon (Jordan et al., 2024) for the backbone's hidden matrices, AdamW for everything else.

    Muon with the update size of arXiv 2502.16982. The experts' banks, embeddings, the output layer
    and the modulation by time stay with AdamW. Only parameters that require a gradient.
    """
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


def warmup_cosine(
    optimizer: Optimizer, warmup: int, steps: int, floor: float = 0.02
) -> torch.optim.lr_scheduler.LambdaLR:
    """Linear warm-up over `warmup` steps, then a half cosine down to `floor` at `steps`."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        done = min((step - warmup) / max(steps - warmup, 1), 1.0)
        return floor + (1 - floor) * 0.5 * (1 + math.cos(done * math.pi))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
