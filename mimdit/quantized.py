"""Products in 8 bits: weights with one scale a row, activations with one scale a token.

Approximate. "int8" is symmetric, as in LLM.int8() (arXiv 2208.07339, Sec. 2.1) without its split of
outliers; "fp8" is e4m3 (arXiv 2209.05433).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mimkernels

# The largest magnitude of each type.
_LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
KINDS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
# Compute capabilities whose matrix instructions take these types.
_CAPABILITY = {"int8": (8, 0), "fp8": (8, 9)}
# Weights whose memory is what their shape says.
ORDINARY = (Tensor, nn.Parameter)
# The least rows that CUDA's int8 product takes, and what its widths must be multiples of.
_ROWS, _STEP = 32, 16


def check_quantization(kind: str, device: torch.device) -> None:
    """ValueError where `kind` is unknown or this device has no such products."""
    if kind not in KINDS:
        raise ValueError(f"quantize: expected one of {', '.join(KINDS)}, got {kind!r}")
    capability = ".".join(map(str, _CAPABILITY[kind]))
    needed = f"an NVIDIA GPU of compute capability {capability} or more"
    if device.type == "cpu" and kind == "int8":
        return
    if device.type != "cuda" or torch.version.hip is not None:
        found = "an AMD GPU" if device.type == "cuda" else str(device)
        needed = f"the CPU or {needed}" if kind == "int8" else needed
        raise ValueError(f"quantize: {kind!r} needs {needed}, got {found}")
    have = torch.cuda.get_device_capability(device)
    if have < _CAPABILITY[kind]:
        raise ValueError(f"quantize: {kind!r} needs {needed}, this one has {have[0]}.{have[1]}")


def is_plain(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a layer is the product with its weight, and its bias, and nothing else.

    Not so are LoRAs, layers with hooks or a forward of their own (other kinds of LoRA set one), and
    weights that another library has quantised or sharded.
    """
    own = vars(layer)
    return (
        type(layer) is nn.Linear
        and "forward" not in own
        and not (own["_forward_hooks"] or own["_forward_pre_hooks"])
        and type(layer.weight) in ORDINARY
    )


def quantizable(layer: nn.Module) -> bool:
    """Plain linear layers of widths that the products take; others stay as they are."""
    return is_plain(layer) and not any(n % _STEP for n in layer.weight.shape)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [...,K] → x_q [...,K] in int8 or fp8, and float32 scales [...,1] with x ≈ scale·x_q."""
    low, high = torch.aminmax(x, dim=-1, keepdim=True)
    largest = torch.maximum(-low, high).float()
    scale = largest.clamp(min=torch.finfo(torch.float32).tiny * 2**20) / _LARGEST[dtype]
    scaled = x.float() / scale
    return (scaled.round_() if dtype == torch.int8 else scaled).to(dtype), scale


def product(x: Tensor, x_scale: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """(x_scale·x)·(weight_scale·weight)ᵀ of 8-bit x [M,K] and weight [N,K], scales [M,1] and [N,1].

    float32 for int8, and for fp8 on a CPU; bfloat16 for fp8 on a GPU.
    """
    if x.dtype == torch.int8:
        rows = len(x)
        if x.is_cuda and rows < _ROWS:
            x = F.pad(x, (0, 0, 0, _ROWS - rows))
        y = torch._int_mm(x, weight.t())[:rows].float()
        return y.mul_(x_scale).mul_(weight_scale.t())
    return torch._scaled_mm(
        x,
        weight.t(),
        scale_a=x_scale,
        scale_b=weight_scale.t(),
        out_dtype=torch.bfloat16 if x.is_cuda else torch.float32,
    )


class QuantizedLinear:
    """Linear layers with one input, side by side, as `FusedLinear`, of 8-bit copies."""

    def __init__(self, layers: Sequence[nn.Module], dtype: torch.dtype) -> None:
        plain = [cast(nn.Linear, layer) for layer in layers]
        with torch.no_grad():
            rows = torch.cat(tuple(layer.weight for layer in plain))
            self.weight, self.scale = quantize_rows(rows, dtype)
            biases: list[Tensor] = [layer.bias for layer in plain if layer.bias is not None]
            self.bias = torch.cat(biases).detach() if len(biases) == len(plain) else None

    def __call__(self, x: Tensor) -> Tensor:
        flat, scale = quantize_rows(x.flatten(0, -2), self.weight.dtype)
        y = product(flat, scale, self.weight, self.scale)
        y = y if self.bias is None else y.add_(self.bias.to(y.dtype))
        return y.to(x.dtype).unflatten(0, x.shape[:-1])


@dataclass(frozen=True)
class QuantizedBank:
    """Weights of experts, 8 bits [...,N,K] with scales [...,N,1], indexed as a tensor is."""

    values: Tensor
    scales: Tensor

    @staticmethod
    def of(bank: Tensor, dtype: torch.dtype) -> "QuantizedBank":
        return QuantizedBank(*quantize_rows(bank.detach(), dtype))

    def __getitem__(self, key: Any) -> "QuantizedBank":
        """Along leading axes."""
        return QuantizedBank(self.values[key], self.scales[key])

    def flatten(self, first: int, last: int) -> "QuantizedBank":
        """Of leading axes."""
        return QuantizedBank(self.values.flatten(first, last), self.scales.flatten(first, last))

    def linear(self, x: Tensor, index: Tensor, bias: Tensor | None = None) -> Tensor:
        """As `mimkernels.expert_linear`; gathers the weights of each picture's experts."""
        rows, scale = quantize_rows(x if x.ndim == 4 else x.unsqueeze(1), self.values.dtype)
        picked = self[index]
        pictures, slots = index.shape
        out = [
            product(
                rows[b, j if rows.shape[1] > 1 else 0],
                scale[b, j if rows.shape[1] > 1 else 0],
                picked.values[b, j],
                picked.scales[b, j],
            )
            for b in range(pictures)
            for j in range(slots)
        ]
        y = torch.stack(out).unflatten(0, (pictures, slots)).to(x.dtype)
        return y if bias is None else y + bias[index].unsqueeze(-2).to(y.dtype)


