"""The training loop."""

import json
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import Dataset

from mimdit.codec import Codec
from mimdit.transformer import MiMDiTTransformer2DModel
from training import checkpoints
from training.batches import Pair, batches, draw_cuts, draw_noise, draw_place, pairs, sample_times
from training.config import Settings
from training.interrupt import Stopped, StopRequests
from training.latents import cache_latents, pictures_to_latents
from training.optim import optimizers, rate_factor, set_rates
from training.parallel import Team, local, unsharded
from training.prepare import check_fit, prepare_
from training.reports import Reports
from training.schedule import Schedule, stage_of
from training.step import FlowStep, balance_loss, flow_loss, follow_mean_
from training.validation import Validator

__all__ = ["Settings", "Stopped", "balance_loss", "flow_loss", "sample_times", "stage_of", "train"]


def train(
    model: MiMDiTTransformer2DModel,
    codec: Codec,
    settings: Settings,
    resume: str | None = None,
    validator: Validator | None = None,
    source: Dataset[Pair] | None = None,
) -> MiMDiTTransformer2DModel:
    """Run to `settings.steps`; returns the model with its averaged (EMA) weights.

    resume: a checkpoint folder, or "latest" of the run; the run then ends as if it had never been
    interrupted. validator: called every `validation_steps`. source: pairs by number of the picture,
    instead of those that the settings name (`batches.pairs`). Writes `log.jsonl` and
    `checkpoint-N/`.

    Raises:
        ValueError: settings that do not fit each other or the model, a checkpoint of another model,
            a used folder without `resume`, or a loss or weights that are not finite.
        Stopped: SIGTERM or SIGINT came; a checkpoint of the last whole step is written.
    """
    team = Team(settings.sharded)
    if team.sharded and settings.optimizer in ("muon", "adam8bit"):
        raise ValueError(f"--fsdp: expected optimizer adam or adamw, got {settings.optimizer}")
    schedule = Schedule(settings, team.processes)
    check_fit(model, codec, settings)
    out = Path(settings.output)
    folder = _begin(out, settings, resume, team, model)
    run = _Run(model, codec, settings, team, schedule, source)
    step = run.state.load(folder) if folder else 0
    for aside in checkpoints.set_aside_later(out, step) if team.main else ():
        print(f"note: a later checkpoint, of another future, is now {aside}")
    if validator is not None and team.main:
        validator.begin(step)
    reports = Reports(out, settings, schedule, team, step, model.mim.top_k)
    try:
        with StopRequests() as stop:
            if validator is not None and _owed(step, validator, settings, team):
                run.validate(step, validator, reports)
            while step < settings.steps:
                began = time.perf_counter()
                stream = run.stream(step, partial(stop.check, step, settings.output))
                # Latents may have been made.
                reports.pause(time.perf_counter() - began)
                run.step(step, stream, reports)
                step += 1
                stopping = team.any(stop.asked)
                last = step == settings.steps
                due = last or stopping or step % settings.checkpointing_steps == 0
                look = validator is not None and _every(settings.validation_steps, step, last)
                rate = settings.learning_rate * rate_factor(step - 1, settings)
                reports.step(step, rate)
                if due:
                    # "latest" must stay one to go on from.
                    reports.check(step)
                    run.check(step)
                    run.state.save(out, step)
                if stopping and not last:
                    raise Stopped(step, settings.output)
                if look and validator is not None:
                    run.validate(step, validator, reports)
    finally:
        run.close()
        reports.close()
    run.ema.copy_to(run.trained)
    return unsharded(model, team.sharded).eval()


def _every(steps: int, step: int, last: bool) -> bool:
    return steps > 0 and (last or step % steps == 0)


def _owed(step: int, validator: Validator, settings: Settings, team: Team) -> bool:
    """Whether the run was stopped between this step's checkpoint and its validation."""
    due = step > 0 and _every(settings.validation_steps, step, step == settings.steps)
    return team.any(due and team.main and not validator.has(step))


def _begin(
    out: Path,
    settings: Settings,
    resume: str | None,
    team: Team,
    model: MiMDiTTransformer2DModel,
) -> Path | None:
    """Make or check the run's folder; returns the checkpoint to go on from."""
    folder = checkpoints.locate(out, resume) if resume else None
    if folder is None and checkpoints.found(out):
        raise ValueError(
            f"output: expected a new folder, got {out} with checkpoints of a run; go on with it "
            "(--resume-from-checkpoint latest) or name another"
        )
    team.wait()
    if team.main:
        out.mkdir(parents=True, exist_ok=True)
        checkpoints.clear(out)
        text = json.dumps(asdict(settings), indent=1)
        checkpoints.replace_text(out / "settings.json", text)
        if folder is not None:
            for change in checkpoints.changes(folder, settings, team.processes, model):
                print(f"note: goes on with another setting, {change}")
    team.wait()
    # Nothing draws from the global generators; libraries that do find them seeded.
    set_seed(settings.seed)
    return folder


