"""Whether exported graphs compute what the model computes.

err = ‖a − b‖/‖b‖ of every output, in float64. References are the model's own calls in the exported
precision, with the same inputs: each graph answers for itself. Routing comes first: sub-experts may
differ only where their weights are closer than the gate, and further outputs are compared with the
reference's routing forced on the graph. Half precision must also stay as close to the float32 model
as the eager model of that precision does, up to a factor. Everything is compared with random inputs
and with a photograph, and once with drawn weights, which hide no fault (`export.weights`).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    different,
    photograph_latents,
    random_latents,
    step_inputs,
)
from export.libraries import ExportError
from export.sessions import AnySession
from export.weights import drawn_session, drawn_weights
from mimdit import flow
from mimdit.codec import decode, encode
from mimdit.condition import Condition
from mimdit.mim import MiM, Routing
from mimdit.pipeline import MiMDiTPipeline
from mimkernels import use_backend

# Of the error to float32, in multiples of the eager model's.
WIDE_FACTOR = 1.5
# Where routers' sums round either way, this much of a logit makes the reference's choice clear.
_NUDGE = 1e-2
_TRIES = 3

Graphs = Mapping[str, AnySession]
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
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), reference(pipe):
        for size in sizes:
            progress(f"checking {_text(size)} tokens")
            for kind in kinds:
                latents = (
                    random_latents(pipe, size, generator)
                    if kind == "random"
                    else photograph_latents(pipe, size)
                )
                inputs = step_inputs(pipe, latents, generator)
                found = _checked(pipe, graphs, GATES[precision], size, inputs, wide)
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


def _checked(
    pipe: MiMDiTPipeline,
    graphs: Graphs,
    gate: float,
    size: Size,
    inputs: dict[str, Tensor],
    wide: MiMDiTPipeline | None,
) -> list[Check]:
    """All checks of one size; a graph that cannot run is a failed one."""
    checks: list[Check] = []
    parts = [_check_model(pipe, graphs, gate, size, inputs, wide)]
    if "vae_encoder" in graphs:
        parts.append(_check_vae(pipe, graphs, gate, size, inputs))
    for part in parts:
        try:
            # Not extend: what came before an error is kept.
            for check in part:
                checks.append(check)
        except ExportError as error:
            name = str(error).partition(".onnx")[0]
            checks.append(Check(name, "outputs", _text(size), math.nan, gate, str(error)))
    return checks


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
    fed: dict[str, Any] = {"z_lq": z_lq}
    found = graphs["pool"](z_lq=z_lq)["means"]
    yield Check("pool", "means", at, relative_error(found, means), gate, fed=fed)

    routing = model.mim.route(means)
    own = graphs["conditioner"](z_lq=z_lq, means=found)
    fed = {"z_lq": z_lq, "means": torch.from_numpy(found)}
    yield _routing_check("routing", at, model.mim, means, routing, own["index"], gate, fed)
    means, routing, forced = _forced(model.mim, graphs, z_lq, means)
    fed = {"z_lq": z_lq, "means": means.float()}
    yield _routing_check("routing, forced", at, model.mim, means, routing, forced["index"], 0, fed)
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


def _forced(
    mim: MiM, graphs: Graphs, z_lq: Tensor, means: Tensor
) -> tuple[Tensor, Routing, dict[str, np.ndarray]]:
    """Means whose routing rounds alike, the reference's routing by them, the graph's outputs.

    Means decide the routing. Where two sub-experts tie, they move a little towards the one that the
    reference takes.
    """
    tries = 0
    while True:
        routing = mim.route(means)
        forced = graphs["conditioner"](z_lq=z_lq, means=means.float())
        tries += 1
        if forced["index"].shape != routing.index.shape or tries == _TRIES:
            return means, routing, forced
        flipped = _flipped(forced["index"], routing)
        if not flipped.any() or float(_margins(mim, means)[flipped].max()) > _NUDGE:
            return means, routing, forced
        order = _all_experts(mim, means).index
        means = means.clone()
        for layer, picture, group in flipped.nonzero().tolist():
            taken, left = order[layer, picture, group, mim.top_k - 1 : mim.top_k + 1].tolist()
            rows = mim.intra_router[layer, group].to(means.dtype)
            apart = rows[taken] - rows[left]
            step = _NUDGE * apart / apart.square().sum().clamp(min=1e-12)
            means[layer, picture, : len(step)] += step


def _routing_check(
    name: str,
    at: str,
    mim: MiM,
    means: Tensor,
    routing: Routing,
    index: np.ndarray,
    allowed: float,
    fed: dict[str, Any],
) -> Check:
    """The largest margin, in softmax weight, at which picks differ; 0 where none do."""
    pictures = index.shape[1]
    unlike = f", {different(routing.index)} different routings of {pictures} pictures"
    if index.shape != routing.index.shape:
        return Check("conditioner", name, at, math.nan, allowed, "another number of picks", fed=fed)
    flipped = _flipped(index, routing)  # [L,B,G]
    count = int(flipped.sum())
    if not count:
        note = f"{flipped.numel()} equal picks{unlike if pictures > 1 else ''}"
        return Check("conditioner", name, at, 0.0, allowed, note, fed=fed)
    worst = float(_margins(mim, means)[flipped].max())
    first = int(flipped.nonzero()[0, 0])
    note = f"{count} of {flipped.numel()} picks differ, first in block {first}"
    return Check("conditioner", name, at, worst, allowed, note, fed=fed)


def _flipped(index: np.ndarray, routing: Routing) -> Tensor:
    """Where the sets of sub-experts differ, [L,B,G]."""
    sets = (np.sort(x, axis=-1) for x in (index, routing.index.numpy()))
    return torch.from_numpy(np.any(np.not_equal(*sets), axis=-1))


def _margins(mim: MiM, means: Tensor) -> Tensor:
    """Weight of the last sub-expert taken less that of the first one left, [L,B,G]."""
    weights = _all_experts(mim, means).intra
    # Where all are taken nothing may differ.
    if mim.top_k == mim.experts:
        return torch.full_like(weights[..., 0], math.inf)
    return weights[..., mim.top_k - 1] - weights[..., mim.top_k]


def _all_experts(mim: MiM, means: Tensor) -> Routing:
    """The routing with all sub-experts in order of their weights."""
    k, renormalize = mim.top_k, mim.renormalize
    mim.top_k, mim.renormalize = mim.experts, False
    try:
        return mim.route(means)
    finally:
        mim.top_k, mim.renormalize = k, renormalize


def _check_vae(
    pipe: MiMDiTPipeline, graphs: Graphs, gate: float, size: Size, inputs: dict[str, Tensor]
) -> Iterator[Check]:
    codec, at = cast(Any, pipe.vae), _text(size)
    fed: dict[str, Any] = {"latents": inputs["z_lq"]}
    pictures = decode(codec, fed["latents"])
    found = graphs["vae_decoder"](**fed)["pictures"]
    yield Check("vae_decoder", "pictures", at, relative_error(found, pictures), gate, fed=fed)
    fed = {"pictures": pictures.float().clamp(-1, 1)}
    found = graphs["vae_encoder"](**fed)["latents"]
    error = relative_error(found, encode(codec, fed["pictures"]))
    yield Check("vae_encoder", "latents", at, error, gate, fed=fed)


def _text(size: Size) -> str:
    return "×".join(map(str, size))
