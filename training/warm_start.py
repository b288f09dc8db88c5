"""A start for models trained from scratch: attention that already finds the same place.

Nothing pretrained needs protection there, so ZeroLinear need not be zero. What such a model must learn
first is to find, for each image token, the conditioning token of the same place; this start gives it.
"""

import math

import torch
from torch import Tensor

from mimdit.transformer import MiMDiTTransformer2DModel

# Sharpness of the match in each of the first heads: the same token, then its neighbourhood.
_SCALES = (4.0, 3.0, 2.0)


@torch.no_grad()
def align_positions_(model: MiMDiTTransformer2DModel) -> MiMDiTTransformer2DModel:
    """Initialise a pixel-codec model in place.

    - Patch embedding: an isometry into the channels that the high sincos frequencies leave free.
    - MiM: W_down keeps these position channels and a slice of content (another slice in every block),
      ZeroLinear is its transpose.
    - Joint attention: all heads but the last start as a match of position channels.
    - Blocks start close to the identity; the output starts at zero.
    """
    width, head = model.inner_dim, model.config["attention_head_dim"]
    places = _position_channels(width, head)
    content = torch.tensor([i for i in range(width) if i not in set(places.tolist())])
    _embed_patches(model, content)
    for layer, block in enumerate(model.transformer_blocks):
        _align_mim(model, layer, places, content)
        for h, scale in enumerate(_SCALES[: model.config["num_attention_heads"] - 1]):
            rows = slice(h * head, (h + 1) * head)
            for linear in (block.attn.to_q, block.attn.to_k):
                linear.weight[rows] = 0
                linear.weight[rows, places] = torch.eye(head) * scale
                linear.bias[rows] = 0
        for norm in (block.norm1, block.norm1_context):
            torch.nn.init.normal_(norm.linear.weight, std=0.01)
            torch.nn.init.zeros_(norm.linear.bias)
        # Chunks of AdaLN-Zero: shift, scale, gate (attention), shift, scale, gate (MLP).
        block.norm1.linear.bias.view(-1, width)[[2, 5]] = 1
        if not block.context_pre_only:
            block.norm1_context.linear.bias.view(-1, width)[[2, 5]] = 1
        damp = (2 * len(model.transformer_blocks)) ** -0.5
        block.attn.to_out[0].weight.mul_(damp)
        block.ff.net[2].weight.mul_(damp)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def _position_channels(width: int, head: int) -> Tensor:
    """Channels of the highest sincos frequencies; a quarter of a head for each of sin/cos × axis."""
    # Diffusers' table: [sin, cos] of one axis, then of the other; width/4 frequencies each.
    quarter = width // 4
    first = torch.arange(head // 4)
    return torch.cat([first + i * quarter for i in range(4)])


def _embed_patches(model: MiMDiTTransformer2DModel, content: Tensor) -> None:
    weight = model.pos_embed.proj.weight
    flat = torch.zeros(weight.shape[0], weight[0].numel())
    basis = torch.empty(len(content), flat.shape[1])
    flat[content] = torch.nn.init.orthogonal_(basis)
    weight.copy_(flat.view_as(weight))
    assert model.pos_embed.proj.bias is not None
    model.pos_embed.proj.bias.zero_()


def _align_mim(
    model: MiMDiTTransformer2DModel, layer: int, places: Tensor, content: Tensor
) -> None:
    mim = model.mim
    dim = mim.down_weight.shape[1]
    room = max(dim - len(places), 0)
    # Slices of one orthonormal basis: the blocks together see all of the content.
    generator = torch.Generator().manual_seed(layer * room // len(content))
    basis = torch.linalg.qr(torch.randn(len(content), len(content), generator=generator))[0]
    start = layer * room % len(content)
    rows = [(start + i) % len(content) for i in range(room)]
    down = torch.zeros(dim, mim.down_weight.shape[2])
    kept = places[:dim]
    down[torch.arange(len(kept)), kept] = 1
    down[len(kept) :, content] = basis[rows]
    mim.down_weight[layer] = down
    mim.zero_weight[layer] = down.T
    for bank in mim.banks:
        if hasattr(bank, "proj_weight"):
            # Experts start as small corrections of y.
            bank.proj_weight[layer].mul_(1 / math.sqrt(mim.layers))
