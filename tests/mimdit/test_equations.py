"""MiM-DiT written once more from its equations, naively, against the model in every ablation.

Shapes inside: a picture's tokens are [K,C], without batch and head axes; loops do the rest.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.fft import dctn
from torch import Tensor
from torch.nn import functional as F

from mimdit.presets import build
from mimdit.transformer import MiMDiTTransformer2DModel

Weights = dict[str, Tensor]
Grid = tuple[int, int]

# Width 192 against d=128, and two or more heads in every attention: equal sizes would hide faults.
SIZES = {
    "num_attention_heads": 6,
    "caption_projection_dim": 192,
    "mim_dim": 128,
    "pos_embed_max_size": 20,
}
ABLATIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "one expert": {"experts": 1, "top_k": 1},
    "three of five": {"experts": 5, "top_k": 3},
    **{f"all {kind}": {"groups": (kind,) * 4} for kind in ("spatial", "channel", "swin", "se")},
    "inter sparse": {"inter": "sparse"},
    "intra dense": {"intra": "dense"},
    "inter sparse, intra dense": {"inter": "sparse", "intra": "dense"},
    "renormalized": {"renormalize": True},
    "full width": {"mim_dim": 192},
    "text alone modulates": {"pooled_condition": False},
    "no statistics of the picture": {"picture_statistics": False},
    "no qk norm": {"qk_norm": None},
    "single attention": {"dual_attention_layers": ()},
    "single attention, no qk norm": {"dual_attention_layers": (), "qk_norm": None},
    "dual last block": {"dual_attention_layers": (0, 1)},
}
ablations = pytest.mark.parametrize("options", ABLATIONS.values(), ids=ABLATIONS.keys())


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | float = 0.0) -> Tensor:
    return torch.softmax(q @ k.T * scale + bias, dim=-1) @ v


def heads(width: int, each: int) -> list[slice]:
    return [slice(start, start + each) for start in range(0, width, each)]


def spatial(p: Weights, u: Tensor, y: Tensor, grid: Grid) -> Tensor:
    q, k, v = (u @ p["qkv_weight"].T + p["qkv_bias"]).chunk(3, dim=-1)
    out = [attention(q[:, h], k[:, h], v[:, h], 64**-0.5) for h in heads(u.shape[1], 64)]
    return torch.cat(out, dim=-1) @ p["proj_weight"].T + p["proj_bias"]


def channel(p: Weights, u: Tensor, y: Tensor, grid: Grid) -> Tensor:
    picture = (u @ p["qkv_weight"].T).T.reshape(1, -1, *grid)
    taps = p["dwconv_weight"].unsqueeze(1)
    picture = F.conv2d(picture, taps, padding=1, groups=taps.shape[0])[0]
    q, k, v = picture.flatten(1).chunk(3, dim=0)  # each [d,K]
    q, k = (x / x.square().sum(1, keepdim=True).sqrt().clamp(min=1e-12) for x in (q, k))
    each = zip(heads(u.shape[1], 64), p["temperature"], strict=True)
    out = [torch.softmax(q[h] @ k[h].T * temperature, dim=-1) @ v[h] for h, temperature in each]
    return torch.cat(out).T @ p["proj_weight"].T


def windows(p: Weights, x: Tensor, grid: Grid, shift: int) -> Tensor:
    """Attention among the real tokens of a window.

    Shifting the borders by half a window, instead of rolling the picture, leaves cut windows at
    the edges: what padding and the region mask amount to.
    """
    q, k, v = (x @ p["qkv_weight"].T + p["qkv_bias"]).chunk(3, dim=-1)
    places = [divmod(k, grid[1]) for k in range(len(x))]
    window = [((row + shift) // 8, (column + shift) // 8) for row, column in places]
    out = torch.zeros_like(x)
    for one in set(window):
        ids = [k for k in range(len(x)) if window[k] == one]
        inside = [places[k] for k in ids]
        offsets = [[(a - c + 7) * 15 + b - d + 7 for c, d in inside] for a, b in inside]
        bias = p["bias_table"][torch.tensor(offsets)]  # [query, key, head]
        for i, h in enumerate(heads(x.shape[1], 32)):
            out[ids, h] = attention(q[ids, h], k[ids, h], v[ids, h], 32**-0.5, bias[..., i])
    return out @ p["proj_weight"].T + p["proj_bias"]


def swin(p: Weights, u: Tensor, y: Tensor, grid: Grid) -> Tensor:
    plain, shifted = ({name: w[i] for name, w in p.items()} for i in (0, 1))
    a = windows(plain, u, grid, 0)
    return a + windows(shifted, F.layer_norm(y + a, y.shape[-1:]), grid, 4)


def se(p: Weights, u: Tensor, y: Tensor, grid: Grid) -> Tensor:
    hidden = torch.relu(p["fc1_weight"] @ u.mean(0) + p["fc1_bias"])
    return u * torch.sigmoid(p["fc2_weight"] @ hidden + p["fc2_bias"])


EXPERTS = {"spatial": spatial, "channel": channel, "swin": swin, "se": se}


def route(config: Any, w: Weights, layer: int, u: Tensor) -> Tensor:
    """w_g · p_gj of every sub-expert, zero where not taken: [G,E]."""
    mean = u.mean(0) - w["mim.running_mean"][layer]
    total = torch.zeros(len(config["groups"]), config["experts"], dtype=u.dtype)
    inter = torch.softmax(w["mim.inter_router"][layer] @ mean, dim=0)
    for g in range(len(inter)):
        if config["inter"] == "sparse" and inter[g] < inter.max():
            continue
        p = torch.softmax(w["mim.intra_router"][layer, g] @ mean, dim=0)
        taken = sorted(range(len(p)), key=lambda j: -p[j].item())[: config["top_k"]]
        scale = p[taken].sum() if config["renormalize"] else 1
        if config["intra"] == "dense":
            taken, p, scale = list(range(len(p))), torch.ones_like(p), len(p)
        for j in taken:
            total[g, j] = inter[g] * p[j] / scale
    return total


def mim(model: MiMDiTTransformer2DModel, z: Tensor, grid: Grid, layer: int) -> Any:
    """Tokens m_l [K,D] of one picture, and the weights of `route`, [G,E]."""
    w = model.state_dict()
    y = z @ w["mim.down_weight"][layer].T + w["mim.down_bias"][layer]
    u = F.layer_norm(y, y.shape[-1:], w["mim.norm_weight"][layer], w["mim.norm_bias"][layer])
    total, given = y, route(model.config, w, layer, u)
    for g, kind in enumerate(model.config["groups"]):
        bank = {n.split(".")[-1]: v[layer] for n, v in w.items() if f"mim.banks.{g}." in n}
        for j in range(model.config["experts"]):
            if given[g, j] != 0:
                expert = {name: tensor[j] for name, tensor in bank.items()}
                total = total + given[g, j] * EXPERTS[kind](expert, u, y, grid)
    m = total @ w["mim.zero_weight"][layer].T + w["mim.zero_bias"][layer]
    return m, given


def powers(latents: Tensor) -> Tensor:
    """Mean squares of a picture's cosine coefficients, 8×8 pixels every 4, [3·64]."""
    mix = torch.tensor([[1, 1, 1], [1, 0, -1], [1, -2, 1]]).double()
    mix = mix / mix.norm(dim=1, keepdim=True)
    planes = torch.einsum("oc,chw->ohw", mix, F.pixel_shuffle(latents, 4)).numpy()
    height, width = planes.shape[1:]
    blocks = [
        dctn(planes[:, y : y + 8, x : x + 8], axes=(1, 2), norm="ortho")
        for y in range(0, height - 7, 4)
        for x in range(0, width - 7, 4)
    ]
    return torch.from_numpy(np.mean(np.square(blocks), axis=0)).flatten()


