"""Stopping a run between two steps, when a scheduler or a user asks for it."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stopped(Exception):
    """A run was asked to stop; `step` is what its last checkpoint holds."""

    def __init__(self, step: int, output: str) -> None:
        self.step, self.output = step, output
        super().__init__(
            f"stopped after step {step} of {output}; go on with the same command and "
            "--resume-from-checkpoint latest"
        )


class StopRequests:
    """Inside, SIGTERM and SIGINT set `asked` instead of ending the process; a second SIGINT ends
    it.

    Outside the main thread, which alone may handle signals, nothing changes.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for one in (signal.SIGTERM, signal.SIGINT):
                self._before[one] = signal.signal(one, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for one, handler in self._before.items():
            signal.signal(one, handler)

    def check(self, step: int, output: str) -> None:
        """Raises Stopped where a stop was asked for."""
        if self.asked:
            raise Stopped(step, output)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
