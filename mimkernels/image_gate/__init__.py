from mimkernels.image_gate.op import image_gate
from mimkernels.image_gate.reference import gate_reference, image_gate_reference

__all__ = ["gate_reference", "image_gate", "image_gate_reference"]
