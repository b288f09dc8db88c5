from mimkernels.squeeze_excite.op import squeeze_excite
from mimkernels.squeeze_excite.reference import squeeze_excite_reference

__all__ = ["squeeze_excite", "squeeze_excite_reference"]
