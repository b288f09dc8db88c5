"""`mimdit-export`: a model as a folder of graphs that restores pictures without it."""

import argparse
import errno
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from export.arguments import build_parser, check_arguments
from export.libraries import ExportError, library
from export.report import Stages, table
from mimdit.cli.interrupts import Interrupts
from mimdit.errors import first_line

if TYPE_CHECKING:
    from export.folder import Export

# A disk, the limit of a process or, where the system has them, a quota that is full.
_FULL = {errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC)}


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mimdit-export`; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check_arguments(parser, args)
    # Read when diffusers is first imported.
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    # SIGTERM cleans up as Ctrl-C does.
    interrupts = Interrupts(signal.SIGTERM)
    try:
        for name in ("onnx", "onnxscript", "onnxruntime"):
            library(name)
        with warnings.catch_warnings(), Stages() as stages, interrupts:
            if not args.debug:
                warnings.simplefilter("ignore")
            done = export(args, stages) if args.out is not None else check(args, stages)
    # Models fail in many ways: ExportError, ValueError, OSError, errors of torch's tracing ...
    # and libraries turn Ctrl-C into errors of their own.
    except (Exception, KeyboardInterrupt) as error:
        if interrupts.asked or isinstance(error, KeyboardInterrupt):
            print("mimdit-export: stopped; nothing was written", file=sys.stderr)
            return 130
        if args.debug:
            traceback.print_exc()
        print(f"mimdit-export: {_sentence(error, args.out or args.model)}", file=sys.stderr)
        return 1
    print(table(done))
    if not done.passed:
        print(f"mimdit-export: a gate failed; the files are in {done.folder}", file=sys.stderr)
        return 1
    verb = "wrote" if args.out is not None else "checked"
    print(f"{verb} {done.folder}{'' if done.checks else ', not checked'}")
    return 0


def _sentence(error: Exception, place: Path | str) -> str:
    """What went wrong; of a full disk the system says neither what did not fit nor what is left."""
    if isinstance(error, OSError) and error.errno is not None and error.errno in _FULL:
        got = os.strerror(error.errno)
        return f"{place}: expected room for all of its files, got {got!r}; nothing was written"
    return first_line(error)


def export(args: argparse.Namespace, progress: Callable[[str], None]) -> "Export":
    """Write the folder that the arguments ask for."""
    model = args.model or "tiny"
    from export.compare import require_comparable
    from export.engines import gpu, require
    from export.folder import export_folder
    from export.manifest import refuse_other
    from export.plan import plan, targets

    # Before what takes minutes.
    refuse_other(_named(args.out))
    for target in targets(args):
        require(target)
    # Engines that run here are compared without ONNX Runtime, too.
    if args.check is not False and not (targets(args) and gpu()):
        require_comparable(args.precision, args.device, args.opset)
    progress(f"loading {model}")
    pipe = load(model, args.precision)
    # Folders by their full path: they are read again by --check, from anywhere.
    folder = Path(model).is_dir() and not _preset(model)
    name = str(Path(model).resolve()) if folder else model
    return export_folder(pipe, _named(args.out), plan(pipe, args), name, progress)


def check(args: argparse.Namespace, progress: Callable[[str], None]) -> "Export":
    """Compare the exported folder `args.model` with its model again."""
    from export.manifest import verify, weights_hash

    folder = _named(Path(args.model))
    progress(f"hashing {folder}")
    manifest = verify(folder)
    name = manifest["model"]["name"]
    progress(f"loading {name}")
    try:
        pipe = load(name, manifest["precision"])
    except (OSError, ValueError) as error:
        raise ExportError(
            f"{folder}: model.name: expected the exported model at {name} ({first_line(error)})"
        ) from error
    weights = weights_hash((pipe.transformer, pipe.vae))
    verify(folder, {"model.weights": weights})
    from export.folder import check_folder

    return check_folder(pipe, folder, manifest, args.device, progress)


def _named(folder: Path) -> Path:
    """A path with a name of its own, beside which others can lie: "." and links have none."""
    return folder.resolve() if folder.name in ("", "..") or folder.is_symlink() else folder


def _preset(name: str) -> bool:
    """Whether a preset can be had by this name; it goes before a folder."""
    from mimdit.loading import shipped

    return name == "debug" or name in shipped()


def load(name: str, precision: str) -> Any:
    """The pipeline on the CPU; `debug` has drawn weights."""
    from diffusers.utils import logging

    from mimdit.loading import PRECISIONS, assemble, load_pipeline
    from mimdit.presets import PRESETS, build

    logging.disable_progress_bar()
    if name != "debug":
        if name in PRESETS and not _preset(name) and not Path(name).is_dir():
            raise ExportError(
                f"{name} ships without weights; make a folder with mimdit-init, and name that"
            )
        return load_pipeline(name, precision=precision)
    import torch

    torch.manual_seed(0)
    # Drawn weights drift off over many steps.
    pipe = assemble(build(name).randomize_(0).eval(), default_steps=3)
    return pipe.to(PRECISIONS[precision])


if __name__ == "__main__":
    sys.exit(main())
