from mimkernels.gated_residual_layernorm_modulate.op import gated_residual_layernorm_modulate
from mimkernels.gated_residual_layernorm_modulate.reference import (
    gated_residual_layernorm_modulate_reference,
)

__all__ = ["gated_residual_layernorm_modulate", "gated_residual_layernorm_modulate_reference"]
