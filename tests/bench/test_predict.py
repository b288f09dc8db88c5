"""Predictions count what the engine's cost model counts."""

import pytest
import torch

from bench.predict import Work, main, predict, work_of
from mimdit.engine.modulation import adaptive_norms
from mimdit.engine.plan import plan
from mimdit.presets import build
from mimkernels.devices import DEVICES


@pytest.fixture(scope="module")
def model():
    with torch.device("meta"):
        return build("debug", torch.bfloat16)


@pytest.mark.parametrize("latents", [(1, 48, 32, 32), (3, 48, 16, 40)])
def test_flops_are_those_of_the_plan(model, latents: tuple[int, int, int, int]) -> None:
    text = model.config["prompt_tokens"]
    tables = sum(norm.linear.out_features for norm in adaptive_norms(model))
    without_tables = plan(model, latents).step_flops - latents[0] * 2 * model.inner_dim * tables
    assert work_of(model, latents, text).flops == without_tables


def test_a_tile_more_than_a_wave_costs_a_wave() -> None:
    device = DEVICES["H200"]

    def seconds(rows: int) -> float:
        work = Work(products=((rows, 128 * 11, 4096),), attention=(), passes=())
        return predict(work, device, torch.bfloat16).products

    # 12 · 11 tiles fill the 132 multiprocessors once.
    assert seconds(128 * 12 + 1) == pytest.approx(2 * seconds(128 * 12))
    assert seconds(128) == seconds(128 * 12)


def test_bad_sizes_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--sizes", "500"])
    assert "multiples of 16" in capsys.readouterr().err