def expert_linear(
    x: Tensor, weight: Tensor | QuantizedBank, index: Tensor, bias: Tensor | None = None
) -> Tensor:
    """`mimkernels.expert_linear`, or in 8 bits where the bank is quantised."""
    if isinstance(weight, QuantizedBank):
        return weight.linear(x, index, bias)
    return mimkernels.expert_linear(x, weight, index, bias)


def expert_combine(
    x: Sequence[Tensor],
    weight: Sequence[Tensor | QuantizedBank],
    index: Sequence[Tensor],
    gate: Sequence[Tensor],
    *,
    bias: Sequence[Tensor | None],
    residual: Tensor,
) -> Tensor:
    """`mimkernels.expert_combine`, quantised banks in 8 bits."""
    exact = []
    for part in zip(x, weight, index, gate, bias, strict=True):
        x_i, weight_i, index_i, gate_i, bias_i = part
        if isinstance(weight_i, QuantizedBank):
            y = weight_i.linear(x_i, index_i, bias_i)
            residual = residual + torch.einsum("bs,bstn->btn", gate_i.to(y.dtype), y)
        else:
            exact.append(part)
    if not exact:
        return residual
    parts: list[Any] = [list(p) for p in zip(*exact, strict=True)]
    return mimkernels.expert_combine(*parts[:4], bias=parts[4], residual=residual)


def quantized_mixtures(mim: nn.Module, dtype: torch.dtype) -> Callable[..., Any]:
    """A copy of `mimdit.mim.MiM` whose experts' matrices have 8 bits; all else is shared."""
    found = _shallow(mim)
    banks = [_shallow(bank) for bank in cast(nn.ModuleList, mim.banks)]
    for bank in banks:
        for name, weight in list(bank.named_parameters(recurse=False)):
            matrix = name in ("qkv_weight", "proj_weight")
            if matrix and not any(n % _STEP for n in weight.shape[-2:]):
                del bank._parameters[name]
                setattr(bank, name, QuantizedBank.of(weight, dtype))
    found._modules["banks"] = nn.ModuleList(banks)
    return found


def _shallow(module: nn.Module) -> nn.Module:
    """A module with the same parameters and children, which may be exchanged one by one."""
    found = module.__class__.__new__(module.__class__)
    found.__dict__ = module.__dict__ | {
        name: dict(module.__dict__[name]) for name in ("_parameters", "_buffers", "_modules")
    }
    return found
