"""The training step and loop."""

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from mimdit import flow
from mimdit.codec import Codec, encode
from mimdit.transformer import MiMDiTTransformer2DModel
from training.data import PairDataset
from training.optim import optimizers, warmup_cosine

# Of one batch: loss, mean inter weights [G], picks of each sub-expert [L,G,E], pictures.
_Part = tuple[float, Tensor, Tensor, int]


@dataclass(frozen=True)
class Settings:
    """What a run is; the stages are (crop in pixels, pictures a step, share of the steps)."""

    output: str = "runs/tiny"
    steps: int = 3000
    stages: tuple[tuple[int, int, float], ...] = ((128, 12, 0.6), (256, 3, 0.4))
    learning_rate: float = 8e-4
    matrix_learning_rate: float = 2e-3
    warmup: int = 100
    weight_decay: float = 0.0
    clip: float = 1.0
    ema: float = 0.995
    t_mean: float = 0.5
    t_std: float = 1.2
    pure_noise: float = 0.8
    balance: float = 0.0
    mixtures: float = 0.25
    accumulation: int = 1
    checkpointing_steps: int = 250
    keep_checkpoints: int = 2
    seed: int = 0
    workers: int = 1
    data: str | None = None
    mixed_precision: str = "bf16"
    train_backbone: bool = True

    def __post_init__(self) -> None:
        total = sum(share for _, _, share in self.stages)
        if abs(total - 1) > 1e-6:
            raise ValueError(f"stages: expected shares that add up to 1, got {total:g}")


def sample_times(batch: int, settings: Settings, generator: torch.Generator) -> Tensor:
    """t [B] in (0, 1]: logit-normal (arXiv 2403.03206, Eq. 19), with t = 1 for some draws."""
    normal = torch.randn(batch, generator=generator) * settings.t_std + settings.t_mean
    pure = torch.rand(batch, generator=generator) < settings.pure_noise
    return torch.where(pure, 1.0, normal.sigmoid().clamp(1e-3, 1.0))


