"""What an exported folder holds, and whether it still holds it."""

import glob
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.libraries import ExportError

if TYPE_CHECKING:
    from torch import nn

MANIFEST = "manifest.json"
FORMAT = 3


def weights_hash(parts: "Iterable[nn.Module]") -> str:
    """SHA-256 over names, types, shapes and bytes of all tensors."""
    import torch

    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        for name, tensor in sorted(part.state_dict().items()):
            data = tensor.detach().cpu().contiguous()
            digest.update(f"{number} {name} {data.dtype} {[*data.shape]}".encode())
            digest.update(data.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, entries: Mapping[str, Any]) -> dict[str, Any]:
    """Describe all files of a folder; `entries` are the other fields. Returns the manifest."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)}
        for path in sorted(folder.iterdir())
        if path.name != MANIFEST
    }
    manifest = {"format": FORMAT, **entries, "files": files}
    manifest["sha256"] = _own_hash(manifest)
    text = json.dumps(manifest, indent=2, allow_nan=False) + "\n"
    (folder / MANIFEST).write_text(text)
    return json.loads(text)


def verify(folder: Path | str, expected: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The manifest of a folder whose files are all as they were written.

    expected: values that fields must have, by dotted names, such as {"model.weights": …}: an export
    of other weights or settings is refused.

    Raises:
        ExportError: one sentence that names the first field that differs.
    """
    folder = Path(folder)
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise ExportError(f"{folder}: not an exported folder, it has no {MANIFEST}") from None
    except (OSError, ValueError) as error:
        raise ExportError(f"{folder}: {MANIFEST} cannot be read ({error}); export again") from None
    if not isinstance(manifest, dict):
        raise ExportError(f"{folder}: {MANIFEST} is no JSON object; export again")
    _same(folder, "format", FORMAT, manifest.get("format"))
    _same(folder, "sha256", _own_hash(manifest), manifest.get("sha256"))
    for name, entry in manifest["files"].items():
        path = folder / name
        if Path(name).name != name:
            raise ExportError(f"{folder}: files.{name}: expected the name of a file in this folder")
        if not path.is_file():
            raise ExportError(f"{folder}: files.{name} is missing; export again")
        _same(folder, f"files.{name}.bytes", entry["bytes"], path.stat().st_size)
        _same(folder, f"files.{name}.sha256", entry["sha256"], file_hash(path))
    for field, value in (expected or {}).items():
        _same(folder, field, value, _at(manifest, field))
    return manifest


def link(source: Path, copy: Path) -> None:
    """The same file under another name; a copy where the file system has no such links."""
    try:
        os.link(source, copy)
    except OSError:
        shutil.copyfile(source, copy)


def _own_hash(manifest: Mapping[str, Any]) -> str:
    """Of all fields but the hash itself."""
    rest = {name: value for name, value in manifest.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _at(manifest: Any, field: str) -> Any:
    for key in field.split("."):
        manifest = manifest.get(key) if isinstance(manifest, dict) else None
    return manifest


def _same(folder: Path, field: str, expected: Any, got: Any) -> None:
    if expected != got:
        raise ExportError(f"{folder}: {field}: expected {expected!r}, got {got!r}; export again")


@contextmanager
def finished_folder(target: Path) -> Iterator[Path]:
    """A folder to write into that becomes `target` at the end, whole or not at all.

    It replaces an earlier export, but no folder of another kind; other files beside the export's
    own move along. What a killed process left of its own attempt goes first.

    Raises:
        ExportError: `target` is neither new, empty nor an export, or cannot be replaced.
    """
    refuse_other(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    _clear(target)
    # In the same folder, so that renaming moves no data.
    work = Path(tempfile.mkdtemp(".partial", f".{target.name}.", target.parent))
    work.chmod(0o755)
    lock = _lock(work)
    try:
        yield work
        earlier = work.with_suffix(".earlier")
        try:
            if target.exists():
                target.rename(earlier)
            work.rename(target)
        finally:
            _settle(earlier, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def _clear(target: Path) -> None:
    """Away with what killed processes left of their attempts; the export that they were about to
    replace comes back."""
    # As `tempfile` names folders: those of "out.old" are not those of "out".
    name = f".{glob.escape(target.name)}.{'[!.]' * 8}"
    for abandoned in target.parent.glob(f"{name}.partial"):
        lock = _lock(abandoned)
        if lock is not None:
            shutil.rmtree(abandoned, ignore_errors=True)
            os.close(lock)
    for earlier in target.parent.glob(f"{name}.earlier"):
        # Whoever is still at it has a lock on the one or the other.
        if not earlier.with_suffix(".partial").exists():
            lock = _lock(target)
            if lock is not None or not target.exists():
                _settle(earlier, target)
            if lock is not None:
                os.close(lock)


def _settle(earlier: Path, target: Path) -> None:
    """Put an export aside back in its place, or away where that is taken."""
    if not earlier.is_dir():
        return
    if not target.exists():
        earlier.rename(target)
        return
    for other in _others(earlier):
        if not (target / other.name).exists():
            other.rename(target / other.name)
    shutil.rmtree(earlier, ignore_errors=True)


def refuse_other(target: Path) -> None:
    """ExportError unless a folder is new, empty or an export, and can be replaced."""
    if target.exists() and not target.is_dir():
        raise ExportError(f"{target}: is a file; give a folder")
    # Such as a volume of a container.
    if os.path.ismount(target):
        raise ExportError(f"{target}: is a mount point, not to be replaced; give a folder in it")
    if not target.is_dir() or not any(target.iterdir()):
        return
    # Folders of other programs have a file of this name, too.
    graphs = (target / MANIFEST).is_file() and any(target.glob("*.onnx"))
    if not graphs and _listed(target) is None:
        raise ExportError(f"{target}: holds other files than an export; give another folder")


def _listed(folder: Path) -> set[str] | None:
    """Names of the files in a manifest, if it can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        return {MANIFEST, *manifest["files"]} if "sha256" in manifest else None
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _others(folder: Path) -> list[Path]:
    """What lies in an earlier export and is no part of it."""
    if not folder.is_dir():
        return []
    own = _listed(folder) or set()
    return [path for path in folder.iterdir() if path.name not in own]


def _lock(folder: Path) -> int | None:
    """A descriptor that keeps a folder from others until this process ends or closes it.

    None where another one has it, or where the system has no such locks.
    """
    try:
        import fcntl

        place = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):
        return None
    try:
        fcntl.flock(place, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(place)
        return None
    return place
