"""Triton kernels for mixtures of attention experts, each with a plain torch reference.

Triton is imported only when a kernel runs.
"""

from mimkernels import nn
from mimkernels.accelerate import accelerate, restore
from mimkernels.backend import use_backend
from mimkernels.channel_attention import channel_attention
from mimkernels.expert_combine import expert_combine
from mimkernels.expert_depthwise3x3 import expert_depthwise3x3
from mimkernels.expert_linear import expert_linear
from mimkernels.explain import explain
from mimkernels.gated_residual_layernorm_modulate import gated_residual_layernorm_modulate
from mimkernels.grouped_linear import grouped_linear
from mimkernels.image_gate import image_gate
from mimkernels.joint_qkv import joint_qkv, joint_qkv_
from mimkernels.layernorm_modulate import layernorm_modulate
from mimkernels.squeeze_excite import squeeze_excite
from mimkernels.topk_route import Route, topk_route
from mimkernels.window_attention import window_attention

__all__ = [
    "Route",
    "accelerate",
    "channel_attention",
    "expert_combine",
    "expert_depthwise3x3",
    "expert_linear",
    "explain",
    "gated_residual_layernorm_modulate",
    "grouped_linear",
    "image_gate",
    "joint_qkv",
    "joint_qkv_",
    "layernorm_modulate",
    "nn",
    "restore",
    "squeeze_excite",
    "topk_route",
    "use_backend",
    "window_attention",
]
