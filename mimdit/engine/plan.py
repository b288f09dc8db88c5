"""What a picture will take: memory, FLOPs, and the least time on a GPU that need not be there."""

from dataclasses import dataclass

import torch

from mimdit.engine.modulation import adaptive_norms
from mimdit.transformer import MiMDiTTransformer2DModel
from mimkernels.devices import find_device


@dataclass(frozen=True)
class Plan:
    """Of one batch of pictures (or tiles) of one size; memory in bytes, without the codec.

    buffers: joint keys, values and queries. condition: keys and values of the conditioning.
    activations: an estimate of what a step holds at once. seconds: at the device's published peak,
    which nothing reaches; of all steps, without codec and conditioning.
    """

    pictures: int
    grid: tuple[int, int]
    steps: int
    device: str
    weights: int
    buffers: int
    condition: int
    activations: int
    step_flops: int
    seconds: float

    @property
    def memory(self) -> int:
        """All of it together."""
        return self.weights + self.buffers + self.condition + self.activations

    def __str__(self) -> str:
        parts = ("weights", "buffers", "condition", "activations")
        memory = ", ".join(f"{name} {getattr(self, name) / 1e6:.0f} MB" for name in parts)
        rows, columns = self.grid
        return (
            f"{self.pictures} × {rows}×{columns} tokens: {self.memory / 1e9:.2f} GB ({memory}); "
            f"{self.step_flops / 1e12:.3g} TFLOP a step, {self.steps} steps in at least "
            f"{self.seconds:.3g} s on {self.device}"
        )


def plan(
    model: MiMDiTTransformer2DModel,
    latents: tuple[int, ...],
    steps: int = 40,
    device: str = "H200",
    text_tokens: int | None = None,
) -> Plan:
    """The plan for latents of shape [B,c,h,w]; the tensors' type is the model's.

    device: a name in `mimkernels.devices.DEVICES`, for the time. text_tokens: T, by default those
    of the stored prompts.

    Raises:
        ValueError: a device that is not known, or sizes that are no multiple of the patch.
    """
    pictures, channels, height, width = latents
    grid = model.grid(torch.empty(1, channels, height, width, device="meta"))
    text = model.prompt_embeds.shape[1] if text_tokens is None else text_tokens
    image = grid[0] * grid[1]
    size, d = model.dtype.itemsize, model.inner_dim
    blocks = len(model.transformer_blocks)
    own, all_ = image + text, 2 * image + text
    dual = len(model.config["dual_attention_layers"])
    patch = model.config["patch_size"] ** 2
    # Multiplications and additions for each picture: 24·D² a token and block are q, k, v, the
    # output projection, and an MLP four times as wide; 8·D² those of attention alone.
    flops = blocks * (24 * image * d**2 + 24 * text * d**2 + 4 * own * all_ * d)
    # The last block computes no text but its queries, keys and values.
    flops -= 18 * text * d**2
    flops += dual * (8 * image * d**2 + 4 * image**2 * d)
    flops += 2 * image * d * patch * (channels + model.out_channels)
    flops += 2 * text * d * model.config["joint_attention_dim"]
    flops += 2 * d * sum(norm.linear.out_features for norm in adaptive_norms(model))
    dtype = model.dtype if model.dtype != torch.float64 else torch.float32
    target = find_device(device)
    return Plan(
        pictures,
        grid,
        steps,
        target.name,
        sum(p.numel() * p.element_size() for p in model.parameters()),
        pictures * d * size * (own + 2 * blocks * all_),
        pictures * d * size * 2 * blocks * image,
        # Tokens before and after a sub-block, q, k and v twice, and the MLP's width.
        pictures * own * d * size * 12,
        pictures * flops,
        pictures * flops * steps / target.peak(dtype),
    )
