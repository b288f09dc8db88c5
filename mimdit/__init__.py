"""MiM-DiT: all-in-one image restoration by a diffusion transformer (arXiv 2603.02710)."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from mimdit.codec import PixelCodec
    from mimdit.engine import accelerate
    from mimdit.loading import load_pipeline
    from mimdit.pipeline import MiMDiTPipeline
    from mimdit.restoration import restore
    from mimdit.sd35 import from_sd35
    from mimdit.transformer import MiMDiTTransformer2DModel

# Resolved on first use: `import mimdit` must stay cheap for the command line's error messages.
_HOMES = {
    "MiMDiTPipeline": "mimdit.pipeline",
    "MiMDiTTransformer2DModel": "mimdit.transformer",
    "PixelCodec": "mimdit.codec",
    "accelerate": "mimdit.engine",
    "from_sd35": "mimdit.sd35",
    "load_pipeline": "mimdit.loading",
    "restore": "mimdit.restoration",
}
__all__ = [
    "MiMDiTPipeline",
    "MiMDiTTransformer2DModel",
    "PixelCodec",
    "accelerate",
    "from_sd35",
    "load_pipeline",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mimdit' has no attribute {name!r}")
