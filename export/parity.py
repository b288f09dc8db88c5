"""Whether exported graphs compute what the model computes.

err = ‖a − b‖/‖b‖ of every output, in float64. References are the model's own calls in the exported
precision, with the same inputs: each graph answers for itself. Routing comes first: sub-experts may
differ only where their weights are closer than the gate, and further outputs are compared with the
reference's routing forced on the graph. Half precision must also stay as close to the float32 model
as the eager model of that precision does, up to a factor.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from export.runtime import ExportedPipeline, Session
from mimdit import flow
from mimdit.codec import decode, encode
from mimdit.condition import Condition
from mimdit.errors import first_line
from mimdit.metrics import psnr
from mimdit.mim import Routing
from mimdit.pipeline import MiMDiTPipeline
from mimkernels import use_backend

GATES = {"fp32": 1e-5, "fp16": 5e-3, "bf16": 2e-2}
# Of the error to float32, in multiples of the eager model's.
WIDE_FACTOR = 1.5
# Of a float32 picture after all steps, in dB.
PICTURE_PSNR = 60.0

# Of the steps that are compared.
LEAST_TIME = 0.05

Size = tuple[int, int, int]
Graphs = dict[str, Session]


@dataclass(frozen=True)
class Check:
    """One comparison: error must not exceed the gate; without a gate it is only reported.

    size: batch×rows×columns, in tokens.
    """

    graph: str
    output: str
    size: str
    error: float
    gate: float | None
    note: str = ""

    @property
    def passed(self) -> bool:
        # Written so that NaN fails.
        return self.error <= (math.inf if self.gate is None else self.gate)

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN or infinity."""
        error = self.error if math.isfinite(self.error) else str(self.error)
        return asdict(self) | {"error": error, "passed": self.passed}


@dataclass(frozen=True)
class Picture:
    """A square one to restore: its side and that of its tiles in pixels, and the steps."""

    side: int
    tile: int
    steps: int


def relative_error(a: np.ndarray | Tensor, b: Tensor) -> float:
    """‖a − b‖/‖b‖; of a zero reference ‖a‖."""
    wide = b.detach().double().cpu()
    difference = torch.as_tensor(a).double() - wide
    return float(difference.norm() / (wide.norm() if wide.norm() > 0 else 1))


def check_graphs(
    pipe: MiMDiTPipeline,
    graphs: Graphs,
    precision: str,
    sizes: Sequence[Size],
    wide: MiMDiTPipeline | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> list[Check]:
    """Every output of every graph at these sizes (batch, rows and columns in tokens).

    pipe: on the CPU, in the exported precision. wide: a float32 copy of it, for half precision.
    """
    checks: list[Check] = []
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), use_backend("torch"), _unaccelerated(pipe):
        for size in sizes:
            progress(f"checking {_text(size)} tokens")
            inputs = _inputs(pipe, size, generator)
            checks += _check_model(pipe, graphs, GATES[precision], size, inputs, wide)
            if "vae_encoder" in graphs:
                checks += _check_vae(pipe, graphs, GATES[precision], size, inputs)
    return checks


