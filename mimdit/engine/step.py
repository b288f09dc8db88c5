"""One evaluation of the backbone, from tokens to tokens, over resident joint buffers."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.activations import GELU
from diffusers.models.attention import JointTransformerBlock
from torch import Tensor, nn

from mimdit.engine.linears import FusedLinear
from mimdit.engine.modulation import Adaptation, Modulation
from mimdit.transformer import MiMDiTTransformer2DModel
from mimkernels import (
    gated_residual_layernorm_modulate,
    joint_qkv,
    joint_qkv_,
    layernorm_modulate,
)

Joint = tuple[Tensor, Tensor, Tensor]
Layer = Callable[[Tensor], Tensor]


class Block:
    """The projections of one block, queries, keys and values of a stream in one product.

    join: makes that product; only: what takes the place of a layer that stands alone.
    """

    def __init__(
        self,
        block: JointTransformerBlock,
        join: Callable[[Sequence[nn.Module]], Layer] = FusedLinear,
        only: Callable[[nn.Module], Layer] = lambda layer: layer,
    ) -> None:
        attn: Any = block.attn
        self.attn, self.attn2 = attn, cast(Any, block.attn2)
        self.image_qkv = join([attn.to_q, attn.to_k, attn.to_v])
        self.text_qkv = join([attn.add_q_proj, attn.add_k_proj, attn.add_v_proj])
        self.image_out = only(attn.to_out[0])
        self.text_out = None if attn.context_pre_only else only(attn.to_add_out)
        self.image_mlp, self.text_mlp = _mlp(block.ff, only), _mlp(block.ff_context, only)
        if self.attn2 is not None:
            self.dual_qkv = join([self.attn2.to_q, self.attn2.to_k, self.attn2.to_v])
            self.dual_out = only(self.attn2.to_out[0])

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Of conditioning tokens m [B,K,D]: [B,heads,K,d] each, keys normalised."""
        heads = self.attn.heads
        k, v = (p(tokens).unflatten(-1, (heads, -1)).transpose(1, 2) for p in (
            self.attn.to_k,
            self.attn.to_v,
        ))  # fmt: skip
        return k if self.attn.norm_k is None else self.attn.norm_k(k), v

    def attend(self, image: Tensor, text: Tensor, joint: Joint) -> tuple[Tensor, Tensor | None]:
        """Joint attention of normalised image [B,N,D] and text [B,T,D] tokens.

        joint: q [B,heads,N+T,d] and k, v [B,heads,N+T+K,d], the last K rows already filled.
        """
        attn, tokens = self.attn, image.shape[1]
        streams = [self.image_qkv(image), self.text_qkv(text)]
        q_norms = [_weight(attn.norm_q), _weight(attn.norm_added_q)]
        k_norms = [_weight(attn.norm_k), _weight(attn.norm_added_k)]
        joint_qkv_(joint, streams, q_norms, k_norms, offsets=[0, tokens], eps=EPS)
        out = F.scaled_dot_product_attention(*joint).transpose(1, 2).flatten(2)
        words = None if self.text_out is None else self.text_out(out[:, tokens:])
        return self.image_out(out[:, :tokens]), words

    def attend_image(self, image: Tensor) -> Tensor:
        """The second attention of dual blocks, among image tokens alone."""
        attn = self.attn2
        norms = [_weight(attn.norm_q)], [_weight(attn.norm_k)]
        qkv = joint_qkv([self.dual_qkv(image)], *norms, heads=attn.heads, eps=EPS)
        out = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        return self.dual_out(out)


def _mlp(given: Any, only: Callable[[nn.Module], Layer]) -> Layer:
    """Diffusers' `FeedForward`, or the same of layers that took the place of its own."""
    if given is None or not isinstance(first := given.net[0], GELU):
        return cast(Layer, given)
    up, down = only(first.proj), only(given.net[2])
    if up is first.proj and down is given.net[2]:
        return given
    return lambda x: down(F.gelu(up(x), approximate=first.approximate))


# Of all norms in SD3's blocks.
EPS = 1e-6


def _weight(norm: Any) -> Tensor | None:
    return None if norm is None else norm.weight


def _open(x: Tensor, to: Adaptation) -> tuple[Tensor, ...]:
    """Normalised tokens for the attention, or both attentions, of a block."""
    if to.shift2 is None or to.scale2 is None:
        return (layernorm_modulate(x, to.shift, to.scale, eps=EPS),)
    return layernorm_modulate(x, to.shift, to.scale, to.shift2, to.scale2, eps=EPS)


def _close(x: Tensor, y: Tensor, gate: Tensor | None, to: Adaptation) -> tuple[Tensor, ...]:
    """x + gate·y, and its normalised form for what comes next: (x', h) or (x', h, h2)."""
    assert gate is not None
    second = {} if to.shift2 is None else {"shift2": to.shift2, "scale2": to.scale2}
    return gated_residual_layernorm_modulate(
        x,
        y,
        gate,
        to.shift,
        to.scale,
        **second,
        eps=EPS,  # pyright: ignore[reportArgumentType]
    )


def _into_mlp(
    x: Tensor, y: Tensor, own: Adaptation, y2: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(x', h) between attention and MLP; y2: output of a second attention."""
    assert own.gate is not None and own.shift_mlp is not None and own.scale_mlp is not None
    second = {} if y2 is None else {"y2": y2, "gate2": own.gate2}
    return gated_residual_layernorm_modulate(
        x,
        y,
        own.gate,
        own.shift_mlp,
        own.scale_mlp,
        **second,
        eps=EPS,  # pyright: ignore
    )


def run_blocks(
    blocks: list[Block],
    x: Tensor,
    text: Tensor,
    modulation: Modulation,
    joint: list[Joint],
    some: range | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Image tokens x [B,N,D] and text tokens [B,T,D] through all blocks, or some.

    Returns x and text behind them, and x normalised for what follows them.
    """
    some = range(len(blocks)) if some is None else some
    image_to = (*modulation.image[1:], modulation.out)
    h = _open(x, modulation.image[some.start])
    (words,) = _open(text, modulation.text[some.start])
    for i in some:
        block, image, own = blocks[i], modulation.image[i], modulation.text[i]
        a, c = block.attend(h[0], words, joint[i])
        a2 = block.attend_image(h[1]) if len(h) > 1 else None
        x, mlp = _into_mlp(x, a, image, a2)
        x, *h = _close(x, block.image_mlp(mlp), image.gate_mlp, image_to[i])
        if c is not None:
            text, mlp = _into_mlp(text, c, own)
            f = block.text_mlp(mlp)
            text, words = _close(text, f, own.gate_mlp, modulation.text[i + 1])
    return x, text, h[0]


def normalise_output(x: Tensor, modulation: Modulation) -> Tensor:
    """Image tokens x [B,N,D] behind the last block, normalised for the output projection."""
    return _open(x, modulation.out)[0]


def unpatchify(model: MiMDiTTransformer2DModel, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B,N,p·p·c] to a plane [B,c,h,w]."""
    patch = model.config["patch_size"]
    planes = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, grid)  # [B,h,w,p,q,c]
    return torch.einsum("bhwpqc->bchpwq", planes).flatten(4, 5).flatten(2, 3)
