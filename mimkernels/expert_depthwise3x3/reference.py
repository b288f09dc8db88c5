"""Depthwise 3×3 convolution with zero padding, by each picture's own experts.

The middle of Restormer's qkv projection (arXiv 2111.09881, Sec. 3.1).
"""

import torch.nn.functional as F
from torch import Tensor


def expert_depthwise3x3_reference(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """x [B,k,H,W,C], weight [E,C,3,3], index [B,k] → [B,k,H,W,C]."""
    b, k, height, width, c = x.shape
    if x.numel() == 0:
        # Empty, and the weight's gradient is zero: convolutions take no groups of nothing.
        return x * weight.sum().to(x.dtype)
    planes = x.permute(0, 1, 4, 2, 3).reshape(1, b * k * c, height, width)
    kernels = weight[index].reshape(b * k * c, 1, 3, 3).to(x.dtype)
    planes = F.conv2d(planes, kernels, padding=1, groups=b * k * c)
    return planes.reshape(b, k, c, height, width).permute(0, 1, 3, 4, 2).contiguous()
