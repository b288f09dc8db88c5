"""What a run tells while it goes on: `log.jsonl`, a progress bar, TensorBoard."""

import json
import time
from collections import defaultdict
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from training.checkpoints import replace_text
from training.config import Settings
from training.parallel import Team
from training.schedule import Schedule

Row = dict[str, Any]


@dataclass
class _Pass:
    """One pass: its loss, kinds of damage [B], mean inter weights [B,G], and picks [L,G,E]."""

    loss: Tensor
    kinds: list[str]
    inter: Tensor
    picks: Tensor


class Reports:
    """Collects passes, and writes a row for every `log_steps` steps; only the main process writes.

    Rows beyond `step`, of a run that was killed and goes on from there, are removed.
    """

    def __init__(
        self, out: Path, settings: Settings, schedule: Schedule, team: Team, step: int, top_k: int
    ) -> None:
        self.settings, self.schedule, self.team = settings, schedule, team
        self.window: list[_Pass] = []
        self.top_k = top_k
        self.begun, self.since = time.perf_counter(), step
        self.board: Any = None
        self.log, self.bar = None, None
        if team.main:
            keep_until(out / "log.jsonl", step)
            self.log = (out / "log.jsonl").open("a")
            self.bar = tqdm(total=settings.steps, initial=step)
            if settings.report_to == "tensorboard":
                self.board = _board(out / "logs", step)

    def add(self, loss: Tensor, kinds: list[str], inter: Tensor, picks: Tensor) -> None:
        """A pass; inter [L,B,G], picks [L,B,G,E]. Nothing waits for the device yet."""
        wide = picks.float().mean(1) / self.top_k
        self.window.append(_Pass(loss.detach(), kinds, inter.mean(0), wide))

    def check(self, step: int) -> None:
        """Raises ValueError where a loss since the last row is not finite."""
        losses = [one.loss for one in self.window] or [torch.zeros(())]
        bad = not torch.stack(losses).isfinite().all()
        if self.team.any(bad):
            raise ValueError(
                f"loss: expected finite numbers, got others before step {step}; go on from the "
                "last checkpoint with a lower learning rate or --mixed-precision no"
            )

    def step(self, step: int, rate: float) -> None:
        """After a step; writes a row when it is time. All processes call it.

        Raises ValueError where a loss is not finite.
        """
        if self.bar is not None:
            self.bar.update()
        if step % self.settings.log_steps and step != self.settings.steps:
            return
        self.check(step)
        parts = self.team.gather(_totals(self.window))
        seconds, steps = time.perf_counter() - self.begun, step - self.since
        row: Row = {"step": step} | _joined(parts)
        rate_of_pixels = self.schedule.pixels(self.since, step) / seconds
        left = self.schedule.pixels(step, self.settings.steps) / rate_of_pixels
        row |= {
            "learning_rate": rate,
            "pictures_s": row.pop("pictures") / seconds,
            "seconds_step": seconds / steps,
            "seconds_left": round(left),
            "expected_end": (datetime.now() + timedelta(seconds=left)).isoformat(" ", "minutes"),
        }
        self.window, self.begun, self.since = [], time.perf_counter(), step
        if self.log is not None and self.bar is not None:
            self.log.write(json.dumps(row) + "\n")
            self.log.flush()
            self.bar.set_postfix(
                loss=f"{row['loss']:.4f}",
                pictures_s=f"{row['pictures_s']:.1f}",
                end=row["expected_end"],
            )
        if self.board is not None:
            for name in ("loss", "learning_rate", "pictures_s", "least_expert_share"):
                self.board.add_scalar(f"train/{name}", row[name], step)
            for kind, weights in row["routing"].items():
                for g, weight in enumerate(weights):
                    self.board.add_scalar(f"routing/{kind}/group{g}", weight, step)

    def pause(self, seconds: float) -> None:
        """Leave out time that is not the training's."""
        self.begun += seconds

    def validation(
        self, step: int, seconds: float, figures: dict[str, dict[str, float]], sheet: Tensor
    ) -> None:
        """Figures by damage and name, and a picture [3,H,W] in [0,1]; seconds: that they took."""
        self.pause(seconds)
        if self.board is None:
            return
        for damage, values in figures.items():
            for name, value in values.items():
                self.board.add_scalar(f"validation/{name}/{damage or 'clean'}", value, step)
        self.board.add_image("validation", sheet, step)

    def close(self) -> None:
        for part in (self.log, self.bar, self.board):
            if part is not None:
                part.close()


def keep_until(log: Path, step: int) -> None:
    """Remove the rows of a log that were written after a step, and a row cut short."""
    if not log.is_file():
        return
    rows = []
    for line in log.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    replace_text(log, "".join(json.dumps(r) + "\n" for r in rows if r["step"] <= step))


def _totals(window: list[_Pass]) -> Row:
    """Sums over passes, as plain numbers and CPU tensors."""
    by_kind: dict[str, list[Tensor]] = defaultdict(list)
    for one in window:
        for kind, weights in zip(one.kinds, one.inter.float().cpu(), strict=True):
            by_kind[kind].append(weights)
    return {
        "loss": torch.stack([one.loss for one in window]).double().mean().item(),
        "pictures": sum(len(one.kinds) for one in window),
        "share": torch.stack([one.picks for one in window]).mean(0).cpu(),
        "inter": {kind: (torch.stack(w).sum(0), len(w)) for kind, w in by_kind.items()},
    }


def _joined(parts: list[Row]) -> Row:
    inter: dict[str, list[tuple[Tensor, int]]] = defaultdict(list)
    for part in parts:
        for kind, total in part["inter"].items():
            inter[kind].append(total)
    everything = [total for totals in inter.values() for total in totals]
    return {
        "loss": sum(part["loss"] for part in parts) / len(parts),
        "pictures": sum(part["pictures"] for part in parts),
        "inter": _mean(everything),
        "least_expert_share": torch.stack([p["share"] for p in parts]).mean(0).min().item(),
        "routing": {kind or "clean": _mean(totals) for kind, totals in sorted(inter.items())},
    }


def _mean(totals: list[tuple[Tensor, int]]) -> list[float]:
    mean = torch.stack([total for total, _ in totals]).sum(0) / sum(n for _, n in totals)
    return [round(x, 4) for x in mean.tolist()]


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ValueError("report to: tensorboard needs: pip install tensorboard") from error
    # Events after this step are of a run that was killed.
    return SummaryWriter(str(folder), purge_step=step + 1)
