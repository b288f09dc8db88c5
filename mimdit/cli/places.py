"""Where pictures lie: local paths, or URLs that fsspec opens (s3://, gs://, memory:// and others).

A place is a string. Local files go through `mimdit.image_io`; those behind a URL are copied to a
temporary folder, worked on there, and copied back.
"""

import glob
import os
import posixpath
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mimdit.errors import first_line
from mimdit.image_io import READ_SUFFIXES, PictureError, find_pictures, write_bytes

# Two letters at least: C: is a drive.
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
# File systems where a file appears whole or not at all; elsewhere it is written aside and moved.
_WHOLE = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "memory"}


def is_url(place: str) -> bool:
    """Whether fsspec has to open it."""
    return _URL.match(place) is not None


def identity(place: str) -> str:
    """Equal for two spellings of one file."""
    return place if is_url(place) else os.path.realpath(place)


def join(folder: str, relative: str) -> str:
    """A place below a folder."""
    if is_url(folder):
        return posixpath.join(folder, relative.replace(os.sep, "/"))
    return os.path.join(folder, relative)


def ending(place: str) -> str:
    """The suffix, such as ".png", or ""."""
    return os.path.splitext(place)[1]


def is_folder(place: str) -> bool:
    """Whether it is one now."""
    if not is_url(place):
        return os.path.isdir(place)
    with _words(place, "read"):
        system, path = _system(place)
        return system.isdir(path)


def find(pattern: str, skip: str) -> tuple[list[tuple[str, str]], list[str]]:
    """Pictures that a file, folder or glob names, each with its path in a mirrored tree, sorted.

    Folders are searched with their subfolders. Hidden files and folders and the folder `skip` (an
    output inside the input) do not count. A glob mirrors the tree below its fixed beginning.

    Returns:
        Places and their relative paths; a sentence for each folder that could not be read.

    Raises:
        PictureError: nothing is found.
    """
    if is_url(pattern):
        return _find_remote(pattern, skip), []
    found: list[tuple[str, str]] = []
    failures: list[str] = []
    if os.path.isdir(pattern):
        for path in _walk(pattern, os.path.realpath(skip), failures):
            found.append((path, os.path.relpath(path, pattern)))
        if not found and not failures:
            raise PictureError(
                f"{pattern}: no pictures in this folder; give one that holds .png, .jpg or .webp"
            )
        return found, failures
    paths = [str(path) for path in find_pictures(pattern)]
    if os.path.exists(pattern):
        return [(path, os.path.basename(path)) for path in paths], []
    root = _fixed(pattern) or "."
    if not _inside(root, skip):
        paths = [path for path in paths if not _inside(path, skip)]
    return [(path, os.path.relpath(path, root)) for path in paths], []


def existing(folder: str) -> frozenset[str]:
    """The files below a URL, one question for all of them; nothing for a local folder."""
    if not is_url(folder):
        return frozenset()
    with _words(folder, "listed"):
        system, path = _system(folder)
        try:
            return frozenset(_url(folder, name) for name in system.find(path))
        except FileNotFoundError:
            return frozenset()


def fetch(place: str, folder: Path) -> Path:
    """A local copy of a remote file. Raises PictureError where it cannot be had."""
    local = folder / f"source{ending(place)}"
    with _words(place, "read"):
        system, path = _system(place)
        system.get_file(path, str(local))
    return local


def write(place: str, data: bytes) -> None:
    """Write a file whole or not at all, with its folder. Raises PictureError where that fails."""
    with _words(place, "written"):
        if not is_url(place):
            write_bytes(Path(place), data)
            return
        system, path = _system(place)
        folder = posixpath.dirname(path)
        system.makedirs(folder, exist_ok=True)
        if place.split("://")[0] in _WHOLE:
            system.pipe_file(path, data)
            return
        part = posixpath.join(folder, f".{secrets.token_hex(8)}.part")
        try:
            system.pipe_file(part, data)
            system.mv(part, path)
        finally:
            if system.exists(part):
                system.rm_file(part)


