"""What the page of `mimdit-demo` does with a picture: look, restore, stop."""

import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mimdit.image_io import WRITE_FORMATS, check_target, read_picture, write_picture

# Pixels along the longer side of what a page shows; the file to download is whole.
_SHOWN = 1600


class Stopped(Exception):
    """The visitor pressed Cancel, or left."""


@dataclass(frozen=True)
class Restored:
    """Files for a page, there until the next picture of the iterator, and what to say of them.

    shown: before and after, shrunk. result: the whole picture. chart: the experts, a PNG.
    weights: mean weight of each group of experts.
    """

    shown: tuple[str, str]
    result: str
    chart: str
    weights: dict[str, float]
    facts: str


class Studio:
    """One model for many visitors; it restores one picture at a time.

    pipe: a pipeline. folder: for temporary files. most_pixels: of larger pictures nothing but the
    header is read. most_steps: of a request.
    """

    def __init__(self, pipe: Any, folder: Path, most_pixels: int, most_steps: int) -> None:
        self.pipe, self.folder, self.most_steps = pipe, folder, most_steps
        self._turn = threading.Lock()
        self._visitors: dict[str, threading.Event] = {}
        # Pillow refuses what is larger than twice this while it reads the header.
        Image.MAX_IMAGE_PIXELS = max(most_pixels // 2, 1)

    def look(self, path: str) -> Iterator[tuple[str, str]]:
        """Yields once: a picture to show, and what it will take. Raises PictureError."""
        picture = read_picture(path)
        height, width = picture.rgb.shape[:2]
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            shown = _show(picture.rgb, picture.icc, Path(folder) / "before")
            plan = self.pipe.plan(height, width)
            tiles = len(plan.tiling.corners)
            text = f"{width}×{height} pixels, {tiles} tile{'s' * (tiles > 1)}"
            yield shown, "; ".join([text, *picture.notes])

    def restore(
        self,
        path: str,
        visitor: str,
        progress: Callable[[int, int], object],
        steps: int = 0,
        strength: float = 1.0,
        seed: int = 0,
        color_fix: str = "none",
    ) -> Iterator[Restored]:
        """Yields once; its files are gone afterwards. steps: 0 for what the model recommends.

        Raises:
            Stopped: by `stop` of this visitor.
            PictureError, ValueError: in one sentence for a visitor.
        """
        import torch

        from mimdit.report import expert_names, heat_map, png, summary

        if not 0 <= steps <= self.most_steps:
            raise ValueError(f"steps: expected 0 to {self.most_steps}, got {steps}")
        if not 0 <= seed < 2**63:
            raise ValueError(f"seed: expected 0 to {2**63 - 1}, got {seed}")
        picture = read_picture(path)
        height, width = picture.rgb.shape[:2]
        target = _target(path)
        check_target(target, height, width)
        with self._waiting(visitor) as stopped:

            def passed(done: int, total: int) -> None:
                if stopped.is_set():
                    raise Stopped
                progress(done, total)

            start = time.perf_counter()
            out = self.pipe(
                image=picture.rgb,
                generator=torch.Generator("cpu").manual_seed(seed),
                output_type="np",
                num_inference_steps=steps or None,
                strength=strength,
                color_fix=color_fix,
                progress=passed,
            )
            seconds = time.perf_counter() - start
        routing = out.routing.as_dict()
        groups, experts = expert_names(self.pipe, routing)
        with tempfile.TemporaryDirectory(dir=self.folder) as name:
            folder = Path(name)
            notes = write_picture(folder / target, out.images[0], picture)
            chart = folder / "experts.png"
            chart.write_bytes(png(heat_map(routing, groups, experts, Path(path).name)))
            shown = (
                _show(picture.rgb, picture.icc, folder / "before"),
                _show(out.images[0], picture.icc, folder / "after"),
            )
            weights = summary(routing, groups, experts)["inter_mean"]
            text = f"{width}×{height} pixels in {seconds:.1f} s"
            facts = "; ".join([text, *picture.notes, *notes])
            yield Restored(shown, str(folder / target), str(chart), weights, facts)

    def stop(self, visitor: str) -> None:
        """End what this visitor's picture is doing, after the forward pass that runs."""
        event = self._visitors.get(visitor)
        if event is not None:
            event.set()

    @contextmanager
    def _waiting(self, visitor: str) -> Iterator[threading.Event]:
        """The model, once others are done with it; gives what `stop` sets."""
        stopped = self._visitors[visitor] = threading.Event()
        try:
            with self._turn:
                if stopped.is_set():
                    raise Stopped
                yield stopped
        finally:
            if self._visitors.get(visitor) is stopped:
                del self._visitors[visitor]


def sentence(path: str | None, error: Exception) -> str:
    """An error for a visitor, without the places of temporary files."""
    from mimdit.errors import first_line
    from mimdit.memory import ran_out

    if ran_out(error):
        return "out of memory; use a smaller picture"
    text = first_line(error)
    return text if path is None else text.replace(path, Path(path).name)


def _target(path: str) -> str:
    """The name of the result, of the input's type where that can be written."""
    stem, kind = os.path.splitext(os.path.basename(path))
    return f"{stem}_restored{kind if kind.lower() in WRITE_FORMATS else '.png'}"


def _show(pixels: np.ndarray, icc: bytes | None, stem: Path) -> str:
    from mimdit.compare_page import encoded, shrunk

    data, kind = encoded(shrunk(pixels, _SHOWN), icc)
    path = stem.with_suffix(f".{kind}")
    path.write_bytes(data)
    return str(path)
