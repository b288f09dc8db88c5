"""What `mimdit-export` prints: its stages while they last, and the table at the end."""

import sys
import threading
import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from export.checks import Check
    from export.folder import Export


def table(done: "Export") -> str:
    """One line for every graph and output: its worst error over all sizes."""
    head = f"{'graph':<12}{'nodes':>7}{'MB':>9}{'s':>7}  {'output':<17}{'error':>9}{'gate':>9}  "
    lines = [f"{head}verdict"]
    about = {
        g.graph: f"{g.graph:<12}{g.nodes:>7}{done.megabytes[g.file]:>9.1f}{g.seconds:>7.1f}"
        for g in done.graphs
    }
    worst: dict[str, dict[str, Any]] = {}
    for check in done.checks:
        rows = worst.setdefault(check.graph, {})
        # A failure outweighs any error, NaN too.
        if check.output not in rows or (not check.passed, check.error) > (
            not rows[check.output].passed,
            rows[check.output].error,
        ):
            rows[check.output] = check
    for graph, rows in worst.items():
        start = about.get(graph, f"{graph:<35}")
        for check in rows.values():
            lines.append(f"{start}  {_row(check)}")
            start = f"{'':<35}"
    lines += [f"{text}  not checked" for graph, text in about.items() if graph not in worst]
    run = {check.graph.partition(" (")[2].rstrip(")") for check in done.checks}
    for engine in done.engines:
        size = f"{done.megabytes[engine.file]:>9.1f}{engine.seconds:>7.1f}"
        made = "engine reused" if engine.reused else "engine built"
        state = "compared above" if engine.library in run else "not run"
        lines.append(f"{engine.graph:<12}{'':>7}{size}  {made}, {state} ({engine.library})")
    lines += [f"{c.graph}, {_inputs(c)}: {c.place}" for c in done.checks if c.place]
    return "\n".join(lines)


def _row(check: "Check") -> str:
    """Output, error, gate and verdict."""
    gate = "" if check.gate is None else f"{check.gate:.1e}"
    verdict = "FAILED" if not check.passed else "ok" if check.gate is not None else "reported"
    parts = [part for part in ("" if check.passed else _inputs(check), check.note) if part]
    note = f" ({'; '.join(parts)})" if parts else ""
    return f"{check.output:<17}{check.error:>9.1e}{gate:>9}  {verdict}{note}"


def _inputs(check: "Check") -> str:
    """Which comparison it was."""
    size = f"{check.size}, " if check.size else ""
    return f"{size}{check.inputs} inputs, {check.weights} weights"


class Stages:
    """Says on stderr what goes on; on a terminal with the seconds so far."""

    def __init__(self) -> None:
        self._text, self._start, self._done = "", time.perf_counter(), threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "Stages":
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __call__(self, text: str) -> None:
        self._close()
        self._text, self._start = text, time.perf_counter()
        print(f"{text} …", end="", file=sys.stderr, flush=True)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._close()

    def _tick(self) -> None:
        while not self._done.wait(1.0):
            line = f"\r{self._text} … {time.perf_counter() - self._start:.0f} s"
            print(line, end="", file=sys.stderr, flush=True)

    def _close(self) -> None:
        """End the line of the last stage."""
        if self._text:
            start = f"\r{self._text} …" if sys.stderr.isatty() else ""
            seconds = time.perf_counter() - self._start
            print(f"{start} {seconds:.0f} s", file=sys.stderr, flush=True)
