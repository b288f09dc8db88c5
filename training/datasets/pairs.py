"""Pairs of a damaged and a clean file, and how the files of two folders are matched."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

import numpy as np

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True)
class Pair:
    """One damaged file and its original.

    Attributes:
        name: unique in the data set, a relative path without extension such as "01Blur/0001".
        damaged: the damaged file. clean: the original, None where there is none.
        group: the row of a results table that the pair counts in, such as "01Blur".
        kinds: what damaged it, of `training.degrade.KINDS`; empty where unknown.
    """

    name: str
    damaged: Path
    clean: Path | None
    group: str
    kinds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Fault:
    """What is wrong with a data set: a kind such as "unmatched", where, and a sentence."""

    kind: str
    path: str
    message: str


@dataclass(frozen=True)
class Listing:
    """What a reader found.

    Attributes:
        pairs: sorted by group and name.
        faults: files and folders that do not fit the layout; they are not among the pairs.
        published: pairs that the data set has by its authors, by group; empty where unknown.
        singles: files of a folder of clean pictures, which has no pairs.
    """

    pairs: tuple[Pair, ...] = ()
    faults: tuple[Fault, ...] = ()
    published: Mapping[str, int] = field(default_factory=dict)
    singles: tuple[Path, ...] = ()

    @staticmethod
    def merge(listings: Iterable[Listing]) -> Listing:
        """All of several listings."""
        parts = list(listings)
        return Listing(
            tuple(pair for part in parts for pair in part.pairs),
            tuple(fault for part in parts for fault in part.faults),
            {group: n for part in parts for group, n in part.published.items()},
            tuple(path for part in parts for path in part.singles),
        )


class PackedPairs(Sequence[Pair]):
    """Pairs in three arrays, a fifth of the memory of as many objects.

    Loaders that are forked share arrays; of objects each would come to hold a copy of its own,
    since Python counts references in them.
    """

    def __init__(self, pairs: Iterable[Pair]) -> None:
        groups: dict[tuple[str, tuple[str, ...]], int] = {}
        texts: list[bytes] = []
        numbers: list[int] = []
        for pair in pairs:
            clean = "" if pair.clean is None else str(pair.clean)
            # No path holds a zero.
            texts.append(os.fsencode("\0".join((pair.name, str(pair.damaged), clean))))
            numbers.append(groups.setdefault((pair.group, pair.kinds), len(groups)))
        self._groups, self._group = list(groups), np.array(numbers, np.int32)
        self._ends = np.cumsum([0, *map(len, texts)])
        self._text = np.frombuffer(b"".join(texts), np.uint8)

    def __len__(self) -> int:
        return len(self._group)

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> list[Pair]: ...
    def __getitem__(self, index: int | slice) -> Pair | list[Pair]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        place = range(len(self))[index]
        text = self._text[self._ends[place] : self._ends[place + 1]].tobytes()
        name, damaged, clean = os.fsdecode(text).split("\0")
        group, kinds = self._groups[self._group[place]]
        return Pair(name, Path(damaged), Path(clean) if clean else None, group, kinds)


def pictures(folder: Path) -> list[Path]:
    """The picture files under a folder, at any depth, sorted; links are followed, hidden files and
    folders are not taken. Extensions count in any case.
    """
    return sorted(Path(path) for path in _under(str(folder), ()))


def _under(folder: str, above: tuple[str, ...]) -> Iterator[str]:
    """Paths of picture files; above: real paths of the folders on the way, which links may lead
    back to."""
    real = os.path.realpath(folder)
    if real in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _under(entry.path, (*above, real))
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file():
                yield entry.path


def found_at(path: Path) -> str:
    """What is at a path, for people."""
    if not path.exists():
        return "nothing of this name"
    inside = sorted(each.name for each in path.iterdir()) if path.is_dir() else [path.name]
    return ", ".join(inside[:6]) + (", …" if len(inside) > 6 else "") or "an empty folder"


def child(folder: Path, *names: str) -> Path | None:
    """The sub-folder with one of these names, in any case; the first name that is there wins."""
    if not folder.is_dir():
        return None
    found = {path.name.lower(): path for path in sorted(folder.iterdir()) if path.is_dir()}
    return next((found[name.lower()] for name in names if name.lower() in found), None)


def natural(name: str) -> list[tuple[bool, int, str]]:
    """A sorting key that puts "2" before "10"."""
    parts = re.split(r"(\d+)", name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def keyed(
    folder: Path, key: Callable[[str], str | None] = lambda stem: stem
) -> tuple[dict[str, Path], list[Fault]]:
    """The pictures under a folder by relative path without extension, and names that occur twice.

    key: turns that relative path into what the files are matched by; None leaves a file out.
    """
    files: dict[str, Path] = {}
    faults = []
    for path in pictures(folder):
        name = key(path.relative_to(folder).with_suffix("").as_posix())
        if name is None:
            continue
        if name in files:
            text = f"has the same name as {files[name].name}; keep one of them"
            faults.append(Fault("duplicate", str(path), text))
        else:
            files[name] = path
    return files, faults


def match(
    damaged: Path,
    clean: Path,
    group: str | Callable[[str], str],
    kinds: tuple[str, ...] | Callable[[str], tuple[str, ...]] = (),
    prefix: str = "",
) -> Listing:
    """Pairs of the files of two folders that have the same relative path, whatever the extension.

    group, kinds: of all pairs, or functions of the relative path. prefix: of the pairs' names.
    """
    inputs, faults = keyed(damaged)
    targets, more = keyed(clean)
    faults += more
    faults += [
        Fault("unmatched", str(files[name]), f"has no partner of this name in {other}")
        for files, others, other in ((inputs, targets, clean), (targets, inputs, damaged))
        for name in files
        if name not in others
    ]
    pairs = [
        Pair(
            prefix + name,
            inputs[name],
            targets[name],
            group(name) if callable(group) else group,
            kinds(name) if callable(kinds) else kinds,
        )
        for name in sorted(inputs, key=natural)
        if name in targets
    ]
    return Listing(tuple(pairs), tuple(faults))
