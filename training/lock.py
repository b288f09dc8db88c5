"""One run at a time in a folder."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """ValueError where another process of this machine is inside; one that was killed is not."""
    try:
        import fcntl
    except ImportError:
        # Windows has no such locks.
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("w") as file:
        try:
            # Of this process alone: its loaders, which may live on after a kill, do not inherit it.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise ValueError(f"output: {folder} is in use by another run") from None
        except OSError:
            # File systems without locks cannot tell.
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
