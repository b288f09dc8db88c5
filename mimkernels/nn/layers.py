"""The modules, and what they share with the layers that `accelerate` replaces."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkernels.channel_attention import channel_attention
from mimkernels.squeeze_excite import squeeze_excite
from mimkernels.window_attention import window_attention
from mimkernels.window_attention.reference import relative_position

CONVENTIONS = ("torchvision", "timm")
# What `squeeze_excite` calls these modules; other libraries' own classes go by the same names.
ACTIVATIONS = {"ReLU": "relu", "SiLU": "silu", "Swish": "silu"}
GATES = {"Sigmoid": "sigmoid", "Hardsigmoid": "hardsigmoid", "HardSigmoid": "hardsigmoid"}
# The layer down, its activation, the layer up and the gate: torchvision's names, then timm's.
SQUEEZE_NAMES = {
    "torchvision": ("fc1", "activation", "fc2", "scale_activation"),
    "timm": ("conv_reduce", "act1", "conv_expand", "gate"),
    "timm SEModule": ("fc1", "act", "fc2", "gate"),
}


class WindowAttention(nn.Module):
    """Swin's (shifted) window attention (arXiv 2103.14030, Eq. 4): [B,H,W,C] → [B,H,W,C].

    It stands for torchvision's `ShiftedWindowAttention`, and for timm's `WindowAttention` with the
    roll, padding and partition that timm's block does around it. Both name their parameters alike
    (qkv, relative_position_bias_table, proj), so one class serves; `convention` is what differs:

    - "torchvision": the shift wraps around at the padded size, and an axis that one window covers
      is not shifted. The buffer `relative_position_index` is flat and part of the state dict.
    - "timm": the shift wraps around at H×W, padding comes after, and axes are shifted as told. The
      buffer is [M²,M²] and not part of the state dict.

    Padded tokens take part as keys, as in both. Pairs that only the shift brought together are
    masked with −∞; both libraries add −100, which is the same unless logits differ by as much.

    Args:
        dim: C, a multiple of num_heads; heads are at most 64 wide.
        window_size: M, or (M, M), at most 32.
        shift_size: 0 to M−1, or (rows, columns).
        attention_dropout: must be 0; kept for callers that pass it, as torchvision's blocks do.
        dropout: of the output, in training.

    Raises:
        ValueError: an unknown convention, a window that is not square, attention dropout; from the
            forward pass also what `mimkernels.window_attention` refuses.
    """

    def __init__(
        self,
        dim: int,
        window_size: int | Sequence[int],
        shift_size: int | Sequence[int],
        num_heads: int,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
        *,
        convention: str = "torchvision",
    ) -> None:
        super().__init__()
        _check_convention(convention, CONVENTIONS)
        if attention_dropout:
            raise ValueError(f"attention_dropout: expected 0, got {attention_dropout}")
        self.window_size, self.shift_size = _pair(window_size), _pair(shift_size)
        if self.window_size[0] != self.window_size[1]:
            raise ValueError(f"window_size: expected a square, got {self.window_size}")
        self.num_heads, self.dropout = num_heads, dropout
        self.roll_first = convention == "timm"
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)
        window = self.window_size[0]
        table = torch.empty((2 * window - 1) ** 2, num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        index = relative_position(window, table.device)
        if convention == "torchvision":
            self.register_buffer("relative_position_index", index.flatten())
        else:
            self.register_buffer("relative_position_index", index, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return shifted_window_attention(self, x, self.roll_first)


class ChannelAttention(nn.Module):
    """Restormer's `Attention` (MDTA, arXiv 2111.09881, Eq. 1): [B,C,H,W] → [B,C,H,W].

    Pictures in the channels_last memory format are read as they lie; others are copied into it
    once. The output has that format, so `model.to(memory_format=torch.channels_last)` pays.

    Args:
        dim: C, a multiple of num_heads; heads are at most 64 wide.
        bias: of all three convolutions.
    """

    def __init__(self, dim: int, num_heads: int, bias: bool = False) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, 3 * dim, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(3 * dim, 3 * dim, 3, padding=1, groups=3 * dim, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        # Copied here, if at all: of C channels, not of 3C.
        x = x.contiguous(memory_format=torch.channels_last)
        q, k, v = _tokens(self.qkv_dwconv(self.qkv(x))).chunk(3, dim=-1)  # [B,T,C]
        last: Any = self.project_out
        # The op folds a plain projection into its matrices; wrapped ones (LoRA, say) are called.
        folded = type(last) is nn.Conv2d
        out = channel_attention(
            q,
            k,
            v,
            self.temperature.flatten(),
            heads=len(self.temperature),
            proj=last.weight.flatten(1) if folded else None,
        )
        if folded and last.bias is not None:
            out = out + last.bias.to(out.dtype)
        out = _pictures(out, x)
        return out if folded else last(out)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation (arXiv 1709.01507) with two 1×1 convolutions: [B,C,H,W] → [B,C,H,W].

    Pictures in the channels_last memory format are read as they lie; others are copied into it.

    Args:
        input_channels: C. squeeze_channels: of the layer between.
        activation: `nn.ReLU` or `nn.SiLU`. scale_activation: `nn.Sigmoid` or `nn.Hardsigmoid`.
        convention: "torchvision" names the layers fc1 and fc2 as its `SqueezeExcitation`, "timm"
            conv_reduce and conv_expand as its `SqueezeExcite`, "timm SEModule" fc1 and fc2.

    Raises:
        ValueError: an unknown convention or activation.
    """

    def __init__(
        self,
        input_channels: int,
        squeeze_channels: int,
        activation: type[nn.Module] = nn.ReLU,
        scale_activation: type[nn.Module] = nn.Sigmoid,
        *,
        convention: str = "torchvision",
    ) -> None:
        super().__init__()
        _check_convention(convention, SQUEEZE_NAMES)
        for argument, module, known in (
            ("activation", activation, ACTIVATIONS),
            ("scale_activation", scale_activation, GATES),
        ):
            if module.__name__ not in known:
                expected = ", ".join(known)
                raise ValueError(f"{argument}: expected one of {expected}, got {module.__name__}")
        layers = (
            nn.Conv2d(input_channels, squeeze_channels, 1),
            activation(),
            nn.Conv2d(squeeze_channels, input_channels, 1),
            scale_activation(),
        )
        for name, layer in zip(SQUEEZE_NAMES[convention], layers, strict=True):
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return squeeze_excite_pictures(self, x)


