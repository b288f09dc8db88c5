"""The same pictures, faster: `mimdit.accelerate(pipe)` (DESIGN.md, "The engine")."""

from mimdit.engine.attach import accelerate
from mimdit.engine.engine import Engine
from mimdit.engine.plan import Plan, plan

__all__ = ["Engine", "Plan", "accelerate", "plan"]
