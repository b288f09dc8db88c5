"""Which pictures a step takes, and how large they are: all of it follows from the step's number.

Nothing of it is stored in a checkpoint, so a run that goes on sees what it would have seen, with
any number of processes that makes the same batch.
"""

import math
from dataclasses import dataclass

from training.config import Settings, Stage, in_turn


@dataclass(frozen=True)
class Step:
    """crop in pixels; batch of a pass of a process; passes; first: the first picture's number."""

    crop: int
    batch: int
    passes: int
    first: int


@dataclass(frozen=True)
class _Turn:
    """A step of each size that a stage takes in turn; first: of the stage's first such step.

    pictures: of all processes, before each of the sizes and, last, of the whole turn; pixels:
    likewise.
    """

    begun: int
    end: int
    steps: tuple[Step, ...]
    pictures: tuple[int, ...]
    pixels: tuple[int, ...]


def stage_of(step: int, settings: Settings) -> tuple[int, int]:
    """Crop, and pictures of a pass, at a step."""
    begun, _, stage = [s for s in _spans(settings) if s[0] <= step][-1]
    sizes = in_turn(stage)
    return sizes[(step - begun) % len(sizes)]


def _spans(settings: Settings) -> list[tuple[int, int, Stage]]:
    """First step and end of every stage."""
    found, begun, share = [], 0, 0.0
    for stage in settings.stages:
        share += stage[2]
        end = min(math.ceil(share * settings.steps - 1e-9), settings.steps)
        found.append((begun, end, stage))
        begun = end
    # Shares add up to 1 within rounding.
    begun, _, stage = found[-1]
    return [*found[:-1], (begun, settings.steps, stage)]


class Schedule:
    """The steps of a run in `processes` processes.

    Raises ValueError where the total batch is not a multiple of what all processes take in a pass.
    """

    def __init__(self, settings: Settings, processes: int = 1) -> None:
        self.settings, self.processes = settings, processes
        self.turns: list[_Turn] = []
        picture = 0
        for begun, end, stage in _spans(settings):
            steps, pictures, pixels = [], [0], [0]
            for crop, batch in in_turn(stage):
                passes = self._passes(batch)
                steps.append(Step(crop, batch, passes, picture + pictures[-1]))
                taken = batch * passes * processes
                pictures.append(pictures[-1] + taken)
                pixels.append(pixels[-1] + taken * crop**2)
            turn = _Turn(begun, end, tuple(steps), tuple(pictures), tuple(pixels))
            self.turns.append(turn)
            picture += _before(turn, end, turn.pictures)

    def _passes(self, batch: int) -> int:
        if not self.settings.total_batch:
            return self.settings.accumulation
        passes, left = divmod(self.settings.total_batch, batch * self.processes)
        if left or not passes:
            raise ValueError(
                f"total batch: expected a multiple of {batch * self.processes} "
                f"({self.processes} processes × {batch} pictures), got {self.settings.total_batch}"
            )
        return passes

    def at(self, step: int) -> Step:
        """What a step takes."""
        turn = self._turn(step)
        turns, place = divmod(step - turn.begun, len(turn.steps))
        now = turn.steps[place]
        return Step(now.crop, now.batch, now.passes, now.first + turns * turn.pictures[-1])

    def end_of_stage(self, step: int) -> int:
        """The step that the next stage begins with, or the end of the run."""
        return self._turn(step).end

    def pictures(self, step: int, pass_: int, rank: int) -> list[int]:
        """Numbers of the pictures of a pass of one process."""
        now = self.at(step)
        first = now.first + (pass_ * self.processes + rank) * now.batch
        return list(range(first, first + now.batch))

    def pixels(self, step: int, end: int) -> int:
        """Pixels of the crops of steps [step, end)."""
        return sum(_before(t, end, t.pixels) - _before(t, step, t.pixels) for t in self.turns)

    def _turn(self, step: int) -> _Turn:
        return [turn for turn in self.turns if turn.begun <= step][-1]


def _before(turn: _Turn, step: int, counts: tuple[int, ...]) -> int:
    """What a stage takes before a step."""
    done = min(max(step, turn.begun), turn.end) - turn.begun
    turns, place = divmod(done, len(turn.steps))
    return turns * counts[-1] + counts[place]
