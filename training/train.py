"""`mimdit-train` (or `python -m training.train`): train a model, or go on with a run.

`mimdit-train --preset tiny --output runs/mine`; with no `--data`, clean pictures are procedural
ones and the photographs that come with scikit-image and scikit-learn. `accelerate launch -m
training.train --config paper --backbone SD35 --dataset foundir --data FOUNDIR` trains as the paper
did.
"""

import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from mimdit.errors import first_line
from training.config import Model, Settings
from training.flags import parser, resolve

if TYPE_CHECKING:
    from mimdit.pipeline import MiMDiTPipeline
    from mimdit.transformer import MiMDiTTransformer2DModel


def to_storage_(model: "MiMDiTTransformer2DModel") -> None:
    """Round weights to bfloat16 in place; routers and buffers, which decide discretely, stay."""
    import torch

    for name, parameter in model.named_parameters():
        if not name.endswith("_router"):
            parameter.data = parameter.data.to(torch.bfloat16)


def start(model: Model, seed: int = 0) -> "MiMDiTPipeline":
    """The pipeline whose transformer is trained; ValueError where it cannot be made."""
    import torch

    from mimdit.loading import assemble, load_pipeline
    from mimdit.presets import build
    from mimdit.sd35 import from_sd35
    from training.warm_start import align_positions_

    options = dict(model.options)
    torch.manual_seed(seed)
    if model.init:
        if model.backbone or options:
            named = "backbone" if model.backbone else sorted(options)[0].replace("_", "-")
            raise ValueError(f"--init: expected no --{named} beside it, {model.init} is a model")
        try:
            pipe = load_pipeline(model.init)
        except (ValueError, OSError) as error:
            raise ValueError(f"--init {model.init}: {first_line(error)}") from error
    elif model.backbone:
        pipe = from_sd35(model.backbone, seed=seed, **options)
    elif "sd35" in model.preset:
        raise ValueError(
            f"--backbone: expected a folder of Stable Diffusion 3.5 for {model.preset} "
            "(or --init with a folder of mimdit-init), got none"
        )
    else:
        fresh = align_positions_(build(model.preset, **options))
        pipe = assemble(fresh, 1, 4)
    wanted = {"default_steps": model.inference_steps, "default_shifts": model.inference_shifts}
    pipe.register_to_config(**{name: n for name, n in wanted.items() if n is not None})
    if model.gradient_checkpointing:
        pipe.transformer.enable_gradient_checkpointing()
    return pipe


def run(settings: Settings, model: Model, resume: str | None = None) -> None:
    """Train, and save the averaged weights as a pipeline in `output`/model.

    With resume "latest" a run without checkpoints starts anew. Errors as of `loop.train`, and
    ValueError while another run writes there.
    """
    from training import checkpoints
    from training.lock import locked
    from training.loop import train
    from training.parallel import Team
    from training.validation import Validator

    team = Team()
    if resume == "latest" and not checkpoints.found(Path(settings.output)):
        if team.main:
            print(f"note: no checkpoint in {settings.output} yet, so the run starts at step 0")
        resume = None
    pipe = start(model, settings.seed)
    validator = Validator(pipe, settings) if settings.validation_steps else None
    with locked(Path(settings.output)) if team.main else nullcontext():
        trained = train(pipe.transformer, pipe.vae, settings, resume, validator)
        if team.main:
            to_storage_(trained)
            pipe.register_modules(transformer=trained)
            folder = Path(settings.output) / "model"
            # A folder of this name is always complete, as checkpoints are.
            unfinished = folder.with_name(".unfinished-model")
            with checkpoints.writing(unfinished, folder):
                pipe.save_pretrained(unfinished)
                checkpoints.move(unfinished, folder)
            print(f"saved {folder}")
    team.wait()
    team.close()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code. A run that was asked to stop has ended well."""
    given = vars(parser().parse_args(argv))
    try:
        settings, model = resolve(given)
    except (ValueError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 2
    import torch

    from training.interrupt import Stopped

    try:
        run(settings, model, given.get("resume_from_checkpoint"))
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped)
    except (ValueError, OSError) as error:
        print(f"error: {first_line(error)}", file=sys.stderr)
        return 1
    except ImportError as error:
        needed = "mimdit-train needs: pip install 'mimdit[train]'"
        print(f"error: {first_line(error)}; {needed}", file=sys.stderr)
        return 1
    except (torch.OutOfMemoryError, MemoryError) as error:
        smaller = "a smaller --train-batch-size (--total-batch-size keeps the batch of a step)"
        print(
            f"error: out of memory; try {smaller}, --gradient-checkpointing, --freeze-backbone "
            f"or --fsdp: {first_line(error)}",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
