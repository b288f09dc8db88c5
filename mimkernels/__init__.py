"""Triton kernels for mixtures of attention experts, each with a plain torch reference.

Triton is imported only when a kernel runs.
"""

from mimkernels.backend import use_backend
from mimkernels.expert_combine import expert_combine
from mimkernels.expert_depthwise3x3 import expert_depthwise3x3
from mimkernels.expert_linear import expert_linear
from mimkernels.image_gate import image_gate

__all__ = ["expert_combine", "expert_depthwise3x3", "expert_linear", "image_gate", "use_backend"]
