"""Ways to run the model, for `bench.latency` and `bench.ablation`: reference, engine, backbone."""

import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers import SD3Transformer2DModel
from torch import Tensor

from bench.exported import LeftOutError, onnxruntime, tensorrt
from mimdit import flow
from mimdit.condition import Condition
from mimdit.engine import Engine
from mimdit.engine.graphed import Graphed
from mimdit.mim import Routing
from mimdit.transformer import MiMDiTTransformer2DModel

Step = Callable[[Tensor, Tensor, Condition], Tensor]
# The first-block cache, and its threshold where none is named: diffusers' own default.
CACHED = "engine-first-block-cache"
THRESHOLD = 0.05


class Sampled(NamedTuple):
    """Latents [B,c,h,w] after all steps, and how many steps left out all blocks but the first."""

    latents: Tensor
    skipped: int


@dataclass(frozen=True)
class Variant:
    """One way to run the model: `encode(z_lq)` → condition, `step(x, t, condition)` → raw output.

    cached: whether all steps share one condition. equal: whether its results should be the
    reference's; the bare backbone, which sees no condition, is there to compare with. approximate:
    its results are only close to the engine's. counted: a step of the same products for a FLOP
    counter, which does not see into graphs and other runtimes. sampling: entered around the steps
    at these times. skipped: steps that a cache made cheaper, asked inside of it; threshold: of that
    cache.
    """

    name: str
    encode: Callable[[Tensor], Condition]
    step: Step
    cached: bool = True
    equal: bool = True
    approximate: bool = False
    counted: Step | None = None
    sampling: Callable[[Tensor], AbstractContextManager[None]] = lambda _: nullcontext()
    skipped: Callable[[], int] | None = None
    threshold: float | None = None

    def picture(self, model: MiMDiTTransformer2DModel, x: Tensor, z: Tensor, steps: int) -> Sampled:
        """Euler steps of equal length from noise x to a latent; both [B,c,h,w], float32."""
        kind, std = model.config["prediction_type"], model.config["damage_std"]
        times = torch.linspace(1, 0, steps + 1, device=x.device)[:-1]
        condition = self.encode(z) if self.cached else None
        with self.sampling(times * 1000):
            for now in times:
                t = now.expand(len(x))
                seen = flow.network_input(kind, x, t, z, std).to(model.dtype)
                given = condition if condition is not None else self.encode(z)
                output = self.step(seen, t * 1000, given).to(x.dtype)
                x = x - flow.to_velocity(kind, output, x, t, z, std) / steps
            skipped = 0 if self.skipped is None else self.skipped()
        return Sampled(x, skipped)


