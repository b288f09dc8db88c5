"""What a plan says, and what it may depend on."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from mimdit import accelerate
from mimdit.loading import assemble
from mimdit.pipeline import MiMDiTPipeline
from mimdit.planning import Fits, pass_bytes
from mimdit.presets import build
from mimdit.sampling import Denoiser

SIZES = [(256, 256), (300, 300), (400, 400), (500, 500), (400, 600)]


def pipeline(**settings: Any) -> MiMDiTPipeline:
    pipe = assemble(build("debug", **settings).randomize_(0).eval(), 1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def wide() -> MiMDiTPipeline:
    """Automatic tiles from 16 to 32 tokens a side."""
    return pipeline(pos_embed_max_size=32, sample_size=64)


def test_a_plan_tells_the_tile_that_will_be_cut(wide: MiMDiTPipeline) -> None:
    for size, cut in (((300, 300), (184, 184)), ((100, 300), (128, 184)), ((256, 90), (256, 128))):
        made = wide.plan(*size)
        assert tuple(n * made.factor for n in made.tiling.size) == cut
        assert made.tile == max(cut)


def test_memory_that_runs_out_is_not_asked_for_again(
    wide: MiMDiTPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every retry takes smaller tiles than the one before."""
    seen: list[tuple[int, int]] = []

    def hungry(self: Any, *_: object) -> torch.Tensor:
        seen.append(self.tiling.size)
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("mimdit.sampling.Denoiser.__call__", hungry)
    with pytest.warns(UserWarning, match="trying again"), pytest.raises(torch.OutOfMemoryError):
        wide(np.zeros((128, 128, 3), np.float32), 1)
    assert seen == [(32, 32), (16, 16)]


def test_fewer_tiles_a_pass_are_the_same_tiles(
    wide: MiMDiTPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def hungry(self: Any, latents: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        seen.append((self.tile_batch, self.tiling))
        if self.tile_batch > 1:
            raise torch.OutOfMemoryError("out of memory")
        return latents

    monkeypatch.setattr("mimdit.sampling.Denoiser.__call__", hungry)
    image = np.zeros((200, 300, 3), np.float32)
    # Sizes that no whole number of tokens has, too.
    for tile, overlap in ((70, 48), (0, 64)):
        seen.clear()
        with pytest.warns(UserWarning, match="trying again with 1 tiles"):
            wide(image, 1, tile=tile, tile_overlap=overlap, tile_batch=2)
        assert [batch for batch, _ in seen] == [2, 1]
        assert seen[0][1] == seen[1][1]


def test_later_pictures_take_what_memory_held(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline(pos_embed_max_size=32, sample_size=64)
    tried: list[int] = []

    def hungry(self: Denoiser, latents: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        tried.append(4 * max(self.tiling.size))
        if tried[-1] > 128:
            raise torch.OutOfMemoryError("out of memory")
        return latents

    monkeypatch.setattr("mimdit.sampling.Denoiser.__call__", hungry)
    image = np.zeros((200, 300, 3), np.float32)
    with pytest.warns(UserWarning, match="trying again"):
        first = pipe(image, 1, 4, output_type="np").images
    # The first of four grids fails once; the other three, and the next picture, do not.
    assert [side > 128 for side in tried] == [True, False, False, False, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = pipe(image, 1, 4, output_type="np").images
    assert len(tried) == 9 and max(tried[1:]) <= 128
    assert first.shape == second.shape == (1, 200, 300, 3)


def test_pictures_before_do_not_shrink_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine's buffers of other sizes are memory that it would give back."""
    pipe = accelerate(pipeline(pos_embed_max_size=32, sample_size=64))
    engine: Any = pipe.transformer.engine
    # Just enough for one of the largest tiles.
    enough = int(pass_bytes(pipe.transformer, 1, (64, 64)) / 0.7) + 100

    def free(_: torch.device) -> int:
        return enough - sum(w.buffers.bytes for w in engine.workspaces.values())

    monkeypatch.setattr("mimdit.planning.free_memory", free)
    wanted = {size: pipe.plan(*size).tiling for size in SIZES}
    pipe._fits = Fits()
    for size in SIZES:
        assert pipe.plan(*size).tiling == wanted[size]
        pipe(np.zeros((*size, 3), np.float32), 1)
        assert engine.workspaces
    # Less than that is too little for them, whatever an engine gives back.
    enough //= 2
    pipe._fits = Fits()
    assert pipe.plan(*SIZES[0]).tile < 256


@pytest.mark.parametrize(("sample_size", "tile"), [(64, 128), (48, 128), (2, 8)])
def test_tiles_are_no_larger_than_the_table_of_positions(sample_size: int, tile: int) -> None:
    """`debug` has places for 16 tokens a side, whatever size its configuration names."""
    pipe = pipeline(sample_size=sample_size)
    assert pipe.plan(200, 300).tile == tile
    out = pipe(np.zeros((130, 20, 3), np.float32), 1, output_type="np").images
    assert np.isfinite(out).all()


@pytest.mark.parametrize(("tile", "overlap", "asked"), [(64, 64, 64), (70, 64, 64), (8, 64, 8)])
def test_an_overlap_is_named_in_pixels(
    wide: MiMDiTPipeline, tile: int, overlap: int, asked: int
) -> None:
    message = rf"tile_overlap: expected 0 to less than the tile \({asked} pixels\), got {overlap}"
    with pytest.raises(ValueError, match=message):
        wide.plan(300, 300, tile=tile, tile_overlap=overlap)
    assert wide.plan(300, 300, tile=tile, tile_overlap=asked - 1).tile == asked
