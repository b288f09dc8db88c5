"""Which pictures a step takes, and how large they are: all of it follows from the step's number.

Nothing of it is stored in a checkpoint, so a run that goes on sees what it would have seen, with
any number of processes that makes the same batch.
"""

import math
from dataclasses import dataclass

from training.config import Settings


@dataclass(frozen=True)
class Step:
    """crop in pixels; batch of a pass of a process; passes; first: the first picture's number."""

    crop: int
    batch: int
    passes: int
    first: int


def stage_of(step: int, settings: Settings) -> tuple[int, int]:
    """Crop, and pictures of a pass, at a step."""
    done = 0.0
    for crop, batch, share in settings.stages:
        done += share
        if step < done * settings.steps - 1e-9:
            return crop, batch
    return settings.stages[-1][:2]


class Schedule:
    """The steps of a run in `processes` processes.

    Raises ValueError where the total batch is not a multiple of what all processes take in a pass.
    """

    def __init__(self, settings: Settings, processes: int = 1) -> None:
        self.settings, self.processes = settings, processes
        # [first step, its first picture, crop, batch, passes] of each stage.
        self.stages: list[tuple[int, int, int, int, int]] = []
        step, picture, share = 0, 0, 0.0
        for crop, batch, part in settings.stages:
            passes, pass_ = settings.accumulation, batch * processes
            if settings.total_batch:
                passes, left = divmod(settings.total_batch, pass_)
                if left or not passes:
                    raise ValueError(
                        f"total batch: expected a multiple of {pass_} "
                        f"({processes} processes × {batch} pictures), got {settings.total_batch}"
                    )
            self.stages.append((step, picture, crop, batch, passes))
            share += part
            end = min(math.ceil(share * settings.steps - 1e-9), settings.steps)
            picture += (end - step) * pass_ * passes
            step = end

    def at(self, step: int) -> Step:
        """What a step takes."""
        begun, picture, crop, batch, passes = [s for s in self.stages if s[0] <= step][-1]
        return Step(crop, batch, passes, picture + (step - begun) * batch * passes * self.processes)

    def end_of_stage(self, step: int) -> int:
        """The step that the next stage begins with, or the end of the run."""
        later = [begun for begun, *_ in self.stages if begun > step]
        return min([*later, self.settings.steps])

    def pictures(self, step: int, pass_: int, rank: int) -> list[int]:
        """Numbers of the pictures of a pass of one process."""
        now = self.at(step)
        first = now.first + (pass_ * self.processes + rank) * now.batch
        return list(range(first, first + now.batch))

    def pixels(self, step: int, end: int) -> int:
        """Pixels of the crops of steps [step, end)."""
        total = 0
        while step < end:
            now, until = self.at(step), min(self.end_of_stage(step), end)
            total += (until - step) * now.crop**2 * now.batch * now.passes * self.processes
            step = until
        return total
