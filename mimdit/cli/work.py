"""What one process does: a model, loaded once, and picture after picture through it."""

import argparse
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mimdit.cli.jobs import INDEX, Job
from mimdit.cli.model import StopError, load
from mimdit.cli.places import ending, is_url, write
from mimdit.cli.staging import make_folder, staged
from mimdit.errors import first_line
from mimdit.image_io import (
    WRITE_FORMATS,
    Picture,
    PictureError,
    check_target,
    compare,
    read_picture,
    write_picture,
)


@dataclass(frozen=True)
class Outcome:
    """Of one picture: why it failed, or None; what a user should know of it besides."""

    failure: str | None = None
    notes: tuple[str, ...] = ()


class Restorer:
    """Restores pictures with one model, loaded when the first readable picture comes.

    bar: settings of the pipeline's progress bar, tqdm's. silent: without the plan of a large
    picture. check: raises where the run is to stop.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        bar: Mapping[str, Any],
        silent: bool = False,
        check: Callable[[], object] = lambda: None,
    ) -> None:
        self.args, self.bar, self.silent, self.check = args, bar, silent, check
        self._pipe: Any = None
        self._largest = 0

    def __call__(self, job: Job) -> Outcome:
        """Restore one picture and write its files; a failure is an outcome like any other.

        Raises:
            StopError: no model, or no folder to write into.
        """
        try:
            with staged(job) as here:
                picture = read_picture(here.source)
                check_target(here.target, *picture.rgb.shape[:2])
                if here is job:
                    make_folder(os.path.dirname(job.target) or ".", self.args.output)
                if self._pipe is None:
                    self._pipe = load(self.args)
                    self._pipe.set_progress_bar_config(**self.bar)
                    self.check()
                self._show_plan(picture)
                notes = restore_one(self._pipe, job, here, picture, self.args)
                return Outcome(notes=(*picture.notes, *notes))
        except StopError:
            raise
        # One broken picture must not end a long run, whatever breaks.
        except Exception as error:
            self.check()
            if self.args.debug:
                traceback.print_exc()
            return Outcome(_sentence(job.source, error))

    def _show_plan(self, picture: Picture) -> None:
        """Say what a picture larger than all before will take, where the pipeline knows."""
        height, width = picture.rgb.shape[:2]
        if height * width <= self._largest or not hasattr(self._pipe, "plan"):
            return
        self._largest = height * width
        args = self.args
        plan = self._pipe.plan(
            height,
            width,
            num_inference_steps=args.steps,
            shifts=args.shifts,
            tile=args.tile,
            tile_overlap=args.tile_overlap,
            tile_batch=args.batch_size,
        )
        # One tile is no news.
        if not self.silent and (plan.passes > 1 or args.debug):
            tqdm.write(f"plan: {plan}", file=sys.stderr)


def restore_one(
    pipe: Any, job: Job, here: Job, picture: Picture, args: argparse.Namespace
) -> tuple[str, ...]:
    """Restore one picture and write what is wanted, the picture last: once it is there, all are.

    here: the job with local files to work on. Returns notes for a user.

    Raises:
        PictureError: a result cannot be written; nothing new is left of this picture then.
        Exception: whatever the model raises.
    """
    import torch

    from mimdit.report import expert_names, heat_map, png, summary

    start = time.perf_counter()
    options = _options(args)
    # A fresh generator, so that a picture does not depend on its place in the folder.
    generator = torch.Generator("cpu").manual_seed(args.seed)
    with warnings.catch_warnings(record=True) as caught:
        # Less memory than planned changes tiles, which a user should know.
        warnings.filterwarnings("always", message=".*trying again with")
        out = pipe(image=picture.rgb, generator=generator, output_type="np", **options)
    seconds = round(time.perf_counter() - start, 3)
    notes = [first_line(w.message) for w in caught if isinstance(w.message, Warning)]
    result, routing = out.images[0], out.routing.as_dict()
    groups, experts = expert_names(pipe, routing) if job.report else ((), 0)
    title = _name(job.source)
    chart = png(heat_map(routing, groups, experts, title)) if job.report else None
    facts = {**_settings(args), "seconds": seconds}
    written: list[Path] = []

    def put(place: str | None, make: Any) -> None:
        """Write the file unless it is there already; `make` gives its bytes or writes it."""
        if place is None or place not in here.wanted:
            return
        fresh = not os.path.lexists(place)
        data = make()
        if data is not None:
            write(place, data)
        if fresh:
            written.append(Path(place))

    def report() -> bytes:
        height, width = picture.rgb.shape[:2]
        size = {"input": job.source, "output": job.target, "width": width, "height": height}
        known = {**size, **facts, **summary(routing, groups, experts), "routing": routing}
        return (json.dumps(known, indent=2) + "\n").encode()

    def page() -> bytes:
        from mimdit.compare_page import compare_page

        back = _way_to_index(job, args)
        return compare_page(
            picture.rgb, result, title, _facts(facts), picture.icc, chart, back
        ).encode()

    def side_by_side() -> None:
        bare = {"exif": None, "xmp": None, "iptc": None, "texts": (), "comments": ()}
        plain = replace(picture, alpha=None, gray=False, bits=8, **bare)
        write_picture(here.comparison or "", compare(picture.rgb, result), plain)

    def restored() -> bytes | None:
        # Pillow calls JPEGs of phones with a second picture inside MPO.
        same = WRITE_FORMATS[ending(here.target).lower()] == picture.format.replace("MPO", "JPEG")
        if args.strength == 0 and same:
            # The input itself: encoding a JPEG again would change it.
            return Path(here.source).read_bytes()
        notes.extend(write_picture(here.target, result, picture))
        return None

    try:
        put(here.report, report)
        put(here.heat_map, lambda: chart)
        put(here.page, page)
        put(here.comparison, side_by_side)
        put(here.target, restored)
    except Exception:
        for path in written:
            path.unlink(missing_ok=True)
        raise
    return tuple(notes)


def made_otherwise(job: Job, args: argparse.Namespace) -> str | None:
    """A note where a picture that is there was made with other settings, as its report says."""
    if job.report is None or job.report not in job.keep or is_url(job.report):
        return None
    try:
        known, asked = json.loads(Path(job.report).read_bytes()), _settings(args)
        # Not the tiles of a pass, which change no more than the rounding; in a report, "routing" is
        # what came out.
        names = {**asked, "experts": None}.keys() - {"tile_batch", "routing"}
        made = ", ".join(
            f"{n} {known.get(n)}" for n in sorted(names) if known.get(n) != asked.get(n)
        )
    # Somebody else's file of this name.
    except (OSError, ValueError, AttributeError):
        return None
    return f"is there already, made with {made}; --overwrite makes it anew" if made else None


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a picture depends on, as its report has it."""
    model = args.model if args.engine is None else str(args.engine)
    return {"model": model, "seed": args.seed, **_options(args)}


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the pipeline; the rarer ones only where they were given."""
    options = {
        "num_inference_steps": args.steps,
        "shifts": args.shifts,
        "guidance_scale": args.guidance_scale,
        "strength": args.strength,
        "color_fix": args.color_fix,
        "tile": args.tile,
        "tile_overlap": args.tile_overlap,
    }
    rare = {"tile_batch": args.batch_size, "experts": args.experts, "routing": args.routing}
    return options | {name: value for name, value in rare.items() if value is not None}


def _sentence(source: str, error: Exception) -> str:
    if isinstance(error, PictureError):
        text = str(error)
        return text if text.startswith(f"{source}:") else f"{source}: {text}"

    from mimdit.memory import ran_out

    if ran_out(error):
        return f"{source}: out of memory; use smaller tiles (-t 512) or --batch-size 1"
    return f"{source}: {first_line(error)}"


def _name(place: str) -> str:
    return place.rsplit("/", 1)[-1].rsplit(os.sep, 1)[-1]


def _facts(facts: dict[str, Any]) -> list[str]:
    """What was asked for, in words for a page."""
    steps, strength = facts["num_inference_steps"], facts["strength"]
    return [
        f"model {_name(str(facts['model']))}",
        "recommended steps" if steps is None else f"{steps} step{'s' * (steps > 1)}",
        f"seed {facts['seed']}",
        *([f"strength {strength:g}"] if strength < 1 else []),
        *([f"colours: {facts['color_fix']}"] if facts["color_fix"] != "none" else []),
        f"{facts['seconds']:.1f} s",
    ]


def _way_to_index(job: Job, args: argparse.Namespace) -> str | None:
    """The list of all pages, as a link from the job's page; None where there is no list."""
    if not args.index or job.page is None:
        return None
    depth = job.page[len(args.output) :].strip("/").replace(os.sep, "/").count("/")
    return "../" * depth + INDEX
