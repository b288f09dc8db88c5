"""`mimdit-restore`: restore pictures from the command line."""

import argparse
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mimdit.cli.arguments import build_parser
from mimdit.errors import first_line
from mimdit.image_io import (
    READ_SUFFIXES,
    WRITE_FORMATS,
    Picture,
    PictureError,
    compare,
    find_pictures,
    read_picture,
    write_bytes,
    write_picture,
)


class StopError(RuntimeError):
    """No picture can be restored; the message is one sentence for a user."""


@dataclass(frozen=True)
class Job:
    """One picture to restore and the files to write; `report` and `comparison` may be absent."""

    source: Path
    target: Path
    report: Path | None
    comparison: Path | None

    @property
    def files(self) -> list[Path]:
        return [path for path in (self.target, self.report, self.comparison) if path is not None]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (130 after Ctrl-C). Wrong arguments exit with 2."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.tile and args.tile_overlap >= args.tile:
        parser.error(
            f"--tile-overlap: expected less than --tile ({args.tile}), got {args.tile_overlap}"
        )
    try:
        sources, failures = collect(args.input)
        ending = args.output.suffix.lower()
        names_file = ending in READ_SUFFIXES and not args.output.is_dir()
        if names_file and ending not in WRITE_FORMATS:
            parser.error(f"-o {args.output}: {ending} cannot be written; use .png, .jpg or .webp")
        if names_file and len(sources) > 1:
            parser.error(f"-o {args.output} names one file, but there are {len(sources)} pictures")
        if names_file and (args.suffix or args.ext != "auto"):
            parser.error(f"--suffix and --ext need a folder, but -o {args.output} names a file")
        jobs, clashes = plan(sources, args, names_file)
        return restore_all(jobs, failures + clashes, args)
    except StopError as error:
        print(f"mimdit-restore: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("mimdit-restore: stopped; run again with --resume to go on", file=sys.stderr)
        return 130


def collect(patterns: Sequence[str]) -> tuple[list[Path], list[str]]:
    """Pictures that the patterns name, each once, and a sentence for each pattern without any."""
    sources: dict[Path, Path] = {}
    failures: list[str] = []
    for pattern in patterns:
        try:
            for path in find_pictures(pattern):
                sources.setdefault(path.resolve(), path)
        except PictureError as error:
            failures.append(str(error))
    return list(sources.values()), failures


def plan(
    sources: Sequence[Path], args: argparse.Namespace, names_file: bool
) -> tuple[list[Job], list[str]]:
    """Give each picture its output files; a sentence for each that would destroy another file."""
    inputs = {path.resolve() for path in sources}
    taken: dict[Path, Path] = {}
    jobs: list[Job] = []
    failures: list[str] = []
    for source in sources:
        job = _job(source, args, names_file)
        files = [path.resolve() for path in job.files]
        clash = next((taken[path] for path in files if path in taken), None)
        own = {source.resolve()} if args.overwrite else set()
        destroyed = next((path for path in files if path in inputs - own), None)
        if clash is not None:
            failures.append(
                f"{source}: would write the same files as {clash}; restore it into another folder"
            )
        elif destroyed == source.resolve():
            failures.append(
                f"{source}: would replace its own input; use another -o, --suffix or --overwrite"
            )
        elif destroyed is not None:
            failures.append(f"{source}: would replace the input {destroyed}; use another -o folder")
        else:
            jobs.append(job)
            taken.update(dict.fromkeys(files, source))
    return jobs, failures


def restore_all(jobs: Sequence[Job], failures: Sequence[str], args: argparse.Namespace) -> int:
    """Restore every job and print the summary; returns 1 if anything failed, else 0.

    `failures` are sentences about inputs that never became jobs.

    Raises:
        StopError: no model, or no folder to write into.
    """
    start = time.perf_counter()
    waiting = [
        job for job in jobs if not (args.resume and all(path.exists() for path in job.files))
    ]
    failures = list(failures)
    restored = 0
    pipe = None
    # One picture shows the pipeline's own bar, over steps.
    terminal = sys.stderr.isatty()
    bar = tqdm(waiting, unit="picture", file=sys.stderr, disable=len(waiting) < 2 or not terminal)
    with bar, warnings.catch_warnings():
        if not args.debug:
            warnings.simplefilter("ignore")
        for job in bar:
            try:
                picture = read_picture(job.source)
                if pipe is None:
                    _make_folder(job.target.parent)
                    pipe = _load(args)
                    pipe.set_progress_bar_config(disable=len(waiting) > 1 or not terminal)
                restore_one(pipe, job, picture, args)
                restored += 1
            except StopError:
                raise
            # One broken picture must not end a long run, whatever breaks.
            except Exception as error:
                if args.debug:
                    traceback.print_exc()
                failures.append(_sentence(job.source, error))
    skipped = len(jobs) - len(waiting)
    _print_summary(restored, skipped, failures, args.output, time.perf_counter() - start)
    return 1 if failures else 0


def restore_one(pipe: Any, job: Job, picture: Picture, args: argparse.Namespace) -> None:
    """Restore one picture and write its files, the picture last: once it is there, all are.

    Raises:
        PictureError: the result cannot be written.
        Exception: whatever the model raises.
    """
    import torch

    start = time.perf_counter()
    options = {
        "num_inference_steps": args.steps,
        "shifts": args.shifts,
        "guidance_scale": args.guidance_scale,
        "strength": args.strength,
        "color_fix": args.color_fix,
        "tile": args.tile,
        "tile_overlap": args.tile_overlap,
        "tile_batch": args.batch_size,
    }
    # A fresh generator, so that a picture does not depend on its place in the folder.
    generator = torch.Generator("cpu").manual_seed(args.seed)
    out = pipe(image=picture.rgb, generator=generator, output_type="np", **options)
    result = out.images[0]
    if job.comparison is not None:
        plain = replace(picture, alpha=None, exif=None, gray=False, bits=8)
        write_picture(job.comparison, compare(picture.rgb, result), plain)
    if job.report is not None:
        report = {
            "input": str(job.source),
            "output": str(job.target),
            "width": picture.rgb.shape[1],
            "height": picture.rgb.shape[0],
            "model": args.model,
            "seed": args.seed,
            **options,
            "seconds": round(time.perf_counter() - start, 3),
            "routing": out.routing.as_dict(),
        }
        write_bytes(job.report, (json.dumps(report, indent=2) + "\n").encode())
    write_picture(job.target, result, picture)


def _job(source: Path, args: argparse.Namespace, names_file: bool) -> Job:
    if names_file:
        target = args.output
    else:
        ending = source.suffix if args.ext == "auto" else f".{args.ext}"
        if ending.lower() not in WRITE_FORMATS:
            ending = ".png"
        target = args.output / f"{source.stem}{args.suffix}{ending}"
    return Job(
        source,
        target,
        target.with_name(f"{target.stem}.json") if args.report else None,
        target.with_name(f"{target.stem}_compare.png") if args.compare else None,
    )


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StopError(f"{folder}: cannot make this folder ({reason}); use another -o") from None


def _load(args: argparse.Namespace) -> Any:
    """The pipeline on the wanted device, without the libraries' notices unless --debug."""
    if not args.debug:
        for name in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
            os.environ.setdefault(name, "error")
    try:
        from diffusers.utils import logging

        if args.engine is not None:
            # Not imported by name: packages import one way, and `export` builds on this one.
            found = [*entry_points(group="mimdit.engines", name="onnx")]
            if not found:
                raise ValueError("expected the package export, found none; install mimdit anew")
            return found[0].load()(args.engine, args.device)

        from mimdit.engine import accelerate
        from mimdit.loading import load_pipeline

        if not args.debug:
            logging.disable_progress_bar()
        pipe = load_pipeline(args.model, _pick_device(args.device), args.precision)
        return accelerate(pipe) if args.accelerate else pipe
    # Checkpoints fail in many ways: OSError, KeyError, RuntimeError of a wrong shape ...
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        name = args.model if args.engine is None else str(args.engine)
        raise StopError(f"cannot load the model {name!r}: {first_line(error)}") from error


def _pick_device(wanted: str) -> str:
    import torch

    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wanted == "auto":
        return "cuda" if cuda else "mps" if mps else "cpu"
    if (wanted.startswith("cuda") and not cuda) or (wanted == "mps" and not mps):
        raise ValueError(f"--device {wanted} is not available here; use --device auto or cpu")
    return wanted


def _sentence(source: Path, error: Exception) -> str:
    if isinstance(error, PictureError):
        text = str(error)
        return text if text.startswith(f"{source}:") else f"{source}: {text}"
    if type(error).__name__ == "OutOfMemoryError":
        return f"{source}: out of memory; use smaller tiles (-t 512) or --batch-size 1"
    return f"{source}: {first_line(error)}"


def _print_summary(
    restored: int, skipped: int, failures: Sequence[str], output: Path, seconds: float
) -> None:
    line = f"restored {restored} picture{'' if restored == 1 else 's'}"
    if restored:
        line += f" into {output}"
    line += f" in {seconds:.1f} s"
    if skipped:
        line += f", {skipped} already there"
    if failures:
        line += f", {len(failures)} failed"
    print(line)
    for failure in failures:
        print(failure, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
