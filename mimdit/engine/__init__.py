"""The same pictures, faster: `mimdit.accelerate(pipe)` (DESIGN.md, "The engine")."""

from mimdit.engine.engine import Engine, accelerate
from mimdit.engine.plan import Plan, plan

__all__ = ["Engine", "Plan", "accelerate", "plan"]
