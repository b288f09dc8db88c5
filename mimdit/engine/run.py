"""What steps of one thread leave for its later ones."""

import threading
from typing import Any

from torch import Tensor

from mimdit.engine.first_block import Cache
from mimdit.engine.modulation import Table


class Run(threading.local):
    """Tables of modulations, made of the weights as `prepared` knows them, and the cache."""

    def __init__(self) -> None:
        self.tables: list[Table] = []
        self.prepared: tuple[Any, ...] | None = None
        self.cache = Cache()

    def table(
        self, prepared: tuple[Any, ...] | None, timestep: Tensor, pooled: Tensor
    ) -> Table | None:
        """The one of these weights with such times [B] and texts [B,P], if any."""
        tables = self.tables if self.prepared is prepared else []
        return next((table for table in tables if table.holds(timestep, pooled)), None)

    def forget(self) -> None:
        """Give back all of it."""
        self.tables = []
        self.cache.forget()
