"""`mimdit-restore`: restore pictures from the command line."""

import argparse
import os
import sys
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import Any

from tqdm import tqdm

from mimdit.cli.arguments import build_parser
from mimdit.cli.checks import check
from mimdit.cli.interrupts import Interrupts
from mimdit.cli.jobs import INDEX, Job, collect, names_file, plan
from mimdit.cli.model import StopError
from mimdit.cli.places import ending, files_below, join, read_start, write
from mimdit.cli.work import Outcome, Restorer, made_otherwise
from mimdit.image_io import WRITE_FORMATS, PictureError

# Where nobody watches, progress is a line in a log each half a minute.
_LOG: dict[str, Any] = {"delay": 30, "mininterval": 30, "maxinterval": 30}
# Below the bar of the pictures, one that takes longer than this has a bar of its own.
_SLOW_SECONDS = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (130 after Ctrl-C). Wrong arguments exit with 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check(parser, args, argv)
    with Interrupts() as interrupts:
        try:
            return _run(parser, args, interrupts)
        except KeyboardInterrupt:
            pass
        except Exception as error:
            # Libraries turn Ctrl-C into errors of many kinds.
            if not interrupts.asked:
                if not isinstance(error, (StopError, PictureError)):
                    raise
                print(f"mimdit-restore: {_one_line(str(error))}", file=sys.stderr)
                return 1
    print("mimdit-restore: stopped; run again with --resume to go on", file=sys.stderr)
    return 130


def _run(parser: argparse.ArgumentParser, args: argparse.Namespace, interrupts: Interrupts) -> int:
    sources, failures = collect(args.input, args.output)
    interrupts.check()
    named, kind = names_file(args), ending(args.output).lower()
    if named and kind not in WRITE_FORMATS:
        parser.error(f"-o {args.output}: {kind} cannot be written; use .png, .jpg, .webp or .tif")
    if named and len(sources) > 1:
        parser.error(f"-o {args.output} names one file, but there are {len(sources)} pictures")
    if named and (args.suffix or args.ext != "auto"):
        parser.error(f"--suffix and --ext need a folder, but -o {args.output} names a file")
    jobs, clashes = plan(sources, args)
    args.index = args.compare and len(jobs) > 1
    return restore_all(jobs, failures + clashes, args, interrupts)


def restore_all(
    jobs: Sequence[Job], failures: Sequence[str], args: argparse.Namespace, interrupts: Interrupts
) -> int:
    """Restore every job and print the summary; returns 1 if anything failed, else 0.

    `failures` are sentences about inputs that never became jobs.

    Raises:
        StopError: no model, no cluster, or no folder to write into.
        KeyboardInterrupt: after the summary of what was done.
    """
    start = time.perf_counter()
    waiting = [job for job in jobs if job.wanted]
    failures = list(failures)
    notes: dict[str, list[str]] = {}
    for job in jobs:
        if (note := made_otherwise(job, args)) is not None:
            notes.setdefault(note, []).append(job.source)
    restored = 0
    bar = _progress(len(waiting))
    try:
        # Closed in any case: a cluster ends before the summary.
        done = closing(_outcomes(waiting, args, interrupts))
        with bar, warnings.catch_warnings(), done as outcomes:
            if not args.debug:
                warnings.simplefilter("ignore")
            for job, outcome in outcomes:
                if outcome.failure is None:
                    restored += 1
                else:
                    failures.append(outcome.failure)
                    bar.set_postfix(failed=len(failures), refresh=False)
                for note in outcome.notes:
                    notes.setdefault(note, []).append(job.source)
                bar.update()
                interrupts.check()
        if args.index:
            _write_index(args.output)
    finally:
        seconds = time.perf_counter() - start
        # Nothing is worth a summary where the model did not even load.
        if restored or failures or not isinstance(sys.exception(), (StopError, KeyboardInterrupt)):
            _print_summary(restored, len(jobs) - len(waiting), failures, notes, args, seconds)
    return 1 if failures else 0


def _outcomes(
    jobs: Sequence[Job], args: argparse.Namespace, interrupts: Interrupts
) -> Generator[tuple[Job, Outcome], None, None]:
    """Each job once it is done: here one after the other, on a cluster as they come."""
    if args.ray is not None and jobs:
        from mimdit.cli.ray_run import outcomes

        yield from outcomes(jobs, args)
        return
    restorer = Restorer(args, _passes_bar(len(jobs)), check=interrupts.check)
    for job in jobs:
        yield job, restorer(job)


def _progress(count: int) -> Any:
    """Pictures done and the time that is left: a bar on a terminal, else lines in a log."""
    terminal: dict[str, Any] = {"dynamic_ncols": True, "mininterval": 0.2}
    shown = terminal if sys.stderr.isatty() else _LOG
    return tqdm(total=count, unit="picture", file=sys.stderr, disable=count < 2, **shown)


def _passes_bar(count: int) -> dict[str, Any]:
    """Settings of the bar that a picture's forward passes have, of `count` pictures."""
    if not sys.stderr.isatty():
        # Of several pictures a log has lines for whole ones.
        return {"disable": count > 1, **_LOG}
    return {"leave": False, "delay": _SLOW_SECONDS} if count > 1 else {}


def _write_index(output: str) -> None:
    """List the before/after pages of the output folder, of earlier runs too."""
    from mimdit.compare_page import HEAD_BYTES, index_page, is_index, page_entry

    place = join(output, INDEX)
    names = files_below(output, ".html")
    if INDEX in names and not is_index(read_start(place, HEAD_BYTES)):
        return
    entries = []
    for name in names:
        if name.endswith("_compare.html"):
            entry = page_entry(read_start(join(output, name), HEAD_BYTES))
            if entry is not None:
                folder = os.path.dirname(name)
                entries.append((name, os.path.join(folder, entry[0]), entry[1]))
    if not entries:
        return
    write(place, index_page(entries).encode())


def _print_summary(
    restored: int,
    skipped: int,
    failures: Sequence[str],
    notes: dict[str, list[str]],
    args: argparse.Namespace,
    seconds: float,
) -> None:
    line = f"restored {restored} picture{'' if restored == 1 else 's'}"
    if restored:
        line += f" into {args.output}"
    line += f" in {seconds:.1f} s"
    if skipped:
        line += f", {skipped} already there"
    if failures:
        line += f", {len(failures)} failed"
    print(_one_line(line))
    for note, sources in notes.items():
        more = f" and {len(sources) - 1} more" if len(sources) > 1 else ""
        print(_one_line(f"note: {sources[0]}{more}: {note}"), file=sys.stderr)
    for failure in failures:
        print(_one_line(failure), file=sys.stderr)


def _one_line(text: str) -> str:
    """Names hold any bytes, also newlines; a sentence is one line of printable text."""
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode()
        for c in text
    )


if __name__ == "__main__":
    sys.exit(main())