def flow_loss(
    model: MiMDiTTransformer2DModel, x0: Tensor, z_lq: Tensor, t: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Velocity error; x0, z_lq, noise [B,c,h,w], t [B].

    Its weighted mean; for models that predict from the damaged latents the mean of its logarithm,
    which is the mean PSNR of what they predict: darkness and haze, with errors that are larger by
    far and can never be small, then do not drown noise and rain.

    Returns the loss, and of the routing taken the mean inter weights [L,B,G] and the picks
    [L,B,G,E].
    """
    x_t = flow.interpolate(x0, noise, t)
    condition = model.encode_condition(z_lq)
    v = model(x_t, 1000 * t, condition).sample
    error = (v.float() - (noise - x0)).square().mean(dim=(1, 2, 3))
    kind = model.config["prediction_type"]
    error = flow.loss_weight(kind, t, model.config["damage_std"]) * error
    if flow.reads_damage(kind):
        error = (error + _NEGLIGIBLE).log()
    routing = condition.routing
    picks = torch.nn.functional.one_hot(routing.index, model.mim.experts).sum(-2)
    return error.mean(), routing.inter, picks


# An error that is hardly worth reducing: about 41 dB.
_NEGLIGIBLE = 2e-3


def balance_loss(model: MiMDiTTransformer2DModel, pooled: Tensor, picks: Tensor) -> Tensor:
    """Switch Transformer's load balance (arXiv 2101.03961, Eq. 4) over all routers; 1 is even."""
    mim = model.mim
    centred = pooled.chunk(2, dim=-1)[0] - mim.running_mean[:, None]
    p = torch.einsum("lbd,lged->lbge", centred, mim.intra_router).softmax(-1).mean(1)
    share = picks.float().mean(1) / mim.top_k
    return mim.experts * (p * share).sum(-1).mean()


def stage_of(step: int, settings: Settings) -> tuple[int, int]:
    """Crop and batch at a step."""
    done = 0.0
    for crop, batch, share in settings.stages:
        done += share
        if step < done * settings.steps - 1e-9:
            return crop, batch
    return settings.stages[-1][:2]


def _pairs(step: int, settings: Settings) -> Iterator[tuple[Tensor, Tensor]]:
    """Clean and damaged pictures from `step` on; crops grow by stage, resumed runs see new ones."""
    while True:
        crop, batch = stage_of(step, settings)
        dataset = PairDataset(
            crop, seed=settings.seed + step, mixtures=settings.mixtures, path=settings.data
        )
        loader = DataLoader(dataset, batch, num_workers=settings.workers)
        for pair in loader:
            if stage_of(step, settings) != (crop, batch):
                break
            yield pair["clean"], pair["damaged"]
            step += 1


def train(
    model: MiMDiTTransformer2DModel, codec: Codec, settings: Settings, resume: str | None = None
) -> MiMDiTTransformer2DModel:
    """Run to `settings.steps`; returns the model with its averaged (EMA) weights.

    resume: a checkpoint folder, or "latest" of the run. Writes `log.jsonl` and `checkpoint-N/`.
    """
    out = Path(settings.output)
    out.mkdir(parents=True, exist_ok=True)
    (out / "settings.json").write_text(json.dumps(asdict(settings), indent=1))
    accelerator = Accelerator(
        mixed_precision=settings.mixed_precision,
        gradient_accumulation_steps=settings.accumulation,
    )
    if accelerator.num_processes > 1:
        raise ValueError(f"training: expected one process, got {accelerator.num_processes}")
    set_seed(settings.seed)
    if not settings.train_backbone:
        model.requires_grad_(False)
        model.mim.requires_grad_(True)
    trained = [p for p in model.parameters() if p.requires_grad]
    # In one process `prepare` moves the model to the device and gives the same object back.
    accelerator.prepare(model)
    optimisers = [
        accelerator.prepare(optimizer)
        for optimizer in optimizers(
            model, settings.learning_rate, settings.matrix_learning_rate, settings.weight_decay
        )
    ]
    schedules = [
        accelerator.prepare(warmup_cosine(optimizer, settings.warmup, settings.steps))
        for optimizer in optimisers
    ]
    ema = EMAModel(model.parameters(), decay=settings.ema, use_ema_warmup=True, power=0.75)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    step = _resume(accelerator, out, resume)
    generator = torch.Generator().manual_seed(settings.seed + 7 * step)
    pairs = _pairs(step, settings)
    log = (out / "log.jsonl").open("a")
    bar = tqdm(total=settings.steps, initial=step)
    window: list[_Part] = []
    began = time.perf_counter()
    model.train()
    while step < settings.steps:
        for _ in range(settings.accumulation):
            clean, damaged = next(pairs)
            with accelerator.accumulate(model):
                loss, inter, picks = _loss(model, codec, clean, damaged, settings, generator)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(trained, settings.clip)
                # Accelerate skips these until all parts of a step are in.
                for stepped in (*optimisers, *schedules):
                    stepped.step()
                for optimizer in optimisers:
                    optimizer.zero_grad()
            window.append((loss.item(), inter.mean((0, 1)), picks.float().mean(1), len(clean)))
        ema.step(model.parameters())
        step += 1
        bar.update()
        if step % 25 == 0 or step == settings.steps:
            row = _summary(step, window, time.perf_counter() - began, model.mim.top_k)
            bar.set_postfix(loss=f"{row['loss']:.4f}", pictures_s=f"{row['pictures_s']:.1f}")
            log.write(json.dumps(row) + "\n")
            log.flush()
            window, began = [], time.perf_counter()
        if step % settings.checkpointing_steps == 0 or step == settings.steps:
            accelerator.save_state(str(out / f"checkpoint-{step}"))
            _prune(out, settings.keep_checkpoints)
    log.close()
    ema.copy_to(model.parameters())
    return model


def _loss(
    model: MiMDiTTransformer2DModel,
    codec: Codec,
    clean: Tensor,
    damaged: Tensor,
    settings: Settings,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss of one batch of pictures [B,3,H,W] in [0,1]; otherwise as `flow_loss`."""
    device = next(model.parameters()).device
    with torch.no_grad():
        x0 = encode(codec, clean.to(device) * 2 - 1)
        z_lq = encode(codec, damaged.to(device) * 2 - 1)
    t = sample_times(len(x0), settings, generator).to(device)
    noise = torch.randn(x0.shape, generator=generator).to(device)
    rows, columns = model.grid(x0)
    size = model.config["pos_embed_max_size"]
    top, left = (
        int(torch.randint(size - n + 1, (1,), generator=generator)) for n in (rows, columns)
    )
    with (
        model.position_offset(top, left),
        torch.autocast(device.type, torch.bfloat16, enabled=settings.mixed_precision == "bf16"),
    ):
        loss, inter, picks = flow_loss(model, x0, z_lq, t, noise)
        if settings.balance:
            pooled = model.pool_condition(z_lq)
            loss = loss + settings.balance * balance_loss(model, pooled, picks)
    return loss, inter.detach(), picks


def _summary(
    step: int, window: list[_Part], seconds: float, top_k: int
) -> dict[str, float | int | list[float]]:
    losses, inters, picks, sizes = zip(*window, strict=True)
    share = torch.stack(picks).mean(0) / top_k  # [L,G,E]
    return {
        "step": step,
        "loss": sum(losses) / len(losses),
        "pictures_s": sum(sizes) / seconds,
        "seconds_batch": seconds / len(window),
        "inter": [round(x, 4) for x in torch.stack(inters).mean(0).tolist()],
        "least_expert_share": share.min().item(),
    }


def _checkpoints(out: Path) -> list[Path]:
    return sorted(out.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))


def _prune(out: Path, keep: int) -> None:
    for old in _checkpoints(out)[:-keep]:
        shutil.rmtree(old)


def _resume(accelerator: Accelerator, out: Path, resume: str | None) -> int:
    if resume is None:
        return 0
    found = _checkpoints(out)
    if resume == "latest" and not found:
        raise ValueError(f"resume: expected a checkpoint-N folder in {out}, found none")
    folder = found[-1] if resume == "latest" else Path(resume)
    accelerator.load_state(str(folder))
    return int(folder.name.split("-")[1])
