"""Rows of a benchmark as JSON lines, which are kept while it goes on."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mimdit.errors import first_line

Row = dict[str, Any]


class RowFile:
    """The rows of one run, behind those that the file had before.

    They are written as often as they become more or know more; a run that is stopped leaves what it
    has measured.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._before = path.read_text() if path.is_file() else ""
        if self._before and not self._before.endswith("\n"):
            self._before += "\n"

    @property
    def before(self) -> list[Row]:
        """Rows of earlier runs."""
        return [json.loads(line) for line in self._before.splitlines()]

    def write(self, rows: Sequence[Row]) -> None:
        """All rows of this run so far."""
        write_whole(self.path, self._before + "".join(json.dumps(row) + "\n" for row in rows))


def write_whole(path: Path, text: str) -> None:
    """The file is there whole, or as it was."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def said(fault: Exception) -> str:
    """An error as the reason in a row."""
    return f"{type(fault).__name__}: {first_line(fault)[:200]}"
