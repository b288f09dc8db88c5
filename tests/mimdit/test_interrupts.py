"""Ctrl-C of the other commands, and what is not Ctrl-C."""

import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from mimdit.cli import demo, init
from mimdit.cli.interrupts import Interrupts
from mimdit.cli.model import StopError


@pytest.fixture(autouse=True)
def foreground() -> Iterator[None]:
    """Where these tests run in the background, shells have them ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pressed(error: type[Exception]) -> None:
    """Ctrl-C inside a library that makes an error of its own of it."""
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise error("unable to load weights") from None


def test_a_new_model_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: object, **__: object) -> None:
        pressed(RuntimeError)

    monkeypatch.setattr("mimdit.sd35.from_sd35", build)
    out = tmp_path / "new"
    assert init.main(["--backbone", "x", "--out", str(out)]) == 130
    assert capsys.readouterr().err == "mimdit-init: stopped; nothing was written\n"
    assert not list(tmp_path.iterdir())


def test_any_error_of_a_new_model_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def build(*_: object, **__: object) -> None:
        raise RuntimeError("wrong shape\nwith details")

    monkeypatch.setattr("mimdit.sd35.from_sd35", build)
    command = ["--backbone", "x", "--out", str(tmp_path / "new")]
    assert init.main(command) == 1
    assert capsys.readouterr().err == "mimdit-init: wrong shape\n"
    assert init.main([*command, "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err
    for flags in (["--seed", "-1"], ["--top-k", "0"], ["--mim-dim", "x"]):
        with pytest.raises(SystemExit):
            init.main([*command, *flags])


def test_the_page_ends_quietly_while_its_model_loads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def serve(*_: object) -> None:
        pressed(StopError)

    monkeypatch.setattr(demo, "serve", serve)
    assert demo.main([]) == 0
    out, err = capsys.readouterr()
    assert not out and not err


def test_other_errors_that_nobody_can_catch_are_still_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Thing:
        def __del__(self) -> None:
            raise ValueError

    seen: list[object] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda found: seen.append(found.exc_type))
    with Interrupts() as interrupts:
        Thing()
    assert seen == [ValueError] and not interrupts.asked


def test_the_second_ctrl_c_is_one_too() -> None:
    with Interrupts() as interrupts:
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            interrupts.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_other_signals_interrupt_as_ctrl_c_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Interrupts(signal.SIGTERM) as interrupts, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    assert interrupts.asked and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
def test_signals_that_are_ignored_stay_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Interrupts(signal.SIGTERM) as interrupts:
            signal.raise_signal(number)
        assert not interrupts.asked and signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


def test_other_threads_leave_signals_alone() -> None:
    before, seen = (signal.getsignal(signal.SIGINT), sys.unraisablehook), []

    def inside() -> None:
        with Interrupts(signal.SIGTERM):
            seen.append((signal.getsignal(signal.SIGINT), sys.unraisablehook))

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert seen == [before]
