from mimkernels.grouped_linear.op import grouped_linear
from mimkernels.grouped_linear.reference import grouped_linear_reference

__all__ = ["grouped_linear", "grouped_linear_reference"]
