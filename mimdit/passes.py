"""Forward passes of a call, counted for whoever waits for it."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Progress = Callable[[int, int], object]


@dataclass
class PassCount:
    """Forward passes over all grids of a call, for a bar of tqdm and for `progress(done, all)`.

    expected: passes of each grid.
    """

    bar: Any
    progress: Progress | None
    expected: list[int]

    def begin(self, grid: int, passes: int) -> Callable[[], None]:
        """Start a grid, or start it again with other passes; call the result after each of them."""
        self.expected[grid] = passes
        before, everything = sum(self.expected[:grid]), sum(self.expected)
        self.bar.total, self.bar.n = everything, before
        # This would show a bar before its delay is over; one that is off has none.
        if not getattr(self.bar, "delay", 0):
            self.bar.refresh()
        count = itertools.count(before + 1)

        def passed() -> None:
            self.bar.update()
            if self.progress is not None:
                self.progress(next(count), everything)

        return passed
