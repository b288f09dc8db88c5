from mimkernels.channel_attention.op import channel_attention
from mimkernels.channel_attention.reference import channel_attention_reference

__all__ = ["channel_attention", "channel_attention_reference"]
