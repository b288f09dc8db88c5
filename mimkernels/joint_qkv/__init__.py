from mimkernels.joint_qkv.op import joint_qkv, joint_qkv_
from mimkernels.joint_qkv.reference import joint_qkv_reference

__all__ = ["joint_qkv", "joint_qkv_", "joint_qkv_reference"]