def shares(latents: Tensor) -> Tensor:
    """Of cells of 4×4 pixels by tone, 16 bins: red, green, blue, the least, the greatest, [80]."""
    cells = latents.unflatten(0, (3, 16)).flatten(2)
    least, greatest = cells.amin((0, 1)), cells.amax((0, 1))
    found = []
    for plane in (*cells.mean(1), least, greatest):
        counts = torch.zeros(17, dtype=torch.float64)
        for tone in ((logarithmic(plane) + 1) / 2).clamp(0, 1) * 15:
            low = int(tone)
            counts[low] += low + 1 - tone
            counts[low + 1] += tone - low
        found.append(counts[:16] / plane.numel())
    return torch.cat(found)


def pooled_condition(model: MiMDiTTransformer2DModel, z: Tensor, lq: Tensor) -> Tensor | float:
    """What one picture's tokens z [K,D] and latents [c,h,w] add to the pooled text, [1,P]."""
    w, seen = model.state_dict(), []
    if "condition_embedder.weight" not in w:
        return 0.0
    for layer in range(len(w["mim.running_mean"])):
        y = z @ w["mim.down_weight"][layer].T + w["mim.down_bias"][layer]
        u = F.layer_norm(y, y.shape[-1:], w["mim.norm_weight"][layer], w["mim.norm_bias"][layer])
        seen.append((u.mean(0) - w["mim.running_mean"][layer], (u**2).mean(0)))
    means, squares = (torch.cat(part) for part in zip(*seen, strict=True))
    even = [F.layer_norm(x, x.shape) for x in (means, torch.log(torch.sqrt(squares + 1e-4)))]
    found = torch.cat(even)[None] @ w["condition_embedder.weight"].T + w["condition_embedder.bias"]
    if "condition_embedder.statistics.weight" in w:
        read = [torch.log10(powers(lq) + 1e-6) + 3, torch.sqrt(16 * (shares(lq) + 1e-4))]
        found = found + torch.cat(read)[None] @ w["condition_embedder.statistics.weight"].T
    return found


