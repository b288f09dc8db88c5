"""What the engine and the kernels are meant to reach, beside what was measured.

`python -m bench.targets PATH …` reads the rows that `bench.suite` and other commands left in files
and folders. Only rows whose results agreed with the reference count, ratios are of rows of one
run, and of an op that was measured at several sizes the worst one decides.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.kernels import EMPTY
from bench.rows import Row

# Below this floor, in µs, a launch decides, and shares of a peak mean nothing.
_SMALL = 30.0
_HEADS = "| target | wanted | measured | |"


@dataclass(frozen=True)
class Results:
    """The rows of each file."""

    files: tuple[tuple[Row, ...], ...]

    def last(self, key: str, **known: object) -> float | None:
        """The figure `key` of the last row that has it and these values."""
        found = (row[key] for rows in self.files for row in _having(rows, known) if key in row)
        return max(enumerate(found), default=(0, None))[1]

    def ratio(self, over: str, under: str, key: str = "picture_p50_s", **known: object) -> float | None:
        """Of two variants in one file, the last that has both."""
        found = None
        for rows in self.files:
            one = Results((rows,))
            values = [one.last(key, variant=name, **known) for name in (over, under)]
            if values[0] is not None and values[1] is not None:
                found = values[0] / values[1]
        return found

    def spread(self, key: str, **known: object) -> float | None:
        """The largest over the smallest, of three rows of a file or more; the last file's."""
        found = None
        for rows in self.files:
            values = [row[key] for row in _having(rows, known) if key in row]
            found = max(values) / min(values) if len(values) > 2 else found
        return found

    def kernel(self, ops: str, key: str, large: bool = True, **known: object) -> float | None:
        """The least figure of these ops; large: of sizes whose floor is above a launch."""
        named = {"variant": "triton", "pass": "forward", **known}
        rows = [
            row
            for rows in self.files
            for op in ops.split()
            for row in _having(rows, {"op": op, **named})
            if row.get("floor_us", 0) >= _SMALL * large
        ]
        return min((row[key] for row in rows if key in row), default=None)
