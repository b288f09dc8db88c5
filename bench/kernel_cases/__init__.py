"""What `bench.kernels` measures: for each op its arguments, its reference and its comparators.

All variants of a case take the same tensors, and run on a CPU, too.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from bench.kernel_cases import attention, blocks, experts, tokens
from bench.kernel_cases.base import (
    BATCHES,
    FULL,
    GRIDS,
    SMALL,
    TOLERANCE,
    Case,
    Draw,
    Size,
    Variant,
    compiled,
)
from mimkernels.backend import interpreting

__all__ = ["CASES", "SIZES", "SMALL", "TOLERANCE", "Case", "Size", "make", "variants"]

CASES: dict[str, Callable[[Size, Draw], Case]] = {
    "image_gate": experts.image_gate_case,
    "expert_linear": experts.expert_linear_case,
    "expert_combine": experts.expert_combine_case,
    "expert_depthwise3x3": experts.expert_depthwise3x3_case,
    "topk_route": tokens.topk_route_case,
    "grouped_linear": tokens.grouped_linear_case,
    "window_attention": attention.window_attention_case,
    "channel_attention": attention.channel_attention_case,
    "channel_attention_proj": attention.projected_channel_attention_case,
    "squeeze_excite": attention.squeeze_excite_case,
    "layernorm_modulate": blocks.layernorm_modulate_case,
    "gated_residual_layernorm_modulate": blocks.gated_residual_layernorm_modulate_case,
    "joint_qkv": blocks.joint_qkv_case,
}
# What a GPU is measured at.
SIZES: dict[str, tuple[Size, ...]] = dict.fromkeys(CASES, FULL) | {
    "image_gate": tuple(replace(size, layers=24) for size in FULL),
    "window_attention": GRIDS,
    "channel_attention": GRIDS,
    "channel_attention_proj": GRIDS,
    "squeeze_excite": GRIDS,
    "layernorm_modulate": FULL + BATCHES,
    "gated_residual_layernorm_modulate": FULL + BATCHES,
}


def make(op: str, size: Size, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Case:
    """The case of one op, with random tensors of this type on this device."""
    generator = torch.Generator(device).manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    return CASES[op](size, draw)


def variants(case: Case) -> dict[str, Variant]:
    """All that is compared, the kernel first."""
    x = case.tensors[0]
    on_gpu = x.device.type == "cuda"
    kernel: Variant = case.kernel
    if not on_gpu and not interpreting():
        kernel = "needs a GPU, or Triton's interpreter (TRITON_INTERPRET=1)"
    elif not on_gpu and x.dtype == torch.bfloat16:
        kernel = "Triton's interpreter has no bfloat16 arithmetic"
    traced = compiled(case.reference, x)
    ours: dict[str, Variant] = {"triton": kernel, "eager": case.reference, "compile": traced}
    return ours | case.comparators
