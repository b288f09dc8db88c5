"""Train a model from scratch, or from a folder such as `mimdit-init` makes; or go on with a run.

`python -m training.train --preset tiny --output runs/tiny`, in one process. With no `--data`, clean
pictures are procedural ones and the photographs that come with scikit-image and scikit-learn.
"""

import argparse
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mimdit.presets import PRESETS
from training.loop import Settings

if TYPE_CHECKING:
    from mimdit.transformer import MiMDiTTransformer2DModel


def parser() -> argparse.ArgumentParser:
    """Flags as in diffusers' training scripts; defaults are those of `Settings`."""
    p = argparse.ArgumentParser(
        prog="python -m training.train",
        description="Train a MiM-DiT of a pixel-codec preset on damaged-on-the-fly pictures.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    d = Settings()
    p.add_argument("--preset", default="tiny", choices=[n for n in PRESETS if "sd35" not in n])
    p.add_argument("--output", default=d.output, help="folder of log, checkpoints and the model")
    p.add_argument("--data", help="folder of clean pictures to use besides the built-in sources")
    p.add_argument("--max-train-steps", type=int, default=d.steps)
    p.add_argument(
        "--stages",
        default=";".join(":".join(map(str, s)) for s in d.stages),
        help="crop:batch:share of the steps, for each stage",
    )
    p.add_argument("--learning-rate", type=float, default=d.learning_rate)
    p.add_argument("--matrix-learning-rate", type=float, default=d.matrix_learning_rate)
    p.add_argument("--lr-warmup-steps", type=int, default=d.warmup)
    p.add_argument("--max-grad-norm", type=float, default=d.clip)
    p.add_argument("--ema-decay", type=float, default=d.ema)
    p.add_argument("--balance", type=float, default=d.balance, help="weight of load balancing")
    p.add_argument("--gradient-accumulation-steps", type=int, default=d.accumulation)
    p.add_argument("--gradient-checkpointing", action="store_true")
    p.add_argument("--mixed-precision", default=d.mixed_precision, choices=["no", "bf16"])
    p.add_argument("--checkpointing-steps", type=int, default=d.checkpointing_steps)
    p.add_argument("--resume-from-checkpoint", help="a checkpoint folder, or 'latest'")
    p.add_argument("--init", help="a model folder to start from, such as mimdit-init's")
    p.add_argument("--freeze-backbone", action="store_true", help="train only the mixtures")
    p.add_argument("--dataloader-num-workers", type=int, default=d.workers)
    p.add_argument("--seed", type=int, default=d.seed)
    p.add_argument("--inference-steps", type=int, default=1, help="what the model recommends")
    p.add_argument("--inference-shifts", type=int, default=4, help="likewise, of the patch grid")
    return p


def settings_of(args: argparse.Namespace) -> Settings:
    """`Settings` of parsed flags; ValueError on stages that do not parse or add up."""
    try:
        stages = tuple(
            (int(crop), int(batch), float(share))
            for crop, batch, share in (s.split(":") for s in args.stages.split(";"))
        )
    except ValueError:
        expected = "crop:batch:share;…, such as 128:12:0.6;256:3:0.4"
        raise ValueError(f"--stages: expected {expected}, got {args.stages!r}") from None
    return Settings(
        output=args.output,
        steps=args.max_train_steps,
        stages=stages,
        learning_rate=args.learning_rate,
        matrix_learning_rate=args.matrix_learning_rate,
        warmup=args.lr_warmup_steps,
        clip=args.max_grad_norm,
        ema=args.ema_decay,
        balance=args.balance,
        accumulation=args.gradient_accumulation_steps,
        checkpointing_steps=args.checkpointing_steps,
        seed=args.seed,
        workers=args.dataloader_num_workers,
        data=args.data,
        mixed_precision=args.mixed_precision,
        train_backbone=not args.freeze_backbone,
    )


def to_storage_(model: "MiMDiTTransformer2DModel") -> None:
    """Round weights to bfloat16 in place; routers and buffers, which decide discretely, stay."""
    import torch

    for name, parameter in model.named_parameters():
        if not name.endswith("_router"):
            parameter.data = parameter.data.to(torch.bfloat16)


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    try:
        settings = settings_of(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2

    import torch

    from mimdit.loading import assemble
    from mimdit.pipeline import MiMDiTPipeline
    from mimdit.presets import build
    from training.loop import train
    from training.warm_start import align_positions_

    torch.manual_seed(settings.seed)
    if args.init:
        pipe = MiMDiTPipeline.from_pretrained(args.init)
    else:
        model = align_positions_(build(args.preset))
        pipe = assemble(model, args.inference_steps, args.inference_shifts)
    model = pipe.transformer
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    try:
        train(model, pipe.vae, settings, args.resume_from_checkpoint)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    to_storage_(model)
    pipe.save_pretrained(f"{settings.output}/model")
    print(f"saved {settings.output}/model")
    return 0


if __name__ == "__main__":
    sys.exit(main())