def _literal(model: MiMDiTTransformer2DModel, literal: bool) -> Step:
    def run(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        model.use_literal_attention(literal)
        return model.predict(x, t, condition)

    return run


def reference(model: MiMDiTTransformer2DModel, like: Tensor) -> Variant:
    """Equation 5 word for word, and the conditioning anew in every step."""
    del like
    return Variant("reference", model.encode_condition, _literal(model, True), cached=False)


def reference_cached(model: MiMDiTTransformer2DModel, like: Tensor) -> Variant:
    """The conditioning once, and no queries of its tokens."""
    del like
    return Variant("reference-cached", model.encode_condition, _literal(model, False))


def with_engine(name: str, model: MiMDiTTransformer2DModel, engine: Engine, **kind: Any) -> Variant:
    """The model with this engine, which it loses after every call."""

    def through(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            before, model.engine = model.engine, engine
            try:
                return call(*arguments)
            finally:
                model.engine = before

        return run

    def sampling(timesteps: Tensor) -> AbstractContextManager[None]:
        return engine.steps(timesteps, [model.prompt()[1]])

    return Variant(
        name,
        through(model.encode_condition),
        through(model.predict),
        counted=_literal(model, False),
        sampling=sampling,
        **kind,
    )


def accelerated(
    name: str, model: MiMDiTTransformer2DModel, like: Tensor, approximate: bool = False, **how: Any
) -> Variant:
    """`mimdit.accelerate` with these options."""
    del like
    if how.get("compile"):
        _check_compiler()
    try:
        engine = Engine(model, **how)
    except ValueError as error:
        raise LeftOutError(str(error)) from error
    skipped = None if engine.threshold is None else lambda: engine.skipped
    return with_engine(
        name, model, engine, approximate=approximate, skipped=skipped, threshold=engine.threshold
    )


def backbone(name: str, model: MiMDiTTransformer2DModel, like: Tensor, compiled: bool) -> Variant:
    """Diffusers' own SD3 transformer with the same weights, which sees no condition.

    compiled: block by block, and on a GPU as one CUDA graph: what a user of diffusers would run.
    """
    config = {k: v for k, v in model.config.items() if k in _backbone_settings()}
    with torch.device("meta"):
        bare = SD3Transformer2DModel(**config)
    bare.load_state_dict(model.state_dict(), strict=False, assign=True)
    bare.requires_grad_(False).eval()
    text, pooled = (v.to(model.dtype) for v in model.prompt(batch=len(like)))

    def run(x: Tensor, t: Tensor) -> Tensor:
        return bare(x, text, pooled, t, return_dict=False)[0]  # pyright: ignore

    called: Callable[..., Tensor] = run
    if compiled:
        _check_compiler()
        for block in bare.transformer_blocks:
            block.compile(mode="max-autotune-no-cudagraphs", fullgraph=True)
        called = Graphed(run, model.device) if model.device.type == "cuda" else run
    nothing = Condition(torch.empty(0), (), Routing(*[torch.empty(0)] * 4))
    return Variant(
        name,
        lambda _: nothing,
        lambda x, t, _: called(x, t),
        equal=False,
        counted=lambda x, t, _: model.predict(x, t, None),
    )


def _backbone_settings() -> set[str]:
    import inspect

    return set(inspect.signature(SD3Transformer2DModel.__init__).parameters) - {"self"}


def _check_compiler() -> None:
    if not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        raise LeftOutError("torch.compile needs a C++ compiler, and there is none")


def without_graph(model: MiMDiTTransformer2DModel, like: Tensor) -> Variant:
    return accelerated("engine-no-graph", model, like, graph=False)


MAKERS: dict[str, Callable[[MiMDiTTransformer2DModel, Tensor], Variant]] = {
    "reference": reference,
    "reference-cached": reference_cached,
    "engine-no-graph": without_graph,
    "engine": partial(accelerated, "engine"),
    "engine-compile": partial(accelerated, "engine-compile", compile=True),
    "engine-fp8": partial(accelerated, "engine-fp8", approximate=True, quantize="fp8"),
    "engine-int8": partial(accelerated, "engine-int8", approximate=True, quantize="int8"),
    CACHED: partial(accelerated, CACHED, approximate=True, first_block_cache=THRESHOLD),
    "backbone-eager": partial(backbone, "backbone-eager", compiled=False),
    "backbone-compiled": partial(backbone, "backbone-compiled", compiled=True),
}
for _name, _session in (("onnxruntime", onnxruntime), ("tensorrt", tensorrt)):
    MAKERS[_name] = lambda model, like, _name=_name, _session=_session: Variant(
        _name, *_session(model, like), counted=_literal(model, False)
    )


def variants_of(
    model: MiMDiTTransformer2DModel, like: Tensor, names: Sequence[str]
) -> tuple[list[Variant], dict[str, str]]:
    """Variants by name for latents like these [B,c,h,w], and why the others were left out.

    Beside the names of `MAKERS`: "engine-first-block-cache=0.1", the cache at another threshold.
    """
    found, missing = [], {}
    for name in names:
        kind, _, threshold = name.partition("=")
        make = MAKERS[kind]
        if threshold:
            cache = {"approximate": True, "first_block_cache": float(threshold)}
            make = partial(accelerated, name, **cache)
        try:
            found.append(make(model, like))
        except LeftOutError as error:
            missing[name] = str(error)
    return found, missing
