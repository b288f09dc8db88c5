"""Layers of well-known networks on this package's ops, with those networks' parameter names.

State dicts go both ways without renaming. Where no kernel can run, the ops' torch references do
(`mimkernels.use_backend` chooses); gradients, autocast and `torch.compile` work as for the ops.
`mimkernels.accelerate` gives layers inside a model that exists already the same forward passes.
"""

from mimkernels.nn.layers import ChannelAttention, SqueezeExcite, WindowAttention

__all__ = ["ChannelAttention", "SqueezeExcite", "WindowAttention"]
