"""Linear layers that read the same input, as one product."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimdit.engine.modes import kept
from mimdit.quantized import is_plain


class FusedLinear:
    """Several layers with one input: their outputs side by side.

    Their weights become views of one tensor, so nothing is stored twice and changes in place are
    seen; where they have been moved or replaced since, they are joined anew. Where they are such
    views already, of another engine of the model say, they stay. Layers that are not plain (LoRA,
    quantised, see `is_plain`) are called one by one.
    """

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.layers = list(layers)
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._follow()

    def __call__(self, x: Tensor) -> Tensor:
        # A compiler cannot look at addresses; the engine compiles anew where they change.
        if not torch.compiler.is_compiling():
            self._follow()
        if self._weight is None:
            return torch.cat([layer(x) for layer in self.layers], dim=-1)
        return F.linear(x, self._weight, self._bias)

    @property
    def joint(self) -> tuple[Tensor, Tensor | None] | None:
        """The weight [N,K] of all layers and their bias [N], or None where some are not plain."""
        self._follow()
        return None if self._weight is None else (self._weight, self._bias)

    def _follow(self) -> None:
        """The layers as they are now."""
        if not all(map(is_plain, self.layers)):
            self._weight = self._bias = None
        elif not self._joined():
            self._join()

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

    @kept()
    def _join(self, weight: Tensor | None = None, bias: Tensor | None = None) -> None:
        """Into these tensors, by default new ones."""
        layers = [cast(nn.Linear, layer) for layer in self.layers]
        parts: list[Any] = [layer.weight for layer in layers]
        biases: list[Any] = [layer.bias for layer in layers]
        self._weight = _join(parts, weight)
        with_bias = all(b is not None for b in biases)
        if not with_bias and any(b is not None for b in biases):
            raise ValueError("linear layers: expected a bias in all of them or in none")
        self._bias = _join(biases, bias) if with_bias else None


class StackedLinear:
    """Fused layers of successive blocks as one product: [l,M,K] → [l,M,N], a part for each block.

    Their weights become views of one tensor [L,N,K]. Holds until one of them is moved or replaced.
    """

    def __init__(self, fused: Sequence[FusedLinear], weight: Tensor, bias: Tensor | None) -> None:
        self.weight, self.bias = weight, bias
        for i, layers in enumerate(fused):
            layers._join(weight[i], None if bias is None else bias[i])

    @staticmethod
    def of(fused: Sequence[FusedLinear]) -> "StackedLinear | None":
        """None where layers are not plain, or not alike."""
        found = [layers.joint for layers in fused]
        joints = [joint for joint in found if joint is not None]
        alike = {
            tuple((v.shape, v.dtype, v.device) for v in joint if v is not None) for joint in joints
        }
        if len(joints) < len(fused) or len(alike) != 1:
            return None
        weight, bias = (
            None if parts[0] is None else _stacked(cast(Any, parts))
            for parts in zip(*joints, strict=True)
        )
        assert weight is not None
        del found, joints
        return StackedLinear(fused, weight, bias)

    def __call__(self, x: Tensor, first: int, rows: slice) -> Tensor:
        """Of l blocks from `first` on, these rows of N."""
        blocks = slice(first, first + len(x))
        weight = self.weight[blocks, rows].transpose(1, 2)
        if self.bias is None:
            return torch.bmm(x, weight)
        return torch.baddbmm(self.bias[blocks, None, rows], x, weight)


def _join(parts: Sequence[Tensor], joint: Tensor | None = None) -> Tensor:
    """One tensor of all rows, by default a new one, of which the given parameters are views."""
    own = [p.detach() for p in parts]
    there = _as_one(own)
    if there is not None and (joint is None or follows(joint, there, 0)):
        return there
    joint = torch.cat(own) if joint is None else torch.cat(own, out=joint)
    for p, view in zip(parts, joint.split([len(p) for p in parts]), strict=True):
        p.data = view
    return joint


def _stacked(parts: Sequence[Tensor]) -> Tensor:
    """[L,…] for L tensors of one shape: where they lie already, or room for them."""
    one = _as_one(parts)
    size = (len(parts), *parts[0].shape)
    return parts[0].new_empty(size) if one is None else one.view(size)


def _as_one(parts: Sequence[Tensor]) -> Tensor | None:
    """A view of all rows, where they lie one after the other in memory."""
    first, distance = parts[0], 0
    for part in parts:
        if not (part.is_contiguous() and follows(first, part, distance)):
            return None
        distance += part.numel()
    rows = sum(len(part) for part in parts)
    return first.as_strided((rows, *first.shape[1:]), first.stride())


def follows(one: Tensor, other: Tensor, distance: int) -> bool:
    """Whether `other` begins `distance` elements behind `one` in its memory, and is laid out so."""
    return bool(
        one.untyped_storage()._cdata == other.untyped_storage()._cdata
        and other.storage_offset() == one.storage_offset() + distance
        and (other.shape[1:], other.stride(), other.dtype)
        == (one.shape[1:], one.stride(), one.dtype)
    )
