"""The model as graphs: modules whose inputs and outputs are tensors alone.

    pool         z_lq → means [L,B,S]: of tokens, their squares, statistics of the picture
    conditioner  z_lq, means → tokens [L,B,K,D], and the routing: pooled [L,B,S], inter [L,B,G],
                 intra and index [L,B,G,k]
    denoiser     x_t, timestep, z_lq, tokens, pooled, text, pooled_text → velocity, output
    vae_encoder  pictures [B,3,H,W] in [−1,1] → latents;  vae_decoder  the inverse

Latents are [B,c,h,w]; every input and output is float32, but index int64. What decides the routing
is an input: the mean of `pool` over a picture's tiles routes all of them alike, and the reference's
own means force its routing on the graph. The arithmetic around the network (`mimdit.flow`) is in
the denoiser, so that a runtime needs no formula of the model; `output` is the network's raw one.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from mimdit import experts, flow
from mimdit.codec import Codec, codec_factor
from mimdit.condition import Condition
from mimdit.mim import MiM, Routing
from mimdit.pipeline import MiMDiTPipeline
from mimdit.transformer import MiMDiTTransformer2DModel
from mimkernels import use_backend

# Elements of attention scores that blocks in the conditioner may fill together.
_SCORES = 2**28


class Graph(nn.Module):
    """One graph: names of its inputs and outputs, and which axes of the inputs may vary.

    axes: of every input the names of its varying axes by number; "rows" and "columns" count `step`
    elements each.
    """

    name: ClassVar[str]
    outputs: ClassVar[tuple[str, ...]]
    axes: ClassVar[dict[str, dict[int, str]]]
    step: int

    def example(self, batch: int, rows: int, columns: int) -> dict[str, Tensor]:
        """Inputs of a size, for tracing."""
        raise NotImplementedError


class _ModelGraph(Graph):
    def __init__(self, model: MiMDiTTransformer2DModel) -> None:
        super().__init__()
        self.model, self.step = model, model.config["patch_size"]

    def latents(self, batch: int, rows: int, columns: int) -> Tensor:
        size = (rows * self.step, columns * self.step)
        return torch.rand(batch, self.model.config["in_channels"], *size) * 2 - 1


_LATENTS = {0: "batch", 2: "rows", 3: "columns"}


class Pool(_ModelGraph):
    """z_lq → means."""

    name, outputs = "pool", ("means",)
    axes: ClassVar = {"z_lq": _LATENTS}

    def example(self, batch: int, rows: int, columns: int) -> dict[str, Tensor]:
        return {"z_lq": self.latents(batch, rows, columns)}

    def forward(self, z_lq: Tensor) -> Tensor:
        return self.model.pool_condition(z_lq).float()


class Conditioner(_ModelGraph):
    """z_lq, means → tokens and the routing taken."""

    name, outputs = "conditioner", ("tokens", "pooled", "inter", "intra", "index")
    axes: ClassVar = {"z_lq": _LATENTS, "means": {1: "batch"}}

    def example(self, batch: int, rows: int, columns: int) -> dict[str, Tensor]:
        z_lq = self.latents(batch, rows, columns)
        return {"z_lq": z_lq, "means": self.model.pool_condition(z_lq).float()}

    def forward(self, z_lq: Tensor, means: Tensor) -> tuple[Tensor, ...]:
        routing = self.model.mim.route(means)
        tokens = torch.stack(self.model.encode_condition(z_lq, routing).tokens)
        weights = (routing.pooled, routing.inter, routing.intra)
        return tokens.float(), *(x.float() for x in weights), routing.index


class Denoiser(_ModelGraph):
    """One step at timestep 1000·t [B], with text [B,T,C] and pooled_text [B,P]."""

    name, outputs = "denoiser", ("velocity", "output")
    axes: ClassVar = {
        "x_t": _LATENTS,
        "timestep": {0: "batch"},
        "z_lq": _LATENTS,
        "tokens": {1: "batch", 2: "tokens"},
        "pooled": {1: "batch"},
        "text": {0: "batch"},
        "pooled_text": {0: "batch"},
    }

    def example(self, batch: int, rows: int, columns: int) -> dict[str, Tensor]:
        model = self.model
        text, pooled_text = model.prompt(batch=batch)
        z_lq = self.latents(batch, rows, columns)
        routing = model.mim.route(model.pool_condition(z_lq))
        return {
            "x_t": self.latents(batch, rows, columns),
            "timestep": torch.linspace(300, 900, batch),
            "z_lq": z_lq,
            "tokens": torch.randn(model.mim.layers, batch, rows * columns, model.inner_dim),
            "pooled": routing.pooled.float(),
            "text": text.detach().float().contiguous(),
            "pooled_text": pooled_text.detach().float().contiguous(),
        }

    def forward(
        self,
        x_t: Tensor,
        timestep: Tensor,
        z_lq: Tensor,
        tokens: Tensor,
        pooled: Tensor,
        text: Tensor,
        pooled_text: Tensor,
    ) -> tuple[Tensor, Tensor]:
        model, t = self.model, timestep / 1000
        kind, std = model.config["prediction_type"], model.config["damage_std"]
        # Picks and their weights are in the tokens already.
        unread = cast(Tensor, None)
        routing = Routing(unread, unread, unread, pooled)
        condition = Condition(z_lq, tokens.to(model.dtype).unbind(), routing)
        seen = flow.network_input(kind, x_t, t, z_lq, std).to(model.dtype)
        output = model.predict(seen, timestep, condition, text, pooled_text).float()
        return flow.to_velocity(kind, output, x_t, t, z_lq, std), output


class VaeEncoder(Graph):
    """Pictures [B,3,H,W] in [−1,1] → scaled latents, as `mimdit.codec.encode` of untiled ones."""

    name, outputs = "vae_encoder", ("latents",)
    axes: ClassVar = {"pictures": _LATENTS}

    def __init__(self, codec: AutoencoderKL, patch: int) -> None:
        super().__init__()
        self.codec, self.step = codec, codec_factor(codec) * patch

    def example(self, batch: int, rows: int, columns: int) -> dict[str, Tensor]:
        return {"pictures": torch.rand(batch, 3, rows * self.step, columns * self.step) * 2 - 1}

    def forward(self, pictures: Tensor) -> Tensor:
        config = self.codec.config
        latents = self.codec.encode(pictures.to(self.codec.dtype)).latent_dist.mode()
        return ((latents - (config["shift_factor"] or 0)) * config["scaling_factor"]).float()


class VaeDecoder(Graph):
    """The inverse of `VaeEncoder`."""

    name, outputs = "vae_decoder", ("pictures",)
    axes: ClassVar = {"latents": _LATENTS}

    def __init__(self, codec: AutoencoderKL, patch: int) -> None:
        super().__init__()
        self.codec, self.step = codec, patch

    def example(self, batch: int, rows: int, columns: int) -> dict[str, Tensor]:
        channels = self.codec.config["latent_channels"]
        return {"latents": torch.randn(batch, channels, rows * self.step, columns * self.step)}

    def forward(self, latents: Tensor) -> Tensor:
        config = self.codec.config
        latents = latents / config["scaling_factor"] + (config["shift_factor"] or 0)
        scaled = latents.to(self.codec.dtype)
        return self.codec.decode(scaled).sample.float()  # pyright: ignore[reportArgumentType]


def graphs_of(pipe: MiMDiTPipeline) -> list[Graph]:
    """All graphs of a pipeline; pixel codecs need none."""
    model, codec = pipe.transformer, cast(Codec, pipe.vae)
    found: list[Graph] = [Pool(model), Conditioner(model), Denoiser(model)]
    if isinstance(codec, AutoencoderKL):
        patch = model.config["patch_size"]
        found += [VaeEncoder(codec, patch), VaeDecoder(codec, patch)]
    return [graph.eval() for graph in found]


@contextmanager
def traceable(pipe: MiMDiTPipeline, tokens: int, batch: int = 1) -> Iterator[None]:
    """Inside, the pipeline's parts run without the engine, kernels, gradients and VAE tiles.

    tokens: of the largest batch, of so many pictures; the blocks that the conditioner takes
    together depend on it.
    """
    model, codec = pipe.transformer, pipe.vae
    engine, model.engine = model.engine, None
    together = _together(model.mim, tokens, batch)
    # Shadows the method, whose answer would depend on the traced size.
    model.mim.__dict__["together"] = lambda tokens: together
    convolution = experts.expert_depthwise3x3
    experts.expert_depthwise3x3 = depthwise3x3
    tiled = getattr(codec, "use_tiling", False)
    try:
        if tiled:
            codec.disable_tiling()
        with use_backend("torch"), torch.no_grad():
            yield
    finally:
        model.engine, experts.expert_depthwise3x3 = engine, convolution
        del model.mim.__dict__["together"]
        if tiled:
            codec.enable_tiling()


def _together(mim: MiM, tokens: int, batch: int) -> int:
    """Blocks that go through the conditioner together.

    Not every runtime fuses attention: where scores between all tokens of a picture are held, those
    of many blocks would fill more memory than all else.
    """
    spatial = [bank for bank in mim.banks if isinstance(bank, experts.SpatialExperts)]
    heads = max((bank.heads for bank in spatial), default=0)
    scores = mim.top_k * heads * tokens**2 // batch
    return max(1, min(mim.together(tokens), _SCORES // max(scores, 1)))


def depthwise3x3(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """`mimkernels.expert_depthwise3x3` as nine products, float32 or wider inside.

    x [B,k,H,W,C], weight [E,C,3,3], index [B,k]. A convolution with kernels of each picture would
    have as many groups as the batch asks for, and an ONNX graph fixes their number.
    """
    height, width = x.shape[2:4]
    wide = torch.promote_types(x.dtype, torch.float32)
    taps = weight[index].to(x.dtype).to(wide)[:, :, None, None]  # [B,k,1,1,C,3,3]
    padded = F.pad(x.to(wide), (0, 0, 1, 1, 1, 1))
    parts = [
        padded[:, :, i : i + height, j : j + width] * taps[..., i, j]
        for i in range(3)
        for j in range(3)
    ]
    out = parts[0]
    for part in parts[1:]:
        out = out + part
    return out.to(x.dtype)
