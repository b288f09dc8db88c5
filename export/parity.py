"""Whether exported graphs compute what the model computes.

err = ‖a − b‖/‖b‖ of every output, in float64. References are the model's own calls in the exported
precision, with the same inputs: each graph answers for itself. Routing comes first: sub-experts may
differ only where their weights are closer than the gate, and further outputs are compared with the
reference's routing forced on the graph. Half precision must also stay as close to the float32 model
as the eager model of that precision does, up to a factor. Everything is compared with random inputs
and with a photograph, and once with drawn weights, which hide no fault (`export.weights`).
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from export.checks import GATES, Check, relative_error
from export.graphs import graphs_of
from export.inputs import (
    LEAST_TIME,
    Size,
    photograph_latents,
    random_latents,
    size_text,
    step_inputs,
)
from export.libraries import ExportError
from export.limits import codec_side
from export.routing import Graphs, forced_routing, routing_check
from export.weights import drawn_session, drawn_weights
from mimdit import flow
from mimdit.codec import decode, encode
from mimdit.condition import Condition
from mimdit.pipeline import MiMDiTPipeline
from mimkernels import use_backend

# Of the error to float32, in multiples of the eager model's.
WIDE_FACTOR = 1.5

Locate = Callable[[str, dict[str, Any], bool], str]


def check_graphs(
    pipe: MiMDiTPipeline,
    graphs: Graphs,
    precision: str,
    sizes: Sequence[Size],
    wide: MiMDiTPipeline | None = None,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
    locate: Locate | None = None,
    kinds: Sequence[str] = ("random", "photograph"),
) -> list[Check]:
    """Every output of every graph at these sizes (batch, rows and columns in tokens).

    pipe: on the CPU, in the exported precision. wide: a float32 copy of it, for half precision.
    locate: see `export.locate.Locator`; called once for each graph that fails.
    """
    checks: list[Check] = []
    gate = GATES[precision]
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), reference(pipe):
        for size in sizes:
            progress(f"checking {size_text(size)} tokens")
            for kind in kinds:
                latents = (
                    random_latents(pipe, size, generator)
                    if kind == "random"
                    else photograph_latents(pipe, size)
                )
                inputs = step_inputs(pipe, latents, generator)
                parts = [_check_model(pipe, graphs, gate, size, inputs, wide)]
                if "vae_encoder" in graphs:
                    parts.append(_check_vae(pipe, graphs, gate, size, inputs))
                found = _collected(parts, size_text(size), gate)
                checks += [replace(check, inputs=kind) for check in found]
    return located(checks, locate)


def check_drawn(
    pipe: MiMDiTPipeline,
    folder: Path,
    device: str,
    precision: str,
    size: Size,
    seed: int = 0,
    locate: Locate | None = None,
) -> list[Check]:
    """The folder's graphs with weights of `randomize_(seed)`, against the model with the same."""
    # `randomize_` leaves the codec as it is.
    ours = [graph for graph in graphs_of(pipe) if "vae" not in graph.name]
    with drawn_weights(pipe.transformer, seed):
        graphs = {g.name: drawn_session(folder / f"{g.name}.onnx", g, device) for g in ours}
        checks = check_graphs(pipe, graphs, precision, [size], None, seed, kinds=["random"])
        return located([replace(check, weights="drawn") for check in checks], locate)


def located(checks: Sequence[Check], locate: Locate | None) -> list[Check]:
    """The first failure of each graph says where the graph first differs."""
    found, named = [], set[str]()
    for check in checks:
        if not check.passed and locate is not None and check.graph not in named and check.fed:
            named.add(check.graph)
            place = locate(check.graph, check.fed, check.weights == "drawn")
            check = replace(check, place=place)
        found.append(check)
    return found


@contextmanager
def reference(pipe: MiMDiTPipeline) -> Iterator[None]:
    """Inside, the pipeline runs its plain torch model."""
    engine, pipe.transformer.engine = pipe.transformer.engine, None
    try:
        with use_backend("torch"):
            yield
    finally:
        pipe.transformer.engine = engine


def raw_output(
    pipe: MiMDiTPipeline, x_t: Tensor, timestep: Tensor, condition: Condition, text: dict[str, Any]
) -> Tensor:
    """The network's raw output."""
    model, t = pipe.transformer, timestep / 1000
    kind, std = model.config["prediction_type"], model.config["damage_std"]
    seen = flow.network_input(kind, x_t, t, condition.latents, std).to(model.dtype)
    return model.predict(seen, timestep, condition, **text)


def _collected(parts: Sequence[Iterator[Check]], at: str, gate: float) -> list[Check]:
    """All checks of one size; a graph that cannot run is a failed one."""
    checks: list[Check] = []
    for part in parts:
        try:
            # Not extend: what came before an error is kept.
            for check in part:
                checks.append(check)
        except ExportError as error:
            # Messages begin with the name of the graph's file.
            name = str(error).partition(".")[0]
            checks.append(Check(name, "outputs", at, math.nan, gate, str(error)))
    return checks