def shifted_window_attention(layer: Any, x: Tensor, roll_first: bool) -> Tensor:
    """x [B,H,W,C] through a layer with torchvision's attributes, dropout of attention aside."""
    shift = layer.shift_size
    if not roll_first:
        axes = zip(shift, x.shape[1:3], layer.window_size, strict=True)
        shift = [s if size > window else 0 for s, size, window in axes]
    out = attend_in_windows(
        x,
        layer.qkv,
        layer.relative_position_bias_table,
        window=layer.window_size[0],
        shift=shift,
        heads=layer.num_heads,
        roll_first=roll_first,
    )
    return F.dropout(layer.proj(out), layer.dropout, layer.training)


def attend_in_windows(
    x: Tensor,
    qkv: Any,
    table: Tensor,
    *,
    window: int,
    shift: Sequence[int],
    heads: int,
    roll_first: bool,
    scale: float | None = None,
) -> Tensor:
    """Attention of a picture x [B,H,W,C] that is padded before its qkv layer, up to `proj`."""
    _, height, width, channels = x.shape
    pad_value = None
    if height % window or width % window:
        # What the layer makes of a padded token: its bias, also where the layer is wrapped.
        pad_value = qkv(x.new_zeros(1, channels))[0]
    mixed = qkv(x)
    rows, columns = shift
    return window_attention(
        mixed,
        table.to(mixed.dtype),
        window=window,
        heads=heads,
        shift=(rows, columns),
        scale=scale,
        pad_value=pad_value,
        roll_first=roll_first,
    )


def squeeze_excite_pictures(layer: Any, x: Tensor) -> Tensor:
    """x [B,C,H,W] scaled by the four parts of a squeeze-and-excitation layer."""
    parts = squeeze_parts(layer)
    assert parts is not None
    down, activation, up, gate = parts
    x = x.contiguous(memory_format=torch.channels_last)
    out = squeeze_excite(
        _tokens(x),
        down.weight.flatten(1),
        down.bias,
        up.weight.flatten(1),
        up.bias,
        activation=ACTIVATIONS[type(activation).__name__],
        gate=GATES[type(gate).__name__],
    )
    return _pictures(out, x)


def squeeze_parts(layer: Any) -> tuple[Any, Any, Any, Any] | None:
    """The layer down, its activation, the layer up and the gate, under any names known here."""
    for names in SQUEEZE_NAMES.values():
        if all(isinstance(getattr(layer, name, None), nn.Module) for name in names):
            down, activation, up, gate = (getattr(layer, name) for name in names)
            return down, activation, up, gate
    return None


def _tokens(x: Tensor) -> Tensor:
    """[B,C,H,W] → [B,H·W,C], a view if x is in the channels_last format."""
    return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)


def _pictures(x: Tensor, like: Tensor) -> Tensor:
    """[B,H·W,C] → [B,C,H,W] in the channels_last format, a view."""
    return x.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


def _pair(value: int | Sequence[int]) -> list[int]:
    return [value, value] if isinstance(value, int) else list(value)


def _check_convention(convention: str, known: Any) -> None:
    if convention not in known:
        raise ValueError(f"convention: expected one of {', '.join(known)}, got {convention!r}")
