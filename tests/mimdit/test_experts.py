"""Each expert bank against a plain per-picture computation in float64."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mimdit.experts import (
    EXPERTS,
    ChannelExperts,
    SEExperts,
    SpatialExperts,
    SwinExperts,
)
from mimkernels import expert_combine
from mimkernels.window_attention.reference import relative_position, window_regions

DIM, EXPERT_COUNT, LAYERS = 64, 3, 2
GRIDS = [(8, 8), (5, 7), (16, 9), (1, 1)]


def filled(kind: str) -> torch.nn.Module:
    torch.manual_seed(1)
    bank = EXPERTS[kind](LAYERS, EXPERT_COUNT, DIM).double()
    with torch.no_grad():
        for p in bank.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return bank


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    scores = q @ k.T / q.shape[1] ** 0.5
    return (scores if bias is None else scores + bias).softmax(-1) @ v


def spatial(b: SpatialExperts, u: Tensor, y: Tensor, grid: tuple[int, int], i: tuple) -> Tensor:
    q, k, v = F.linear(u, b.qkv_weight[i], b.qkv_bias[i]).split(DIM, -1)
    heads = [attention(*(x[:, h : h + 64] for x in (q, k, v))) for h in range(0, DIM, 64)]
    return F.linear(torch.cat(heads, 1), b.proj_weight[i], b.proj_bias[i])


def channel(b: ChannelExperts, u: Tensor, y: Tensor, grid: tuple[int, int], i: tuple) -> Tensor:
    planes = (u @ b.qkv_weight[i].T).T.reshape(1, 3 * DIM, *grid)
    planes = F.conv2d(planes, b.dwconv_weight[i][:, None], padding=1, groups=3 * DIM)
    q, k, v = planes.reshape(3, DIM, -1)
    q = q / q.norm(dim=1, keepdim=True).clamp(min=1e-12)
    k = k / k.norm(dim=1, keepdim=True).clamp(min=1e-12)
    weights = (q @ k.T * b.temperature[i][0]).softmax(-1)
    return (weights @ v).T @ b.proj_weight[i].T


def swin(b: SwinExperts, u: Tensor, y: Tensor, grid: tuple[int, int], i: tuple) -> Tensor:
    """Token by token: two tokens attend if they share a window of the shifted plane."""
    m = b.window
    rows = torch.arange(grid[0]).repeat_interleave(grid[1])
    columns = torch.arange(grid[1]).repeat(grid[0])

    def one(x: Tensor, shift: int, n: int) -> Tensor:
        q, k, v = F.linear(x, b.qkv_weight[i][n], b.qkv_bias[i][n]).split(DIM, -1)
        # Without wrapping around, a shift by s moves the window borders to s, s + M, …
        wy, wx = (
            (rows - shift).div(m, rounding_mode="floor"),
            (columns - shift).div(m, rounding_mode="floor"),
        )
        same = (wy[:, None] == wy[None]) & (wx[:, None] == wx[None])
        dy = (rows[:, None] - rows[None] + m - 1).clamp(0, 2 * m - 2)
        dx = (columns[:, None] - columns[None] + m - 1).clamp(0, 2 * m - 2)
        heads = []
        for h in range(DIM // 32):
            bias = b.bias_table[i][n][:, h][dy * (2 * m - 1) + dx]
            bias = bias.masked_fill(~same, float("-inf"))
            part = slice(h * 32, (h + 1) * 32)
            heads.append(attention(q[:, part], k[:, part], v[:, part], bias))
        return F.linear(torch.cat(heads, 1), b.proj_weight[i][n], b.proj_bias[i][n])

    a = one(u, 0, 0)
    return a + one(F.layer_norm(y + a, (DIM,)), m // 2, 1)


def se(b: SEExperts, u: Tensor, y: Tensor, grid: tuple[int, int], i: tuple) -> Tensor:
    hidden = F.linear(u.mean(0), b.fc1_weight[i], b.fc1_bias[i]).relu()
    return u * F.linear(hidden, b.fc2_weight[i], b.fc2_bias[i]).sigmoid()


ORACLES = {"spatial": spatial, "channel": channel, "swin": swin, "se": se}


@pytest.mark.parametrize("grid", GRIDS, ids=lambda g: f"{g[0]}x{g[1]}")
@pytest.mark.parametrize("kind", list(EXPERTS))
def test_bank_equals_plain_computation(kind: str, grid: tuple[int, int]) -> None:
    bank = filled(kind)
    u, y = torch.randn(2, 2, grid[0] * grid[1], DIM, dtype=torch.float64)
    index = torch.tensor([[2, 0], [1, 2]])
    with torch.no_grad():
        for j in range(2):
            gate = F.one_hot(torch.tensor([j, j]), 2).double()
            added, left = bank(u, y, grid, index, gate, slice(1, 2))
            parts = (left.slots, left.weight, index, gate) if left is not None else None
            if parts is not None:
                added = expert_combine(*parts, bias=left.bias, residual=added)
            for b in range(2):
                expected = ORACLES[kind](bank, u[b], y[b], grid, (1, int(index[b, j])))
                torch.testing.assert_close(added[b], expected, rtol=0, atol=1e-11)


def test_relative_position_is_swins() -> None:
    place = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
    offset = place[:, :, None] - place[:, None, :] + 3
    expected = offset[0] * 7 + offset[1]
    assert torch.equal(relative_position(4, torch.device("cpu")), expected)


def test_padding_and_wrapped_rows_are_apart() -> None:
    region = window_regions((8, 6), 4, (2, 2), torch.device("cpu"))
    # The last window of an 8×6 plane, padded to 8×8 and shifted by 2, holds padding and wrapped
    # tokens.
    assert len(set(region[-1].tolist())) > 1
    assert len(set(region[0].tolist())) == 1


def test_width_that_heads_do_not_divide() -> None:
    with pytest.raises(ValueError, match="multiple of 64"):
        SpatialExperts(1, 2, 96)
