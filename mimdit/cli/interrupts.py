"""Ctrl-C, also where a library turns it into an error of its own or drops it."""

import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupts:
    """Inside, Ctrl-C raises KeyboardInterrupt as always, and `asked` is true from then on.

    What is raised in Python that C has called may come out as something else: torch, which looks
    at a storage as at a sequence while safetensors are read, makes a ValueError of it, and
    finalizers drop it. So whoever catches any error asks `asked`, and loops call `check`.
    Nothing changes where Ctrl-C has another meaning already, such as none in a background job, and
    outside the main thread, which alone may handle signals.
    """

    def __init__(self) -> None:
        self.asked = False
        self._installed = False
        self._report: Any = None

    def __enter__(self) -> "Interrupts":
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if usual and threading.current_thread() is threading.main_thread():
            self._installed = True
            self._report, sys.unraisablehook = sys.unraisablehook, self._dropped
            signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._installed:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            sys.unraisablehook = self._report

    def check(self) -> None:
        """Raises KeyboardInterrupt where Ctrl-C was pressed."""
        if self.asked:
            raise KeyboardInterrupt

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        raise KeyboardInterrupt

    def _dropped(self, found: Any) -> None:
        """Errors that nobody can catch are printed, but for this one, which is not lost."""
        if not isinstance(found.exc_value, KeyboardInterrupt):
            self._report(found)
