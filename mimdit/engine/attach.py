"""`mimdit.accelerate`: an engine for a pipeline or transformer."""

from typing import Any, TypeVar

from mimdit.engine.engine import Engine
from mimdit.transformer import MiMDiTTransformer2DModel

T = TypeVar("T")


def accelerate(
    target: T,
    *,
    enabled: bool = True,
    graph: bool | None = None,
    shapes: int = 4,
    compile: bool = False,
    quantize: str | None = None,
    first_block_cache: Any = None,
) -> T:
    """Make a pipeline or transformer faster, in place; its results stay the same up to rounding.

    Own sampling loops may call `transformer.engine.prepare(timesteps, pooled)` before their steps.
    `print(transformer.engine.plan(shape_of_latents))` says what a step takes in memory and time.
    Calls with gradients, and calls with `joint_attention_kwargs`, run the reference as before.
    Several threads may call it; their steps take turns.

    Args:
        target: a `MiMDiTPipeline` or a `MiMDiTTransformer2DModel`.
        enabled: False gives the reference back.
        graph: capture each shape in a CUDA graph; by default where there is a GPU.
        shapes: how many shapes to keep buffers and graphs of; the least recently used one goes.
        compile: let `torch.compile` fuse what is left; every shape takes minutes at first.
        quantize: approximate. "int8" (CPU, NVIDIA from 8.0) or "fp8" (NVIDIA from 8.9): products of
            the blocks' linear layers and of the experts in 8 bits, of copies of the weights.
        first_block_cache: approximate. A threshold, or diffusers' `FirstBlockCacheConfig`: steps in
            which the first block changes by less (0.05, say) leave out the others. Keeps twice the
            image tokens of every forward pass, in up to a quarter of the memory that is free.

    Returns:
        `target`.

    Raises:
        TypeError: not a pipeline or transformer of this package.
        ValueError: attention processors or norms that the engine does not know, weights that are
            moved or cast during a call (sequential or group offload, layerwise casting), caches of
            diffusers, a graph without a GPU, or 8-bit products that this device has not.
    """
    model = getattr(target, "transformer", target)
    if not isinstance(model, MiMDiTTransformer2DModel):
        expected = "a MiMDiTPipeline or a MiMDiTTransformer2DModel"
        raise TypeError(f"target: expected {expected}, got {type(target).__name__}")
    engine = None
    if enabled:
        engine = Engine(
            model,
            graph,
            shapes,
            compile=compile,
            quantize=quantize,
            first_block_cache=first_block_cache,
        )
    model.engine = engine
    return target
