from mimkernels.expert_depthwise3x3.op import expert_depthwise3x3
from mimkernels.expert_depthwise3x3.reference import expert_depthwise3x3_reference

__all__ = ["expert_depthwise3x3", "expert_depthwise3x3_reference"]
