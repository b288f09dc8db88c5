from mimkernels.layernorm_modulate.op import layernorm_modulate
from mimkernels.layernorm_modulate.reference import layernorm_modulate_reference

__all__ = ["layernorm_modulate", "layernorm_modulate_reference"]
