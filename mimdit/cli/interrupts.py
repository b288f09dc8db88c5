"""Signals that end or stop a program, Ctrl-C above all: also where a library drops it."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any


@contextmanager
def handling(
    answer: Callable[[int, FrameType | None], object], *numbers: signal.Signals
) -> Iterator[bool]:
    """Inside, these signals call `answer`, but for those that the process is to ignore, as a job
    in the background ignores Ctrl-C (`nohup … &` in a script).

    Yields whether it answers any: outside the main thread, which alone may handle signals, none.
    """
    before: dict[signal.Signals, Any] = {}
    main = threading.current_thread() is threading.main_thread()
    try:
        for number in numbers if main else ():
            # None: a handler in C, which Python could not put back.
            if signal.getsignal(number) not in (signal.SIG_IGN, None):
                before[number] = signal.signal(number, answer)
        yield bool(before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Interrupts:
    """Inside, Ctrl-C raises KeyboardInterrupt as always, and `asked` is true from then on.

    What is raised in Python that C has called may come out as something else: torch, which looks
    at a storage as at a sequence while safetensors are read, makes a ValueError of it, and
    finalizers drop it. So whoever catches any error asks `asked`, and loops call `check`.
    Nothing changes where Ctrl-C has another meaning already, such as none in a background job, and
    outside the main thread. others: signals that do the same.
    """

    def __init__(self, *others: signal.Signals) -> None:
        self.asked, self._others = False, others
        self._before = ExitStack()
        self._report: Any = None

    def __enter__(self) -> "Interrupts":
        usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        numbers = (*self._others, *([signal.SIGINT] if usual else []))
        if self._before.enter_context(handling(self._ask, *numbers)):
            self._report, sys.unraisablehook = sys.unraisablehook, self._dropped
            self._before.callback(setattr, sys, "unraisablehook", self._report)
        return self

    def __exit__(self, *error: object) -> None:
        self._before.close()

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