def joint_attention(attn: Any, image: Tensor, text: Tensor | None = None) -> Tensor:
    """Before the output projections: image [N,D] with text [T,D] gives [N+T,D]."""
    streams = [(image, "to_{}", "norm_{}")]
    if text is not None:
        streams.append((text, "add_{}_proj", "norm_added_{}"))
    parts = []
    for name in "qkv":
        part = []
        for tokens, linear, norm in streams:
            rms = getattr(attn, norm.format(name), None) or torch.nn.Identity()
            x = getattr(attn, linear.format(name))(tokens)
            part.append([rms(x[:, h]) for h in heads(x.shape[1], 32)])
        parts.append([torch.cat(head) for head in zip(*part, strict=True)])
    return torch.cat([attention(*qkv, 32**-0.5) for qkv in zip(*parts, strict=True)], dim=-1)


def sd3_block(block: Any, x: Tensor, text: Tensor, temb: Tensor, m: Tensor) -> Any:
    """One picture through one block: x [K,D], text [T,D], temb [1,D], m [K,D]."""
    # AdaLN-Zero gives the normalised tokens, the gate, then shift, scale and gate of the MLP.
    own, gate, shift, scale, gate_mlp, *dual = block.norm1(x[None], emb=temb)
    if block.context_pre_only:
        words, ada = block.norm1_context(text[None], temb), None
    else:
        words, *ada = block.norm1_context(text[None], emb=temb)
    # Eq. 5: image and conditioning tokens as one, attended with the text; then m is dropped.
    out = joint_attention(block.attn, torch.cat([own[0], m]), words[0])
    x = x + gate * block.attn.to_out[0](out[: len(x)])
    if dual:
        x = x + dual[1] * block.attn2.to_out[0](joint_attention(block.attn2, dual[0][0]))
    x = x + gate_mlp * block.ff(block.norm2(x) * (1 + scale) + shift)
    if ada:
        gate, shift, scale, gate_mlp = ada
        text = text + gate * block.attn.to_add_out(out[2 * len(x) :])
        text = text + gate_mlp * block.ff_context(block.norm2_context(text) * (1 + scale) + shift)
    return x, text


def network(model: MiMDiTTransformer2DModel, x: Tensor, embedding: Any, tokens: Any) -> Tensor:
    """SD3 for one picture x [1,c,h,w]; embedding: t [1], text [1,T,C], pooled [1,P]; tokens: m."""
    t, words, pooled = embedding
    temb = model.time_text_embed(t, pooled)
    image, text = model.pos_embed(x)[0], model.context_embedder(words)[0]
    for block, m in zip(model.transformer_blocks, tokens, strict=True):
        image, text = sd3_block(block, image, text, temb, m)
    out = torch.zeros(1, model.config["out_channels"], *x.shape[2:], dtype=x.dtype)
    for k, token in enumerate(model.proj_out(model.norm_out(image[None], temb))[0]):
        row, column = divmod(2 * k, x.shape[-1])
        patch = token.reshape(2, 2, -1).permute(2, 0, 1)
        out[0, :, 2 * row : 2 * row + 2, column : column + 2] = patch
    return out