def _check_model(
    pipe: MiMDiTPipeline,
    graphs: Graphs,
    gate: float,
    size: Size,
    inputs: dict[str, Tensor],
    wide: MiMDiTPipeline | None,
) -> Iterator[Check]:
    model, at = pipe.transformer, size_text(size)
    z_lq, x_t, timestep = inputs["z_lq"], inputs["x_t"], inputs["timestep"]
    text = {
        "encoder_hidden_states": inputs["text"].to(model.dtype),
        "pooled_projections": inputs["pooled_text"].to(model.dtype),
    }

    means = model.pool_condition(z_lq)
    fed: dict[str, Any] = {"z_lq": z_lq}
    found = graphs["pool"](z_lq=z_lq)["means"]
    yield Check("pool", "means", at, relative_error(found, means), gate, fed=fed)

    routing = model.mim.route(means)
    own = graphs["conditioner"](z_lq=z_lq, means=found)
    fed = {"z_lq": z_lq, "means": torch.from_numpy(found)}
    yield routing_check("routing", at, model.mim, means, routing, own["index"], gate, fed)
    means, routing, forced = forced_routing(model.mim, graphs, z_lq, means)
    fed = {"z_lq": z_lq, "means": means.float()}
    yield routing_check("routing, forced", at, model.mim, means, routing, forced["index"], 0, fed)
    condition = model.encode_condition(z_lq, routing)
    tokens = torch.stack(condition.tokens)
    for name, value in (
        ("inter", routing.inter),
        ("intra", routing.intra),
        ("pooled", routing.pooled),
    ):
        error = relative_error(forced[name], value)
        yield Check(
            "conditioner", name, at, error, gate, _block(forced[name], value, gate), fed=fed
        )
    error, block = relative_error(forced["tokens"], tokens), _block(forced["tokens"], tokens, gate)
    yield Check("conditioner", "tokens", at, error, gate, block, fed=fed)

    velocity = model(x_t, timestep, condition, **text, return_dict=False)[0]
    output = raw_output(pipe, x_t, timestep, condition, text)
    fed = {**inputs, "tokens": tokens.float(), "pooled": routing.pooled.float()}
    step = graphs["denoiser"](**fed)
    error = relative_error(step["output"], output)
    yield Check("denoiser", "output", at, error, gate, fed=fed)
    error = relative_error(step["velocity"], velocity)
    # v = (x_t − x̂0)/t magnifies rounding.
    yield Check("denoiser", "velocity", at, error, gate / LEAST_TIME, fed=fed)

    if wide is not None:
        full = wide.transformer
        best = torch.stack(full.encode_condition(z_lq, routing).tokens)
        limit = WIDE_FACTOR * relative_error(tokens, best)
        error = relative_error(forced["tokens"], best)
        yield Check("conditioner", "tokens to fp32", at, error, limit)
        same = Condition(z_lq, tuple(t.float() for t in condition.tokens), routing)
        best = raw_output(wide, x_t, timestep, same, {k: v.float() for k, v in text.items()})
        limit = WIDE_FACTOR * relative_error(output, best)
        error = relative_error(step["output"], best)
        yield Check("denoiser", "output to fp32", at, error, limit)


def _block(found: np.ndarray, value: Tensor, gate: float) -> str:
    """The first block (of the leading axis) over the gate."""
    errors = [relative_error(a, b) for a, b in zip(found, value, strict=True)]
    first = next((i for i, error in enumerate(errors) if not error <= gate), None)
    return "" if first is None else f"first block over the gate: {first}"


def _check_vae(
    pipe: MiMDiTPipeline, graphs: Graphs, gate: float, size: Size, inputs: dict[str, Tensor]
) -> Iterator[Check]:
    """Of larger latents a tile of the codec's own size, in which both sides take the whole."""
    codec, most = cast(Any, pipe.vae), codec_side(pipe)
    batch, *tokens = size
    at = size_text((batch, *(min(n, most) for n in tokens)))
    side = most * pipe.transformer.config["patch_size"]
    fed: dict[str, Any] = {"latents": inputs["z_lq"][..., :side, :side].contiguous()}
    pictures = decode(codec, fed["latents"])
    found = graphs["vae_decoder"](**fed)["pictures"]
    yield Check("vae_decoder", "pictures", at, relative_error(found, pictures), gate, fed=fed)
    fed = {"pictures": pictures.float().clamp(-1, 1)}
    found = graphs["vae_encoder"](**fed)["latents"]
    error = relative_error(found, encode(codec, fed["pictures"]))
    yield Check("vae_encoder", "latents", at, error, gate, fed=fed)
