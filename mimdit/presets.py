"""Named model sizes. `tiny` is the one that ships with trained weights."""

from typing import Any

import torch

from mimdit.codec import PixelCodec
from mimdit.dtypes import default_dtype
from mimdit.transformer import MiMDiTTransformer2DModel

# Backbone layouts from the configurations of SD3.5-medium and SD3.5-large.
_SD35: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
    "mim_dim": 384,
    "prompts": ("empty", "positive", "negative"),
    "prompt_tokens": 333,
}
# 8×8 pixels a token: pixel codec of factor 4, patches of 2.
_PIXEL: dict[str, Any] = {
    "patch_size": 2,
    "in_channels": 48,
    "out_channels": 147,
    "prediction_type": "log_affine",
    "pooled_condition": True,
    "picture_statistics": True,
    "prompts": ("empty",),
    "prompt_tokens": 4,
}
PRESETS: dict[str, dict[str, Any]] = {
    "debug": _PIXEL
    | {
        "sample_size": 32,
        "pos_embed_max_size": 16,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 16,
        "dual_attention_layers": (0,),
        "qk_norm": "rms_norm",
        "mim_dim": 64,
    },
    "tiny": _PIXEL
    | {
        # Pictures to 512×512 pixels in one piece, and a token more for shifted grids.
        "sample_size": 130,
        "pos_embed_max_size": 65,
        "num_layers": 4,
        "attention_head_dim": 64,
        "num_attention_heads": 4,
        "joint_attention_dim": 64,
        "caption_projection_dim": 256,
        "pooled_projection_dim": 64,
        "mim_dim": 128,
    },
    "sd35-medium": _SD35
    | {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
    },
    "sd35-large": _SD35
    | {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
    },
}


def build(
    name: str, dtype: torch.dtype = torch.float32, **overrides: Any
) -> MiMDiTTransformer2DModel:
    """A transformer of a preset with fresh weights; `overrides` replace single settings."""
    if name not in PRESETS:
        raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
    with default_dtype(dtype):
        return MiMDiTTransformer2DModel(**(PRESETS[name] | overrides))


def pixel_codec() -> PixelCodec:
    """The codec of `debug` and `tiny`."""
    return PixelCodec(factor=4)


def parameter_table() -> str:
    """Millions of parameters of every preset, and of the SD3.5 ones without the bottleneck."""
    rows = [
        f"{'preset':<14}{'blocks':>7}{'D':>6}{'d':>6}{'backbone':>12}{'MiM':>10}{'text':>8}{'total':>11}"
    ]
    for name, preset in PRESETS.items():
        width = preset["num_attention_heads"] * preset["attention_head_dim"]
        for dim in sorted({preset["mim_dim"], width} if "sd35" in name else {preset["mim_dim"]}):
            with torch.device("meta"):
                model = build(name, mim_dim=dim)
            total = sum(p.numel() for p in model.parameters()) / 1e6
            mim = sum(p.numel() for p in model.mim.parameters()) / 1e6
            text = (model.prompt_embeds.numel() + model.pooled_prompt_embeds.numel()) / 1e6
            rows.append(
                f"{name:<14}{preset['num_layers']:>7}{width:>6}{dim:>6}"
                f"{total - mim - text:>10.1f} M{mim:>8.1f} M{text:>6.1f} M{total:>9.1f} M"
            )
    return "\n".join(rows)


if __name__ == "__main__":
    print(parameter_table())
