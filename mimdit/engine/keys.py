"""Keys and values of the conditioning tokens, of many blocks in one product."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mimdit.engine.linears import FusedLinear, StackedLinear, follows
from mimdit.engine.step import EPS, Block
from mimkernels import joint_qkv_


class KeysAndValues:
    """Conditioning tokens m [B,K,D] of every block → normalised keys, and values.

    together: over as many blocks as possible at once; otherwise, and where layers are not plain
    (LoRA, quantised), block by block.
    """

    def __init__(self, blocks: Sequence[Block], together: bool = True) -> None:
        self.blocks, self.stack = list(blocks), None
        fused = [b.image_qkv for b in blocks if isinstance(b.image_qkv, FusedLinear)]
        if together and len(fused) == len(blocks):
            self.stack = StackedLinear.of(fused)
        norm = self.blocks[0].attn.norm_k
        self._ones = None if norm is None else torch.ones_like(norm.weight.detach())

    def __call__(self, tokens: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """[2,l,B,heads,K,d], keys and values of l blocks, for all blocks one after the other."""
        if self.stack is None:
            pairs = [b.keys_and_values(m) for b, m in zip(self.blocks, tokens, strict=True)]
            return tuple(torch.stack(pair).unsqueeze(1) for pair in pairs)
        return tuple(self._of(self.stack, first, m) for first, m in neighbours(tokens))

    def _of(self, stack: StackedLinear, first: int, tokens: Tensor) -> Tensor:
        """[2,l,B,heads,K,d] of the blocks from `first` on, for their tokens [l,B,K,D]."""
        blocks = self.blocks[first : first + len(tokens)]
        heads, width = blocks[0].attn.heads, tokens.shape[-1]
        # The first third of the rows makes queries.
        both = stack(tokens.flatten(1, 2), first, slice(width, 3 * width))  # [l,B·K,2·D]
        parts = both.view(*tokens.shape[:3], 2, heads, -1)
        pairs = parts.permute(3, 0, 1, 4, 2, 5)
        weights = [b.attn.norm_k.weight for b in blocks if b.attn.norm_k is not None]
        if weights:
            # In place: each row of a head is read once, by what writes it. Layers are pictures.
            streams = both.view(-1, tokens.shape[2], 2 * width)
            k, v = parts.flatten(0, 1).permute(2, 0, 3, 1, 4)
            joint_qkv_((k[:, :, :0], k, v), [streams], None, [self._ones], offsets=[0], eps=EPS)
            pairs[0].mul_(torch.stack(weights).view(len(blocks), 1, 1, 1, -1))
        return pairs


def neighbours(tensors: Sequence[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """(place of the first, [l,…]) for tensors of one shape that lie one after the other in memory.

    Such are the parts of a tensor; nothing is copied.
    """
    first = 0
    while first < len(tensors):
        one = tensors[first].contiguous()
        count = 1
        while first + count < len(tensors) and _next(one, tensors[first + count], count):
            count += 1
        strides = (one.numel(), *one.stride())
        yield first, one.as_strided((count, *one.shape), strides)
        first += count


def _next(one: Tensor, other: Tensor, count: int) -> bool:
    """Whether `other` lies `count` whole tensors behind `one`."""
    return one.shape == other.shape and follows(one, other, count * one.numel())
