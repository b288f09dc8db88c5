"""Text embeddings of SD3.5, by diffusers' own encoding; needed once, or for captions."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Components of a Stable Diffusion 3 pipeline that turn text into embeddings.
TEXT_COMPONENTS = (
    "text_encoder",
    "tokenizer",
    "text_encoder_2",
    "tokenizer_2",
    "text_encoder_3",
    "tokenizer_3",
)


@torch.no_grad()
def encode_text(
    components: Mapping[str, Any], transformer: Any, texts: Sequence[str], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Embeddings [N,T,C] and pooled embeddings [N,P] of N texts.

    components: by the names in `TEXT_COMPONENTS`; the third encoder may be None, as in SD3 (its
    part is zeros then). transformer: only its configuration is read. Raises ValueError where the
    first two encoders are missing.
    """
    missing = [name for name in TEXT_COMPONENTS[:4] if components.get(name) is None]
    if missing:
        raise ValueError(f"text: expected the text encoders of SD3.5, {missing[0]} is missing")
    # Needs transformers, which restoring with stored embeddings does without.
    from diffusers import StableDiffusion3Pipeline

    pipe = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=None,  # pyright: ignore[reportArgumentType]
        vae=None,  # pyright: ignore[reportArgumentType]
        **{name: components.get(name) for name in TEXT_COMPONENTS},  # pyright: ignore[reportArgumentType]
    )
    embeds, _, pooled, _ = pipe.encode_prompt(
        list(texts),
        None,  # pyright: ignore[reportArgumentType]
        None,  # pyright: ignore[reportArgumentType]
        device=device,
        do_classifier_free_guidance=False,
    )
    assert embeds is not None and pooled is not None
    return embeds, pooled
