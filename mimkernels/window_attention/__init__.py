from mimkernels.window_attention.op import window_attention
from mimkernels.window_attention.reference import window_attention_reference

__all__ = ["window_attention", "window_attention_reference"]
