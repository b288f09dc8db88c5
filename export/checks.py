"""One comparison of an exported graph with the model, and its gate."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

# err = ‖a − b‖/‖b‖ of one step's outputs, by precision.
GATES = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2}


@dataclass(frozen=True)
class Check:
    """One comparison: error must not exceed the gate; without a gate it is only reported.

    size: batch×rows×columns, in tokens. inputs: random ones, or a photograph. weights: the model's
    own, or drawn ones. place: where a graph that failed first differs (`export.locate`). fed: its
    inputs, to find that out.
    """

    graph: str
    output: str
    size: str
    error: float
    gate: float | None
    note: str = ""
    inputs: str = "random"
    weights: str = "own"
    place: str = ""
    fed: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        return self.error <= (math.inf if self.gate is None else self.gate)

    def of(self, runtime: str) -> "Check":
        """The same, named as one of an engine."""
        return replace(self, graph=f"{self.graph} ({runtime})")

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN or infinity."""
        error = self.error if math.isfinite(self.error) else str(self.error)
        rest = {name: value for name, value in vars(self).items() if name != "fed"}
        return rest | {"error": error, "passed": self.passed}


def relative_error(a: np.ndarray | Tensor, b: Tensor) -> float:
    """‖a − b‖/‖b‖; of a zero reference ‖a‖. NaN where the shapes differ."""
    wide, found = b.detach().double().cpu(), torch.as_tensor(a).double().cpu()
    if found.shape != wide.shape:
        return math.nan
    return float((found - wide).norm() / (wide.norm() if wide.norm() > 0 else 1))
