"""Stopping a run between two steps, when a scheduler or a user asks for it."""

import signal
from contextlib import ExitStack
from types import FrameType

from mimdit.cli.interrupts import handling


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

    One that the process ignores stays ignored, and outside the main thread nothing changes.
    """

    def __init__(self) -> None:
        self.asked = False
        self._before = ExitStack()

    def __enter__(self) -> "StopRequests":
        self._before.enter_context(handling(self._ask, signal.SIGTERM, signal.SIGINT))
        return self

    def __exit__(self, *error: object) -> None:
        self._before.close()

    def check(self, step: int, output: str) -> None:
        """Raises Stopped where a stop was asked for."""
        if self.asked:
            raise Stopped(step, output)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True