class _Run:
    """What a run holds in memory."""

    def __init__(
        self,
        model: MiMDiTTransformer2DModel,
        codec: Codec,
        settings: Settings,
        team: Team,
        schedule: Schedule,
        source: Dataset[Pair] | None,
    ) -> None:
        self.model, self.codec, self.settings = model, codec, settings
        self.team, self.schedule, self.source = team, schedule, source
        prepare_(model, settings)
        codec.to(team.device).eval()  # pyright: ignore[reportArgumentType]
        bf16 = settings.mixed_precision == "bf16"
        step = FlowStep(model, settings.balance, bf16, team.mean, settings.weighting)
        self.wrapped = team.wrap(step).train()
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.optimisers = optimizers(
            model,
            settings.learning_rate,
            settings.matrix_learning_rate,
            settings.weight_decay,
            settings.optimizer,
        )
        self.ema = EMAModel(self.trained, decay=settings.ema, use_ema_warmup=True, power=0.75)
        self.state = checkpoints.Checkpoint(model, self.optimisers, self.ema, settings, team)
        # Batches of the current stage, by crop.
        self._streams: dict[int, Generator[Pair]] = {}
        self._until = -1

    def stream(self, step: int, check: Callable[[], None]) -> Iterator[Pair]:
        """Batches of a step and of later ones of its crop; kept to the end of the stage.

        check: may raise while latents are made.
        """
        crop = self.schedule.at(step).crop
        if step >= self._until:
            self.close()
            self._until = self.schedule.end_of_stage(step)
        if crop not in self._streams:
            source = pairs(self.settings, crop) if self.source is None else self.source
            if self.settings.latents:
                source = cache_latents(source, self.codec, self.settings, crop, self.team, check)
            rank, workers = self.team.rank, self.settings.workers
            self._streams[crop] = batches(source, self.schedule, step, rank, workers)
        return self._streams[crop]

    def close(self) -> None:
        """End the loaders' processes, which ignore the signals that end a run."""
        for stream in self._streams.values():
            stream.close()
        self._streams = {}

    def step(self, step: int, stream: Iterator[Pair], reports: Reports) -> None:
        """One step; until its end nothing that a checkpoint holds has changed."""
        for optimizer in self.optimisers:
            optimizer.zero_grad()
        passes = self.schedule.at(step).passes
        if step == 0 and not self.model.mim.running_steps.any():
            # The routers' means start from those of the first step's pictures.
            first = [next(stream) for _ in range(passes)]
            self._start_means([self._latents(batch)[1] for batch in first])
            stream = iter(first)
        centred: list[Tensor] = []
        for i in range(passes):
            batch = next(stream)
            x0, z_lq = self._latents(batch)
            t, noise = draw_noise(batch["numbers"], x0.shape[1:], self.settings)
            size = self.model.config["pos_embed_max_size"]
            place = draw_place(step, self.model.grid(x0), size, self.settings)
            cuts = draw_cuts(step, self.model.grid(x0), self.settings)
            with self.team.accumulating(self.wrapped, last=i == passes - 1):
                draws = (t.to(x0), noise.to(x0))
                loss, inter, picks, mean = self.wrapped(x0, z_lq, *draws, *place, cuts)
                (loss / passes).backward()
            centred.append(mean)
            reports.add(loss, batch["kinds"], inter, picks)
        if self.settings.clip:
            torch.nn.utils.clip_grad_norm_(self.trained, self.settings.clip)
        follow_mean_(self.model, self.team.mean(torch.stack(centred).mean(0)))
        set_rates(self.optimisers, step, self.settings)
        for optimizer in self.optimisers:
            optimizer.step()
        self.ema.step(self.trained)

    def check(self, step: int) -> None:
        """Raises ValueError where a weight is not finite, of which the step's own loss knows
        nothing."""
        bad = not torch.stack([local(p).isfinite().all() for p in self.trained]).all()
        if self.team.any(bad):
            raise ValueError(
                f"weights: expected finite numbers, got others after step {step}; go on from the "
                "last checkpoint with a lower learning rate or --mixed-precision no"
            )

    def validate(self, step: int, validator: Validator, reports: Reports) -> None:
        """Figures of the averaged weights; sharded models need all processes for it."""
        began = time.perf_counter()
        self.ema.store(self.trained)
        self.ema.copy_to(self.trained)
        if self.team.main or self.team.sharded:
            with self.team.gathered(self.model):
                found = validator(step, write=self.team.main)
            reports.validation(step, time.perf_counter() - began, *found)
        self.ema.restore(self.trained)
        self.wrapped.train()
        self.team.wait()

    def _latents(self, batch: Pair) -> tuple[Tensor, Tensor]:
        """Clean and damaged latents [B,c,h,w] in the type of the trained parameters."""
        if "x0" in batch:
            found = [batch[name].to(self.team.device) for name in ("x0", "z_lq")]
        else:
            found = [
                pictures_to_latents(self.codec, batch[name], self.team.device)
                for name in ("clean", "damaged")
            ]
        x0, z_lq = (latents.to(self.trained[0].dtype) for latents in found)
        return x0, z_lq

    @torch.no_grad()
    def _start_means(self, damaged: list[Tensor]) -> None:
        mim = self.model.mim
        bf16 = self.settings.mixed_precision == "bf16"
        with torch.autocast(self.team.device.type, torch.bfloat16, enabled=bf16):
            means = [mim.means(self.model.pool_condition(z)).mean(1) for z in damaged]
        mim.running_mean.copy_(self.team.mean(torch.stack(means).mean(0)))
