"""The same pictures, faster: `mimdit.accelerate(pipe)` (DESIGN.md, "The engine")."""

from mimdit.engine.engine import Engine, accelerate

__all__ = ["Engine", "accelerate"]
