"""Sizes that graphs take, and how they are traced for them."""

from contextlib import AbstractContextManager
from dataclasses import dataclass

from export.graphs import Graph, traceable
from mimdit.codec import codec_factor
from mimdit.pipeline import MiMDiTPipeline


@dataclass(frozen=True)
class Limits:
    """Sizes that a graph takes: pictures in a batch, tokens along each side; both ends included."""

    batch: tuple[int, int]
    side: tuple[int, int]

    def traced(self) -> tuple[int, int, int]:
        """Batch, rows and columns to trace with: where they vary, unlike each other and not 1."""
        low, high = self.side
        rows, columns = min(low + 3, high), min(low + 5, high)
        return min(max(self.batch[0], 2), self.batch[1]), rows, columns


def usual_side(pipe: MiMDiTPipeline, limits: Limits) -> int:
    """Tokens along a side of the trained tile."""
    config = pipe.transformer.config
    return min(config["sample_size"] // config["patch_size"], limits.side[1])


def graph_limits(pipe: MiMDiTPipeline, graph: Graph, limits: Limits) -> Limits:
    """Those of one graph: a codec's takes tiles of its own, as large as it was trained for."""
    if "vae" not in graph.name:
        return limits
    most = codec_side(pipe)
    return Limits(limits.batch, (min(limits.side[0], most), most))


def tracing(pipe: MiMDiTPipeline, limits: Limits) -> AbstractContextManager[None]:
    """`graphs.traceable` for the largest batch of trained tiles."""
    batch = limits.batch[1]
    return traceable(pipe, batch * usual_side(pipe, limits) ** 2, batch)


def codec_side(pipe: MiMDiTPipeline) -> int:
    """Tokens along the largest tile of an AutoencoderKL."""
    patch = codec_factor(pipe.vae) * pipe.transformer.config["patch_size"]
    return max(pipe.vae.tile_sample_min_size // patch, 1)
