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


def branches(
    model: Any,
    components: Mapping[str, Any],
    texts: tuple[str | None, str | None],
    scale: float,
    device: torch.device,
) -> list[tuple[Tensor, Tensor]]:
    """Embeddings [1,T,C] and [1,P] of the one branch, or of both branches of guidance.

    model: holds stored embeddings, for texts (positive, negative) that are None. Raises ValueError
    where there are no encoders for a text, no stored prompt, or both branches are equal.
    """
    if scale == 1:
        return [_prompt(model, components, "prompt", "empty", texts[0], device)]
    found = [
        _prompt(model, components, "prompt", "positive", texts[0], device),
        _prompt(model, components, "negative_prompt", "negative", texts[1], device),
    ]
    if all(torch.equal(p.float().cpu(), n.float().cpu()) for p, n in zip(*found, strict=True)):
        raise ValueError(
            "guidance_scale: expected 1, as the positive and the negative prompt are equal; "
            f"got {scale:g}"
        )
    return found


def _prompt(
    model: Any,
    components: Mapping[str, Any],
    argument: str,
    name: str,
    text: str | None,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Embeddings of a caption, or else the stored ones of this name."""
    if text is not None:
        if not isinstance(text, str):
            raise ValueError(f"{argument}: expected one text for all pictures, got {text!r}")
        if components.get("text_encoder") is None:
            raise ValueError(f"{argument}: expected none, this pipeline has no text encoders")
        return encode_text(components, model, [text], device)
    if name != "empty" and name not in model.config["prompts"]:
        raise ValueError(
            f"guidance_scale: expected 1, as this model stores no {name} prompt; "
            f"give it a {argument}, or leave guidance off"
        )
    return model.prompt(None if name == "empty" else name)
