"""The model that the arguments name, ready to restore."""

import argparse
import os
import sys
import traceback
import warnings
from importlib.metadata import entry_points
from typing import Any

from tqdm import tqdm

from mimdit.errors import first_line


class StopError(RuntimeError):
    """No picture can be restored; the message is one sentence for a user."""


def load(args: argparse.Namespace) -> Any:
    """The pipeline on the wanted device, without the libraries' notices unless --debug.

    Raises StopError where it cannot be had.
    """
    if not args.debug:
        for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
            os.environ.setdefault(name, "error")
    try:
        if args.engine is not None:
            # Not imported by name: packages import one way, and `export` builds on this one.
            found = [*entry_points(group="mimdit.engines", name="onnx")]
            if not found:
                raise ValueError("expected the package export, found none; install mimdit anew")
            with warnings.catch_warnings(record=True) as notes:
                # What runs it instead may be much slower.
                warnings.filterwarnings("always", message=".*takes its place")
                pipe = found[0].load()(args.engine, args.device)
            for note in notes:
                tqdm.write(f"note: {note.message}", file=sys.stderr)
            return pipe

        from diffusers.utils import logging

        from mimdit.engine import accelerate
        from mimdit.loading import load_pipeline

        if not args.debug:
            logging.disable_progress_bar()
        pipe = load_pipeline(args.model, _device(args.device), args.precision)
        _check_experts(pipe, args.experts)
        return accelerate(pipe) if args.accelerate else pipe
    except StopError:
        raise
    # Checkpoints fail in many ways: OSError, KeyError, RuntimeError of a wrong shape ...
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        name = args.model if args.engine is None else str(args.engine)
        raise StopError(f"cannot load the model {name!r}: {first_line(error)}") from error


def _check_experts(pipe: Any, experts: dict[str, float] | None) -> None:
    """Once, before the first of many pictures fails of it."""
    from mimdit.steering import check_experts

    try:
        if experts is not None and hasattr(pipe, "transformer"):
            check_experts(pipe.transformer.mim.groups, experts)
    except ValueError as error:
        raise StopError(f"--{first_line(error)}") from error


def _device(wanted: str) -> str:
    from mimdit.restoration import pick_device

    try:
        return pick_device(wanted)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
