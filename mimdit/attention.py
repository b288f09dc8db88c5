"""Attention processors that let the blocks of diffusers' SD3 transformer see the conditioning."""

# Diffusers types the projections as optional; joint attention always has them.
# pyright: reportOptionalCall=false, reportOptionalSubscript=false

import torch
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from torch import Tensor


class MiMJointAttnProcessor(JointAttnProcessor2_0):
    """Joint attention with conditioning tokens next to the image tokens (MiM-DiT, Eq. 5).

    Concatenate [image; conditioning] in token length, attend together with the text, split, and
    drop the conditioning half. The projections, norms and attention are diffusers' own.
    """

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer = layer

    # Diffusers declares FloatTensor, which no torch function is typed to return.
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        condition: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        if condition is None:
            return super().__call__(
                attn,
                hidden_states,  # pyright: ignore[reportArgumentType]
                encoder_hidden_states,  # pyright: ignore[reportArgumentType]
                attention_mask,  # pyright: ignore[reportArgumentType]
            )
        tokens = hidden_states.shape[1]
        both = torch.cat([hidden_states, condition[self.layer].to(hidden_states.dtype)], dim=1)
        image, text = super().__call__(
            attn,
            both,  # pyright: ignore[reportArgumentType]
            encoder_hidden_states,  # pyright: ignore[reportArgumentType]
            attention_mask,  # pyright: ignore[reportArgumentType]
        )
        return image[:, :tokens], text


class KeyValueMiMProcessor(MiMJointAttnProcessor):
    """The same result without the queries of conditioning tokens, whose outputs are dropped anyway.

    Exact: a query's output depends on all keys and values, but on no other query.
    """

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        condition: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        if condition is None or encoder_hidden_states is None:
            return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask)
        m = condition[self.layer].to(hidden_states.dtype)
        both = torch.cat([hidden_states, m], dim=1)

        def split(x: Tensor, norm: torch.nn.Module | None) -> Tensor:
            x = x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)  # [B,heads,tokens,channels]
            return x if norm is None else norm(x)

        text = encoder_hidden_states
        q = split(attn.to_q(hidden_states), attn.norm_q)
        q = torch.cat([q, split(attn.add_q_proj(text), attn.norm_added_q)], dim=2)
        k = split(attn.to_k(both), attn.norm_k)
        k = torch.cat([k, split(attn.add_k_proj(text), attn.norm_added_k)], dim=2)
        v = torch.cat([split(attn.to_v(both), None), split(attn.add_v_proj(text), None)], dim=2)
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        out = out.transpose(1, 2).flatten(2)
        tokens = hidden_states.shape[1]
        image, text = out[:, :tokens], out[:, tokens:]
        image = attn.to_out[1](attn.to_out[0](image))
        return image, text if attn.context_pre_only else attn.to_add_out(text)


class ImageAttnProcessor(JointAttnProcessor2_0):
    """For `attn2`, the image-only attention of dual blocks; ignores the `condition` it is given."""

    # Diffusers declares FloatTensor, which no torch function is typed to return.
    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        condition: tuple[Tensor, ...] | None = None,
    ) -> tuple[Tensor, Tensor] | Tensor:
        del condition
        return super().__call__(
            attn,
            hidden_states,  # pyright: ignore[reportArgumentType]
            encoder_hidden_states,  # pyright: ignore[reportArgumentType]
            attention_mask,  # pyright: ignore[reportArgumentType]
        )
