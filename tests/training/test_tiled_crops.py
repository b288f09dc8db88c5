"""Crops that are seen as tiles, as large pictures are."""

import torch

from mimdit import flow
from mimdit.presets import build
from mimdit.tile_loop import pool_tiles
from mimdit.tiling import Tiling
from training.batches import draw_cuts
from training.config import Settings
from training.step import flow_loss

CUTS = 2


def test_the_loss_is_that_of_the_tiles_of_a_large_picture() -> None:
    model = build("debug").randomize_(0).double().eval()
    generator = torch.Generator().manual_seed(0)
    x0, z_lq, noise = (
        0.3 * torch.randn(2, 48, 16, 32, generator=generator, dtype=torch.float64) for _ in range(3)
    )
    t = torch.tensor([1.0, 0.6], dtype=torch.float64)
    loss, routing = flow_loss(model, x0, z_lq, t, noise, CUTS)

    x_t, v = flow.interpolate(x0, noise, t), noise - x0
    tiling = Tiling((16, 32), (8, 16), ((0, 0), (0, 16), (8, 0), (8, 16)))
    chosen = model.mim.route(pool_tiles(model.pool_condition, z_lq, tiling, 3))
    torch.testing.assert_close(routing.inter, chosen.inter)
    assert torch.equal(routing.index, chosen.index)
    found = []
    for tile in range(4):
        lq, x, target = (tiling.cut(plane, slice(tile, tile + 1)) for plane in (z_lq, x_t, v))
        condition = model.encode_condition(lq, chosen)
        error = (model(x, 1000 * t, condition).sample - target).square().mean(dim=(1, 2, 3))
        weight = flow.loss_weight("log_affine", t, model.config["damage_std"])
        found.append((weight * error + 2e-3).log())
    torch.testing.assert_close(loss, torch.stack(found).mean())
    whole = flow_loss(model, x0, z_lq, t, noise)[0]
    assert abs(float((whole - loss).detach())) > 1e-6


def test_larger_crops_are_cut_in_their_share_of_the_steps() -> None:
    def cuts(side: int, tiled: float) -> list[int]:
        return [draw_cuts(i, (side, side), Settings(tiled=tiled)) for i in range(400)]

    assert set(cuts(16, 1.0)) == set(cuts(48, 0.0)) == {1}
    assert set(cuts(32, 1.0)) == {2} and set(cuts(48, 1.0)) == {2, 3}
    half = cuts(48, 0.5)
    assert 0.4 < half.count(1) / 400 < 0.6
    assert half == cuts(48, 0.5)
