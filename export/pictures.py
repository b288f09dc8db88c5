"""Whole restorations compared: every step of one, and the picture at its end."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from export.checks import GATES, Check, relative_error
from export.inputs import Size, damage, photograph, photograph_latents, size_text, step_inputs
from export.parity import raw_output, reference
from export.routing import Graphs
from export.runtime import ExportedPipeline
from mimdit.errors import first_line
from mimdit.metrics import psnr
from mimdit.pipeline import MiMDiTPipeline

# Of a float32 picture after all steps, in dB.
PICTURE_PSNR = 55.0


@dataclass(frozen=True)
class Picture:
    """A square one to restore: its side and that of its tiles in pixels, and the steps."""

    side: int
    tile: int
    steps: int


def check_steps(
    pipe: MiMDiTPipeline, graphs: Graphs, precision: str, size: Size, steps: int
) -> Iterator[Check]:
    """The denoiser's output in every step of a restoration, fed with the reference's latents."""
    model, at = pipe.transformer, size_text(size)
    with torch.no_grad(), reference(pipe):
        z_lq = photograph_latents(pipe, size)
        generator = torch.Generator().manual_seed(0)
        inputs: dict[str, Any] = step_inputs(pipe, z_lq, generator)
        condition = model.encode_condition(z_lq)
        fixed = {
            "tokens": torch.stack(condition.tokens).float(),
            "pooled": condition.routing.pooled.float(),
        }
        text = {
            "encoder_hidden_states": inputs["text"].to(model.dtype),
            "pooled_projections": inputs["pooled_text"].to(model.dtype),
        }
        x = torch.randn(z_lq.shape, generator=generator)
        pipe.scheduler.set_timesteps(steps)
        times = cast(Tensor, pipe.scheduler.timesteps)
        for i, t in enumerate(times):
            timestep = t.expand(len(x)).float().contiguous()
            fed = inputs | fixed | {"x_t": x, "timestep": timestep}
            output = raw_output(pipe, x, timestep, condition, text)
            error = relative_error(graphs["denoiser"](**fed)["output"], output)
            note = f"step {i + 1} of {steps}"
            yield Check(
                "denoiser",
                "output by step",
                at,
                error,
                GATES[precision],
                note,
                "photograph",
                fed=fed,
            )
            velocity = model(x, timestep, condition, **text, return_dict=False)[0]
            # Diffusers declares FloatTensor, which no torch function is typed to return.
            x = cast(Any, pipe.scheduler).step(velocity.float(), t, x, return_dict=False)[0]
            if not torch.isfinite(x).all():
                return


def check_picture(
    pipe: MiMDiTPipeline, exported: ExportedPipeline, precision: str, wanted: Picture
) -> Check:
    """The damaged photograph after all steps, from the same noise as the pipeline's.

    The error is the root mean square of their difference; half precision is only reported. Where
    the model itself overflows in so many steps, as drawn weights do, it takes its default number.
    """
    side = wanted.side
    clean = photograph(side, side)
    damaged = damage(clean, 1)
    pipe.set_progress_bar_config(disable=True)
    exported.set_progress_bar_config(disable=True)
    gate = 10 ** (-PICTURE_PSNR / 20) if precision == "fp32" else None
    check = Check("picture", "pixels", f"{side}×{side} pixels", math.nan, gate or 0.0)
    check = replace(check, inputs="photograph")
    failed, steps, restored = "", wanted.steps, list[Tensor]()
    for steps in dict.fromkeys((wanted.steps, pipe.config["default_steps"])):
        options = {
            "num_inference_steps": steps,
            "shifts": 2,
            "tile": wanted.tile,
            "tile_overlap": min(64, wanted.tile // 2),
            "output_type": "np",
        }
        restored = []
        with reference(pipe):
            for call in (pipe, exported):
                generator = torch.Generator().manual_seed(0)
                try:
                    out = cast(Any, call)(damaged, generator=generator, **options)
                except ValueError as error:
                    failed = f"{type(call).__name__}: {first_line(error)}"
                    break
                restored.append(torch.from_numpy(out.images))
        # Where only the exported one fails, fewer steps would hide it.
        if restored:
            break
    if len(restored) < 2:
        return replace(check, note=failed)
    found = psnr(*restored)
    theirs, ours = (psnr(x.movedim(-1, 1), clean[None]) for x in restored)
    note = (
        f"{found:.1f} dB after {steps} steps; to the clean picture {ours:.2f} dB, "
        f"the model's {theirs:.2f} dB"
    )
    return replace(check, error=10 ** (-found / 20), gate=gate, note=note)
