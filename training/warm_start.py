"""A start for models trained from scratch: attention that already looks at the same place.

Nothing pretrained needs protection there, so ZeroLinear need not be zero. What such a model must
first learn is to find, for each image token, the conditioning token of the same place, and to see
the fine detail of a patch next to its brightness. This start gives it both.
"""

import math
from typing import cast

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.attention_processor import Attention
from einops import rearrange
from torch import Tensor, nn

from mimdit.transformer import MiMDiTTransformer2DModel

# Sharpness of the match in each of the first heads: the same token, then its neighbourhood.
_SCALES = (5.0, 4.0, 3.0)


@torch.no_grad()
def align_positions_(model: MiMDiTTransformer2DModel) -> MiMDiTTransformer2DModel:
    """Initialise a pixel-codec model in place.

    - Patch embedding: cosine coefficients, in the channels that high sincos frequencies, the
      position channels, leave free.
    - MiM: W_down keeps half of the position channels and a slice of content; ZeroLinear is its
      transpose. The slices of successive blocks cover all content.
    - Joint attention: all heads but the last start as a match of position channels.
    - Blocks start close to the identity; the output starts at zero.
    """
    width, head = model.inner_dim, model.config["attention_head_dim"]
    places = _position_channels(width, head)
    content = torch.tensor([i for i in range(width) if i not in set(places.tolist())])
    directions = _quiet_directions(model, content)
    _embed_patches(model, content, directions)
    for layer, module in enumerate(model.transformer_blocks):
        block = cast(JointTransformerBlock, module)
        _align_mim(model, layer, places[::2], content, directions)
        _align_attention(block.attn, head, places)
        for norm in (block.norm1, block.norm1_context):
            torch.nn.init.normal_(norm.linear.weight, std=0.01)
            torch.nn.init.zeros_(norm.linear.bias)
        # Chunks of AdaLN-Zero: shift, scale, gate (attention), shift, scale, gate (MLP).
        block.norm1.linear.bias.view(-1, width)[[2, 5]] = 1
        if not block.context_pre_only:
            block.norm1_context.linear.bias.view(-1, width)[[2, 5]] = 1
        cast(nn.Linear, block.ff.net[2]).weight.mul_((2 * len(model.transformer_blocks)) ** -0.5)
    torch.nn.init.zeros_(model.proj_out.weight)
    torch.nn.init.zeros_(model.proj_out.bias)
    return model


def _position_channels(width: int, head: int) -> Tensor:
    """Channels of the highest sincos frequencies, as many as a head has."""
    # Diffusers' table: [sin, cos] of one axis, then of the other; width/4 frequencies each.
    quarter = width // 4
    first = torch.arange(head // 4)
    return torch.cat([first + i * quarter for i in range(4)])


def _quiet_directions(model: MiMDiTTransformer2DModel, content: Tensor) -> Tensor:
    """Orthonormal rows [n,n] in the content channels, those that positions move least first."""
    table = cast(Tensor, model.pos_embed.pos_embed)[0][:, content]
    moved = torch.linalg.svd(table - table.mean(0), full_matrices=True)[2]
    return moved.flip(0)


def _embed_patches(model: MiMDiTTransformer2DModel, content: Tensor, directions: Tensor) -> None:
    """Cosine coefficients of a patch, low frequencies first, along the quietest directions.

    Pictures have amplitudes that fall as 1/frequency; gains that rise with it even them out.
    """
    weight = model.pos_embed.proj.weight  # [D, 3·f·f, p, p]
    patch = weight.shape[-1]
    factor = round((weight.shape[1] // 3) ** 0.5)
    size = patch * factor
    place, wave = torch.arange(size) + 0.5, torch.arange(size)[:, None]
    cosine = torch.cos(math.pi / size * place * wave) * (2 / size) ** 0.5
    cosine[0] *= 0.5**0.5
    order = sorted((u + v, u, v) for u in range(size) for v in range(size))
    waves = torch.stack([(1 + s) / 6 * torch.outer(cosine[u], cosine[v]) for s, u, v in order])
    basis = torch.einsum("nyx,cd->ncdyx", waves, torch.eye(3)).flatten(0, 1)
    basis = rearrange(
        basis, "n c (y f) (x g) -> n (c f g) y x", f=factor, g=factor, y=patch, x=patch
    )
    kept = min(len(content), len(basis))
    flat = directions[:kept].T @ basis[:kept].flatten(1)
    weight.zero_()
    weight[content] = flat.view(len(content), *weight.shape[1:])
    assert model.pos_embed.proj.bias is not None
    model.pos_embed.proj.bias.zero_()


def _align_mim(
    model: MiMDiTTransformer2DModel, layer: int, places: Tensor, content: Tensor, directions: Tensor
) -> None:
    mim = model.mim
    down = torch.zeros_like(mim.down_weight[layer])
    kept = places[: len(down)]
    down[torch.arange(len(kept)), kept] = 1
    room = len(down) - len(kept)
    taken = torch.arange(layer * room, (layer + 1) * room) % len(content)
    down[len(kept) :, content] = directions[taken]
    mim.down_weight[layer] = down
    mim.zero_weight[layer] = down.T
    for bank in mim.banks:
        if hasattr(bank, "proj_weight"):
            # Experts start as small corrections of y.
            cast(Tensor, bank.proj_weight)[layer].mul_(mim.layers**-0.5)


def _align_attention(attn: Attention, head: int, places: Tensor) -> None:
    q, k = (cast(nn.Linear, part) for part in (attn.to_q, attn.to_k))
    for h, scale in enumerate(_SCALES[: attn.heads - 1]):
        here = slice(h * head, (h + 1) * head)
        for linear in (q, k):
            linear.weight[here] = 0
            linear.weight[here, places] = torch.eye(head) * scale
            linear.bias[here] = 0
    cast(nn.Linear, cast(nn.ModuleList, attn.to_out)[0]).weight.mul_(0.3)