def read_start(place: str, count: int) -> bytes:
    """The first bytes of a file."""
    with _words(place, "read"):
        if not is_url(place):
            with open(place, "rb") as file:
                return file.read(count)
        system, path = _system(place)
        with system.open(path, "rb") as file:
            return file.read(count)


def files_below(folder: str, end: str) -> list[str]:
    """Files of a folder and its subfolders whose names end so, as relative paths, sorted."""
    if is_url(folder):
        names = [posixpath.relpath(name, folder) for name in existing(folder)]
    else:
        names = [
            os.path.relpath(os.path.join(parent, name), folder)
            for parent, _, files in os.walk(folder)
            for name in files
        ]
    return sorted(name for name in names if name.endswith(end))


@contextmanager
def _words(place: str, done: str) -> Iterator[None]:
    """Errors as one sentence: `place` cannot be read, listed, written."""
    try:
        yield
    except PictureError:
        raise
    except FileNotFoundError:
        raise PictureError(f"{place}: no such file or folder; check the path") from None
    # Each file system of fsspec has errors of its own, for networks and rights.
    except Exception as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise PictureError(f"{place}: cannot be {done} ({reason})") from error


def _inside(place: str, folder: str) -> bool:
    """Whether a local place is a local folder or lies in it."""
    real, outer = os.path.realpath(place), os.path.realpath(folder)
    return not is_url(folder) and (real == outer or real.startswith(outer.rstrip(os.sep) + os.sep))


def _walk(folder: str, skip: str, failures: list[str]) -> Iterator[str]:
    """Pictures below a folder; links to folders are followed, but no folder is entered twice."""
    seen = {os.path.realpath(folder)}

    def failed(error: OSError) -> None:
        failures.append(f"{error.filename}: cannot read this folder ({error.strerror})")

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=failed):
        entered = []
        for name in sorted(folders):
            real = os.path.realpath(os.path.join(parent, name))
            if not name.startswith(".") and real not in seen and real != skip:
                seen.add(real)
                entered.append(name)
        folders[:] = entered
        # A link to nothing is listed, so that its failure is reported.
        yield from (os.path.join(parent, name) for name in sorted(names) if _shows(name))


def _shows(name: str) -> bool:
    """Whether the name is that of a picture which folders and globs offer."""
    return not name.startswith(".") and ending(name).lower() in READ_SUFFIXES


def _fixed(pattern: str) -> str:
    """The folders of a glob before its first wildcard."""
    parts = pattern.split(os.sep)
    magic = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return os.sep.join(parts[:magic]) or (os.sep if pattern.startswith(os.sep) else "")


def _find_remote(pattern: str, skip: str) -> list[tuple[str, str]]:
    with _words(pattern, "listed"):
        system, path = _system(pattern)
        if system.isfile(path):
            return [(pattern, posixpath.basename(path))]
        if system.isdir(path):
            names, root = system.find(path), path
        elif glob.has_magic(path):
            names = [name for name in system.glob(path) if system.isfile(name)]
            root = _fixed(path)
        else:
            names, root = [], path
    found = []
    for name in sorted(names):
        relative, url = posixpath.relpath(name, root), _url(pattern, name)
        hidden = any(part.startswith(".") for part in relative.split("/"))
        inside = is_url(skip) and url.startswith(skip.rstrip("/") + "/") and skip != pattern
        if not hidden and not inside and _shows(posixpath.basename(name)):
            found.append((url, relative))
    if not found:
        raise PictureError(f"{pattern}: no picture there; check the URL")
    return found


def _url(like: str, path: str) -> str:
    """A path of a file system under the scheme that the user wrote."""
    scheme = like.split("://")[0]
    path = path.lstrip("/") if scheme == "memory" else path
    return path if is_url(path) else f"{scheme}://{path}"


def _system(place: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and its own path there."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(place)
    except (ImportError, ValueError) as error:
        reason = first_line(error)
        raise PictureError(f"{place}: fsspec cannot open this kind of URL ({reason})") from None
