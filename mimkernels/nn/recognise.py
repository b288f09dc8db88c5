"""Layers of other people's models that `accelerate` replaces: how to tell them, what stands in.

Names of attributes decide, not classes: nothing of timm or torchvision is imported.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mimkernels.autocast import changes
from mimkernels.channel_attention.op import MAX_HEAD as MAX_CHANNEL_HEAD
from mimkernels.nn.layers import (
    ACTIVATIONS,
    GATES,
    ChannelAttention,
    attend_in_windows,
    shifted_window_attention,
    squeeze_excite_pictures,
    squeeze_parts,
)
from mimkernels.window_attention.op import MAX_HEAD, MAX_WINDOW


@dataclass(frozen=True)
class Family:
    """Layers that one function stands for.

    method: of the layer, which `fast` replaces. obstacle: why a layer cannot be replaced, or None.
    note: when a replaced layer still runs its own code, or "". sample: shape of an input for a
    trial, [B,C,H,W] if channels_first. core: the module whose attributes the layer's method reads.
    modes: of `training` in which a trial's outputs are comparable.
    """

    name: str
    op: str
    formula: str
    method: str
    fast: Callable[[Any, Tensor], Tensor]
    looks_like: Callable[[Any], bool]
    obstacle: Callable[[Any], str | None]
    sample: Callable[[Any], tuple[int, ...]]
    note: Callable[[Any], str] = lambda layer: ""
    core: Callable[[Any], nn.Module] = lambda layer: layer
    channels_first: bool = False
    modes: tuple[bool, ...] = (False,)


def _is_swin_attention(layer: Any) -> bool:
    """Windows with a bias table (V1), or cosine attention (V2)."""
    has = (hasattr(layer, name) for name in ("relative_position_bias_table", "logit_scale"))
    return _has_children(layer, "qkv", "proj") and any(has)


def _is_timms_block(layer: Any) -> bool:
    return callable(getattr(layer, "_attn", None)) and _is_swin_attention(
        getattr(layer, "attn", None)
    )


def _timms_attention(block: Any, x: Tensor) -> Tensor:
    """`SwinTransformerBlock._attn`, x [B,H,W,C]."""
    attn = block.attn
    drops = attn.attn_drop.p > 0 and (attn.training or attn.attn_drop.training)
    if drops or _window_obstacle(block.window_size) or not _mask_fits(block, x):
        return block._accelerated_from._attn(block, x)
    out = attend_in_windows(
        x,
        attn.qkv,
        attn.relative_position_bias_table,
        window=block.window_size[0],
        shift=block.shift_size,
        heads=attn.num_heads,
        roll_first=True,
        scale=attn.scale,
    )
    return attn.proj_drop(attn.proj(out))


def _mask_fits(block: Any, x: Tensor) -> bool:
    """Whether the block's own mask, if it keeps one, was made for as many windows."""
    if not any(block.shift_size) or getattr(block, "dynamic_mask", False):
        return True
    made_for, now = (
        [-(-size // m) for size, m in zip(grid, block.window_size, strict=True)]
        for grid in (block.input_resolution, x.shape[1:3])
    )
    return block.attn_mask is not None and made_for == now


def _torchvisions_attention(layer: Any, x: Tensor) -> Tensor:
    """`ShiftedWindowAttention.forward`, x [B,H,W,C]."""
    drops = layer.training and layer.attention_dropout > 0
    if drops or _window_obstacle(layer.window_size):
        return layer._accelerated_from.forward(layer, x)
    return shifted_window_attention(layer, x, roll_first=False)


def _swin_obstacle(layer: Any) -> str | None:
    attn = getattr(layer, "attn", layer)
    if hasattr(attn, "logit_scale"):
        return "cosine attention (Swin V2) has no kernel"
    sizes = (getattr(layer, name, None) for name in ("window_size", "shift_size"))
    if not all(isinstance(size, (tuple, list)) and len(size) == 2 for size in sizes):
        return "its windows, if it has any, are made and masked outside of it"
    heads = getattr(attn, "num_heads", 0)
    if not heads:
        return "it has no num_heads"
    width = getattr(attn.qkv, "out_features", 0) // (3 * heads)
    if width > MAX_HEAD:
        return f"its heads are {width} wide, the kernel's at most {MAX_HEAD}"
    return _window_obstacle(layer.window_size)


def _window_obstacle(size: Any) -> str | None:
    if size[0] != size[1]:
        return f"its windows are not square: {size[0]}×{size[1]}"
    return None if size[0] <= MAX_WINDOW else f"its windows are wider than {MAX_WINDOW}: {size[0]}"


def _swin_sample(layer: Any) -> tuple[int, ...]:
    """A grid that needs padding; where a mask is kept, the grid that it was made for."""
    grid = (2 * layer.window_size[0] + 1, layer.window_size[1] + 2)
    if getattr(layer, "attn_mask", None) is not None:
        grid = layer.input_resolution
    return (1, *grid, getattr(layer, "attn", layer).qkv.in_features)


def _dropout_note(probability: float) -> str:
    return f"its own code in training: attention dropout {probability}" if probability else ""


def _is_restormers(layer: Any) -> bool:
    named = _has_children(layer, "qkv", "qkv_dwconv", "project_out")
    return named and isinstance(getattr(layer, "temperature", None), Tensor)


def _restormer_obstacle(layer: Any) -> str | None:
    temperature = list(layer.temperature.shape)
    if len(temperature) != 3 or temperature[1:] != [1, 1]:
        return f"its temperature has the shape {temperature}, not [heads, 1, 1]"
    heads, channels = temperature[0], getattr(layer.qkv_dwconv, "out_channels", 0) // 3
    if channels > heads * MAX_CHANNEL_HEAD:
        return f"its heads are {channels // heads} wide, the kernel's at most {MAX_CHANNEL_HEAD}"
    # A tile size, say, beyond which a trial would not go.
    known = (0, 1, heads, channels // heads, channels, 3 * channels)
    for name, value in vars(layer).items():
        values = value if isinstance(value, (tuple, list)) else (value,)
        odd = any(isinstance(v, (int, float)) and v not in known for v in values)
        if odd and not name.startswith("_"):
            return f"its attribute {name} = {value} has no place in Restormer's attention"
    return None


def _is_squeeze_excite(layer: Any) -> bool:
    parts = squeeze_parts(layer) if isinstance(layer, nn.Module) else None
    return parts is not None and all(isinstance(p, nn.Conv2d) for p in (parts[0], parts[2]))


def _squeeze_excite(layer: Any, x: Tensor) -> Tensor:
    # Other layouts would be copied first, which costs more than the op saves; and what the layer
    # scales keeps its type under autocast, which the op casts.
    if changes(x) or not x.is_contiguous(memory_format=torch.channels_last):
        return layer._accelerated_from.forward(layer, x)
    return squeeze_excite_pictures(layer, x)


def _squeeze_obstacle(layer: Any) -> str | None:
    parts = squeeze_parts(layer)
    assert parts is not None
    down, activation, up, gate = parts
    for module, known in ((activation, ACTIVATIONS), (gate, GATES)):
        if type(module).__name__ not in known:
            return f"{type(module).__name__} has no kernel here"
    if not isinstance(getattr(layer, "bn", nn.Identity()), nn.Identity):
        return "there is a normalisation between its layers"
    plain = all(type(p) is nn.Conv2d and p.kernel_size == (1, 1) for p in (down, up))
    if not plain or down.bias is None or up.bias is None:
        return "its layers are not plain 1×1 convolutions with biases"
    return None


def _has_children(layer: Any, *names: str) -> bool:
    return all(isinstance(getattr(layer, name, None), nn.Module) for name in names)


FAMILIES = {
    family.name: family
    for family in (
        Family(
            "timm",
            "window_attention",
            "timm's Swin V1",
            "_attn",
            _timms_attention,
            _is_timms_block,
            _swin_obstacle,
            _swin_sample,
            note=lambda block: _dropout_note(block.attn.attn_drop.p),
            core=lambda block: block.attn,
        ),
        Family(
            "torchvision",
            "window_attention",
            "torchvision's Swin V1",
            "forward",
            _torchvisions_attention,
            _is_swin_attention,
            _swin_obstacle,
            _swin_sample,
            note=lambda layer: _dropout_note(layer.attention_dropout),
        ),
        Family(
            "restormer",
            "channel_attention",
            "Restormer's attention",
            "forward",
            ChannelAttention.forward,
            _is_restormers,
            _restormer_obstacle,
            lambda layer: (1, layer.qkv.in_channels, 6, 7),
            channels_first=True,
            modes=(False, True),
        ),
        Family(
            "squeeze_excite",
            "squeeze_excite",
            "squeeze-and-excitation",
            "forward",
            _squeeze_excite,
            _is_squeeze_excite,
            _squeeze_obstacle,
            lambda layer: (1, squeeze_parts(layer)[0].in_channels, 5, 6),  # pyright: ignore[reportOptionalSubscript]
            note=lambda layer: "where its input is in the channels_last format",
            channels_first=True,
            modes=(False, True),
        ),
    )
}