def logarithmic(z: Tensor) -> Tensor:
    """How the network sees damaged pixels from −1 to 1: log(1 + 20·u) of u from 0 to 1, odd."""
    u = (z + 1) / 2
    return (
        2 * torch.sign(u) * torch.log(1 + 20 * u.abs()) / torch.log(torch.tensor(21.0).double()) - 1
    )


def drawn(**options: Any) -> MiMDiTTransformer2DModel:
    torch.manual_seed(1)
    model = build("debug", **SIZES | options).randomize_(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".norm_" in name:  # qk norms start at one, so those of text and image were equal
                parameter.uniform_(0.5, 2)
            if name.endswith("_router"):  # milder, so that every group has weight
                parameter.mul_(0.1)
    return model.eval()


def inputs(height: int, width: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """x, z_lq and (t, text, pooled) of two pictures; z_lq of unlike colours, so routes differ."""
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 2, 48, height, width, generator=g).double()
    z = z + 2 * torch.randn(2, 48, 1, 1, generator=g).double()
    text, pooled = torch.randn(2, 3, 32, generator=g), torch.randn(2, 16, generator=g)
    return x, z, (torch.tensor([300.0, 900.0]), text.double(), pooled.double())


def taken(model: MiMDiTTransformer2DModel, routing: Any) -> Tensor:
    """w_g · p_gj of the routing that the model took: [L,B,G,E]."""
    zeros = torch.zeros(*routing.inter.shape, model.config["experts"], dtype=torch.float64)
    return zeros.scatter(-1, routing.index, (routing.inter[..., None] * routing.intra).double())


@ablations
@pytest.mark.parametrize("size", [(12, 20), (20, 36)], ids=["6x10", "10x18"])
@torch.no_grad()
def test_model_follows_the_equations(options: dict[str, Any], size: Grid) -> None:
    model = drawn(**options).double()
    x, z, embedding = inputs(*size)
    grid = (size[0] // 2, size[1] // 2)
    condition = model.encode_condition(z)
    weights = taken(model, condition.routing)
    expected = []
    for b, picture in enumerate(model.pos_embed(logarithmic(z))):
        tokens = []
        for layer in range(2):
            m, own = mim(model, picture, grid, layer)
            torch.testing.assert_close(weights[layer, b], own, rtol=0, atol=1e-12)
            torch.testing.assert_close(condition.tokens[layer][b], m, rtol=0, atol=1e-10)
            tokens.append(m)
        one = slice(b, b + 1)
        t, text, pooled = (e[one] for e in embedding)
        pooled = pooled + pooled_condition(model, picture, z[b])
        expected.append(network(model, x[one], (t, text, pooled), tokens))
    for literal in (True, False):
        model.use_literal_attention(literal)
        output = model.predict(x, embedding[0], condition, *embedding[1:])
        torch.testing.assert_close(output, torch.cat(expected), rtol=0, atol=1e-10)


@pytest.mark.parametrize("inter", ["dense", "sparse"])
@torch.no_grad()
def test_pictures_of_a_batch_are_run_each_by_its_own_experts(inter: str) -> None:
    model = drawn(inter=inter).double()
    x, z, (t, text, pooled) = inputs(12, 20)
    together = model.encode_condition(z)
    used = taken(model, together.routing) != 0
    assert (used[:, 0] != used[:, 1]).any()
    output = model.predict(x, t, together, text, pooled)
    for one in (slice(0, 1), slice(1, 2)):
        alone = model.encode_condition(z[one])
        assert torch.equal(taken(model, alone.routing) != 0, used[:, one])
        single = model.predict(x[one], t[one], alone, text[one], pooled[one])
        torch.testing.assert_close(output[one], single, rtol=0, atol=1e-12)


@ablations
def test_ablation_survives_saving_and_loading(options: dict[str, Any], tmp_path: Path) -> None:
    model = drawn(**options)
    model.save_pretrained(tmp_path)
    loaded = MiMDiTTransformer2DModel.from_pretrained(tmp_path)
    saved, read = (json.loads(m.to_json_string()) for m in (model, loaded))
    del read["_name_or_path"]  # the folder
    assert read == saved
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
