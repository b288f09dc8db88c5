"""Where a picture is worked on: in place, or for URLs in a temporary folder."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mimdit.cli.jobs import Job
from mimdit.cli.model import StopError
from mimdit.cli.places import ending, fetch, is_url, write
from mimdit.image_io import PictureError


@contextmanager
def staged(job: Job) -> Iterator[Job]:
    """The job with local files, which are copied to their URLs at the end, the picture last."""
    if not (is_url(job.source) or is_url(job.target)):
        yield job
        return
    with tempfile.TemporaryDirectory(prefix="mimdit-") as name:
        folder = Path(name)
        source = fetch(job.source, folder) if is_url(job.source) else Path(job.source)
        kept = ("report", "heat_map", "page", "comparison", "target")
        places = {
            field: str(folder / f"{field}{ending(place)}")
            for field in kept
            if (place := getattr(job, field)) is not None
        }
        keep = frozenset(places[f] for f in places if getattr(job, f) in job.keep)
        try:
            yield Job(str(source), keep=keep, **places)
        except PictureError as error:
            text = str(error).replace(places["target"], job.target)
            raise PictureError(text.replace(str(source), job.source)) from error
        for field, local in places.items():
            if local not in keep:
                if not is_url(job.target):
                    make_folder(os.path.dirname(job.target) or ".", os.path.dirname(job.target))
                write(getattr(job, field), Path(local).read_bytes())


def make_folder(folder: str, root: str) -> None:
    """A folder of the output, whose `root` must be one for the run to go on."""
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        text = f"{folder}: cannot make this folder ({reason}); use another -o"
        kind = PictureError if os.path.isdir(root) and folder != root else StopError
        raise kind(text) from None
