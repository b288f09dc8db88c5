"""Linear layers that read the same input, as one product."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class FusedLinear:
    """Several layers with one input: their outputs side by side.

    Their weights become views of one tensor, so nothing is stored twice and changes in place are
    seen; where they have been moved or replaced since, they are joined anew. Layers of other kinds
    than `nn.Linear` (LoRA, quantised) are called one by one.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        if self._plain():
            self._join()

    def __call__(self, x: Tensor) -> Tensor:
        if not self._plain():
            return torch.cat([layer(x) for layer in self.layers], dim=-1)
        # A compiler cannot look at addresses; the engine compiles anew where they change.
        if not torch.compiler.is_compiling() and not self._joined():
            self._join()
        assert self._weight is not None
        return F.linear(x, self._weight, self._bias)

    def _plain(self) -> bool:
        return all(type(layer) is nn.Linear for layer in self.layers)

    def _joined(self) -> bool:
        """Whether every layer's parameters still are views of the joint ones."""
        for name, joint in (("weight", self._weight), ("bias", self._bias)):
            row = 0
            for layer in self.layers:
                own = getattr(layer, name)
                if (own is None) != (joint is None):
                    return False
                if own is not None and joint is not None:
                    if row == len(joint) or own.data_ptr() != joint[row].data_ptr():
                        return False
                    row += len(own)
        return True

    @torch.no_grad()
    def _join(self) -> None:
        layers = [cast(nn.Linear, layer) for layer in self.layers]
        parts: list[Any] = [layer.weight for layer in layers]
        biases: list[Any] = [layer.bias for layer in layers]
        self._weight = _join(parts)
        with_bias = all(b is not None for b in biases)
        if not with_bias and any(b is not None for b in biases):
            raise ValueError("linear layers: expected a bias in all of them or in none")
        self._bias = _join(biases) if with_bias else None


def _join(parts: Sequence[Tensor]) -> Tensor:
    """One tensor of all rows, of which the given parameters become views."""
    joint = torch.cat([p.detach() for p in parts])
    for p, view in zip(parts, joint.split([len(p) for p in parts]), strict=True):
        p.data = view
    return joint
