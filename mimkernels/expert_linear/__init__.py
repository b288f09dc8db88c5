from mimkernels.expert_linear.op import expert_linear
from mimkernels.expert_linear.reference import expert_linear_reference

__all__ = ["expert_linear", "expert_linear_reference"]