def check_picture(
    pipe: MiMDiTPipeline, exported: ExportedPipeline, precision: str, wanted: Picture
) -> Check:
    """A synthetic picture after all steps, from the same noise as the pipeline's.

    The error is the root mean square of their difference; half precision is only reported.
    """
    side = wanted.side
    rows, columns = np.mgrid[0:side, 0:side] / side
    noise = np.random.default_rng(0).normal(0, 0.1, (side, side, 3))
    smooth = np.stack([rows, columns, np.sin(6 * rows * columns) / 2 + 0.5], axis=-1)
    picture = (0.6 * smooth + 0.2 + noise).clip(0, 1).astype(np.float32)
    pipe.set_progress_bar_config(disable=True)
    exported.set_progress_bar_config(disable=True)
    gate = 10 ** (-PICTURE_PSNR / 20) if precision == "fp32" else None
    check = Check("picture", "pixels", f"{side}×{side} pixels", math.nan, gate or 0.0)
    options = {
        "num_inference_steps": wanted.steps,
        "shifts": 2,
        "tile": wanted.tile,
        "tile_overlap": min(64, wanted.tile // 2),
        "output_type": "np",
    }
    restored = []
    with use_backend("torch"), _unaccelerated(pipe):
        for call in (pipe, exported):
            generator = torch.Generator().manual_seed(0)
            try:
                out = cast(Any, call)(picture, generator=generator, **options)
            except ValueError as error:
                return replace(check, note=f"{type(call).__name__}: {first_line(error)}")
            restored.append(torch.from_numpy(out.images))
    found = psnr(*restored)
    return replace(check, error=10 ** (-found / 20), gate=gate, note=f"{found:.1f} dB")


def _inputs(pipe: MiMDiTPipeline, size: Size, generator: torch.Generator) -> dict[str, Tensor]:
    config = pipe.transformer.config
    batch, *tokens = size
    shape = (batch, config["in_channels"], *(n * config["patch_size"] for n in tokens))
    text, pooled_text = pipe.transformer.prompt(batch=batch)
    z_lq = torch.rand(shape, generator=generator) * 2 - 1
    t = LEAST_TIME + torch.rand(batch, generator=generator) * (1 - LEAST_TIME)
    noise = torch.randn(shape, generator=generator)
    return {
        "z_lq": z_lq,
        "x_t": flow.interpolate(z_lq, noise, t),
        "timestep": 1000 * t,
        "text": text.detach().float().contiguous(),
        "pooled_text": pooled_text.detach().float().contiguous(),
    }


def _check_model(
    pipe: MiMDiTPipeline,
    graphs: Graphs,
    gate: float,
    size: Size,
    inputs: dict[str, Tensor],
    wide: MiMDiTPipeline | None,
) -> Iterator[Check]:
    model, at = pipe.transformer, _text(size)
    z_lq, x_t, timestep = inputs["z_lq"], inputs["x_t"], inputs["timestep"]
    text = {
        "encoder_hidden_states": inputs["text"].to(model.dtype),
        "pooled_projections": inputs["pooled_text"].to(model.dtype),
    }

    means = model.pool_condition(z_lq)
    found = graphs["pool"](z_lq=z_lq)["means"]
    yield Check("pool", "means", at, relative_error(found, means), gate)

    routing = model.mim.route(means)
    own = graphs["conditioner"](z_lq=z_lq, means=found)
    yield _routing_check("routing", at, pipe, means, routing, own["index"], gate)
    forced = graphs["conditioner"](z_lq=z_lq, means=means)
    yield _routing_check("routing, forced", at, pipe, means, routing, forced["index"], 0)
    condition = model.encode_condition(z_lq, routing)
    tokens = torch.stack(condition.tokens)
    for name, reference in (
        ("inter", routing.inter),
        ("intra", routing.intra),
        ("pooled", routing.pooled),
    ):
        yield Check("conditioner", name, at, relative_error(forced[name], reference), gate)
    yield _blocks_check(at, forced["tokens"], tokens, gate)

    velocity = model(x_t, timestep, condition, **text, return_dict=False)[0]
    output = _raw(pipe, x_t, timestep, condition, text)
    step = graphs["denoiser"](**inputs, tokens=tokens.float(), pooled=routing.pooled.float())
    yield Check("denoiser", "output", at, relative_error(step["output"], output), gate)
    error = relative_error(step["velocity"], velocity)
    # v = (x_t − x̂0)/t magnifies rounding.
    yield Check("denoiser", "velocity", at, error, gate / LEAST_TIME)

    if wide is not None:
        full = wide.transformer
        best = full.encode_condition(z_lq, routing)
        reference = torch.stack(best.tokens)
        limit = WIDE_FACTOR * relative_error(tokens, reference)
        error = relative_error(forced["tokens"], reference)
        yield Check("conditioner", "tokens to fp32", at, error, limit)
        same = Condition(z_lq, tuple(t.float() for t in condition.tokens), routing)
        reference = _raw(wide, x_t, timestep, same, {k: v.float() for k, v in text.items()})
        limit = WIDE_FACTOR * relative_error(output, reference)
        error = relative_error(step["output"], reference)
        yield Check("denoiser", "output to fp32", at, error, limit)


def _blocks_check(at: str, found: np.ndarray, reference: Tensor, gate: float) -> Check:
    """All blocks' tokens; a failure names the first block over the gate."""
    error = relative_error(found, reference)
    if error <= gate:
        return Check("conditioner", "tokens", at, error, gate)
    blocks = [relative_error(a, b) for a, b in zip(found, reference, strict=True)]
    first = next((i for i, block in enumerate(blocks) if not block <= gate), "none alone")
    return Check("conditioner", "tokens", at, error, gate, f"first block over the gate: {first}")


def _raw(
    pipe: MiMDiTPipeline, x_t: Tensor, timestep: Tensor, condition: Condition, text: dict[str, Any]
) -> Tensor:
    """The network's raw output."""
    model, t = pipe.transformer, timestep / 1000
    kind, std = model.config["prediction_type"], model.config["damage_std"]
    seen = flow.network_input(kind, x_t, t, condition.latents, std).to(model.dtype)
    return model.predict(seen, timestep, condition, **text)


def _routing_check(
    name: str,
    at: str,
    pipe: MiMDiTPipeline,
    means: Tensor,
    routing: Routing,
    index: np.ndarray,
    allowed: float,
) -> Check:
    """The largest margin, in softmax weight, at which picks differ; 0 where none do."""
    sets = (np.sort(x, axis=-1) for x in (index, routing.index.numpy()))
    flipped = np.any(np.not_equal(*sets), axis=-1)  # [L,B,G]
    count = int(flipped.sum())
    if not count:
        return Check("conditioner", name, at, 0.0, allowed, f"{flipped.size} equal picks")
    worst = float(_margins(pipe, means)[torch.from_numpy(flipped)].max())
    return Check("conditioner", name, at, worst, allowed, f"{count} of {flipped.size} picks differ")


def _margins(pipe: MiMDiTPipeline, means: Tensor) -> Tensor:
    """Weight of the last sub-expert taken less that of the first one left, [L,B,G]."""
    mim = pipe.transformer.mim
    k, renormalize = mim.top_k, mim.renormalize
    mim.top_k, mim.renormalize = mim.experts, False
    try:
        weights = mim.route(means).intra
    finally:
        mim.top_k, mim.renormalize = k, renormalize
    return weights[..., k - 1] - weights[..., k]


def _check_vae(
    pipe: MiMDiTPipeline, graphs: Graphs, gate: float, size: Size, inputs: dict[str, Tensor]
) -> Iterator[Check]:
    codec, at = cast(Any, pipe.vae), _text(size)
    latents = inputs["z_lq"]
    pictures = decode(codec, latents)
    found = graphs["vae_decoder"](latents=latents)["pictures"]
    yield Check("vae_decoder", "pictures", at, relative_error(found, pictures), gate)
    pictures = pictures.float().clamp(-1, 1)
    found = graphs["vae_encoder"](pictures=pictures)["latents"]
    error = relative_error(found, encode(codec, pictures))
    yield Check("vae_encoder", "latents", at, error, gate)


@contextmanager
def _unaccelerated(pipe: MiMDiTPipeline) -> Iterator[None]:
    engine, pipe.transformer.engine = pipe.transformer.engine, None
    try:
        yield
    finally:
        pipe.transformer.engine = engine


def _text(size: Size) -> str:
    return "×".join(map(str, size))
