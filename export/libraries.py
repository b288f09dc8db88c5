"""Optional packages, imported where used."""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any


class ExportError(RuntimeError):
    """Something that an export or an exported folder needs is missing or wrong; one sentence."""


def library(name: str) -> Any:
    """An optional package, or an `ExportError` that says how to install it."""
    extra = {"tensorrt": "trt", "tensorrt_rtx": "trt-rtx"}.get(name, "export")
    try:
        return import_module(name)
    except ImportError as error:
        raise ExportError(
            f"{name} cannot be imported ({error}); install it with pip install 'mimdit[{extra}]'"
        ) from error


def versions(*names: str) -> dict[str, str]:
    """Installed versions; of packages that are missing, "none"."""
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found
