from mimkernels.expert_combine.op import expert_combine
from mimkernels.expert_combine.reference import expert_combine_reference

__all__ = ["expert_combine", "expert_combine_reference"]
