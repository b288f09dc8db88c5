"""What a run has to do: pictures, and the files that each of them gives."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mimdit.cli.places import (
    ending,
    existing,
    find,
    identity,
    is_folder,
    is_url,
    join,
)
from mimdit.image_io import READ_SUFFIXES, WRITE_FORMATS, PictureError

# The list of all before/after pages of an output folder.
INDEX = "compare.html"


@dataclass(frozen=True)
class Job:
    """One picture to restore and the files to write: the picture, and those asked for beside it.

    report, heat_map, page and comparison may be absent; keep: files that are there and stay.
    """

    source: str
    target: str
    report: str | None = None
    heat_map: str | None = None
    page: str | None = None
    comparison: str | None = None
    keep: frozenset[str] = frozenset()

    @property
    def files(self) -> list[str]:
        """All of them, the picture last."""
        beside = (self.report, self.heat_map, self.page, self.comparison)
        return [*(place for place in beside if place is not None), self.target]

    @property
    def wanted(self) -> list[str]:
        """The files that are still to be written."""
        return [place for place in self.files if place not in self.keep]


def names_file(args: argparse.Namespace) -> bool:
    """Whether -o names a picture, not a folder."""
    return ending(args.output).lower() in READ_SUFFIXES and not is_folder(args.output)


def collect(patterns: Sequence[str], output: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Pictures that the patterns name and their paths in the output, and failures in words."""
    sources: dict[tuple[str, str], str] = {}
    failures: list[str] = []
    for pattern in patterns:
        try:
            found, unread = find(pattern, output)
        except PictureError as error:
            failures.append(str(error))
            continue
        failures += unread
        for place, relative in found:
            sources.setdefault((identity(place), relative), place)
    return [(place, relative) for (_, relative), place in sources.items()], failures


def plan(
    sources: Sequence[tuple[str, str]], args: argparse.Namespace
) -> tuple[list[Job], list[str]]:
    """Give each picture its output files; a sentence for each that would destroy another file."""
    jobs = [make_job(source, relative, args) for source, relative in sources]
    if args.resume:
        # What an earlier run wrote into a folder of inputs is no input.
        made = {identity(place) for job in jobs for place in job.files}
        jobs = [job for job in jobs if identity(job.source) not in made - _ids([job.target])]
    inputs = {identity(job.source) for job in jobs}
    remote = existing(args.output)
    taken: dict[str, str] = {}
    planned: list[Job] = []
    failures: list[str] = []
    for job in jobs:
        files, own = _ids(job.files), identity(job.source)
        there = [place for place in job.files if _exists(place, remote)]
        clash = next((taken[place] for place in files if place in taken), None)
        destroyed = files & (inputs - ({own} if args.overwrite else set()))
        if clash is not None:
            failures.append(
                f"{job.source}: would write the same files as {clash}; restore it into another "
                "folder"
            )
        elif own in destroyed:
            failures.append(
                f"{job.source}: would replace its own input; use another -o, --suffix or "
                "--overwrite"
            )
        elif destroyed:
            failures.append(
                f"{job.source}: would replace the input {destroyed.pop()}; use another -o folder"
            )
        elif there and not (args.resume or args.overwrite):
            failures.append(
                f"{job.source}: {there[-1]} exists; use --resume to keep it, or --overwrite"
            )
        else:
            planned.append(replace(job, keep=frozenset(there)) if args.resume else job)
            taken.update(dict.fromkeys(files, job.source))
    return planned, failures


def make_job(source: str, relative: str, args: argparse.Namespace) -> Job:
    """The files of one picture; relative: its path below the output folder."""
    if names_file(args):
        target = args.output
    else:
        stem, kind = os.path.splitext(relative)
        kind = kind if args.ext == "auto" else f".{args.ext}"
        kind = kind if kind.lower() in WRITE_FORMATS else ".png"
        target = join(args.output, f"{stem}{args.suffix}{kind}")
    stem = os.path.splitext(target)[0]
    return Job(
        source,
        target,
        f"{stem}.json" if args.report else None,
        f"{stem}_experts.png" if args.report else None,
        f"{stem}_compare.html" if args.compare else None,
        f"{stem}_compare.png" if args.compare else None,
    )


def _ids(places: Sequence[str]) -> set[str]:
    return {identity(place) for place in places}


def _exists(place: str, remote: frozenset[str]) -> bool:
    return place in remote if is_url(place) else os.path.lexists(place)
