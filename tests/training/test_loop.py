import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mimdit import flow
from mimdit.cli.init import main as init_command
from mimdit.loading import load_pipeline
from mimdit.presets import build, pixel_codec
from tests.mimdit.sd35_folder import write_folder
from tests.training.short_runs import quick, settings
from training.batches import DrawnPairs
from training.loop import Settings, balance_loss, sample_times, stage_of, train
from training.optim import optimizers
from training.step import flow_loss
from training.train import main as train_command
from training.warm_start import align_positions_


def test_run_checkpoint_and_resume(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = align_positions_(build("tiny", num_layers=2))
    before = model.mim.inter_router.detach().clone()
    train(model, pixel_codec(), settings(tmp_path, 4))
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 4
    assert -10 < rows[-1]["loss"] < 10
    assert sum(rows[-1]["inter"]) == pytest.approx(1, abs=1e-3)
    assert not torch.equal(model.mim.inter_router, before)

    again = build("tiny", num_layers=2)
    train(again, pixel_codec(), settings(tmp_path, 6), resume="latest")
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [4, 6]


def test_running_means_are_those_of_pictures_at_the_centre(tmp_path: Path) -> None:
    """As restoration has them; training draws places all over the position table."""
    model = build("tiny", num_layers=1, mim_dim=64)
    chosen = replace(settings(tmp_path, 12), stages=((64, 2, 1.0),), learning_rate=1e-12)
    train(model, pixel_codec(), chosen)
    source = DrawnPairs(64, seed=chosen.seed, mixtures=chosen.mixtures)
    damaged = torch.stack([source[i]["damaged"] for i in range(24)])
    with torch.no_grad():
        pooled = model.pool_condition(pixel_codec().encode(2 * damaged - 1))
    # Training computes them in bfloat16.
    expected = model.mim.means(pooled).mean(1)
    torch.testing.assert_close(model.mim.running_mean, expected, rtol=0, atol=5e-3)


def test_matrices_of_the_blocks_go_to_muon() -> None:
    model = build("debug")
    muon, adamw = optimizers(model, 1e-3, 2e-3)
    names = {id(p): n for n, p in model.named_parameters()}
    matrices = {names[id(p)] for p in muon.param_groups[0]["params"]}
    rest = {names[id(p)] for p in adamw.param_groups[0]["params"]}
    assert matrices | rest == set(names.values())
    assert not matrices & rest
    assert "transformer_blocks.0.attn.to_q.weight" in matrices
    assert {"mim.down_weight", "proj_out.weight", "transformer_blocks.0.norm1.linear.weight"} < rest
    model.transformer_blocks.requires_grad_(False)
    assert [type(o).__name__ for o in optimizers(model, 1e-3, 2e-3)] == ["AdamW"]


def test_accumulation_moves_the_weights_once_a_step(tmp_path: Path) -> None:
    model = align_positions_(build("tiny", num_layers=2))
    s = replace(settings(tmp_path, 2), accumulation=2)
    train(model, pixel_codec(), s)
    state = torch.load(tmp_path / "checkpoint-2/optimizer_1.bin", weights_only=True)
    assert state["state"][0]["step"] == 2


def test_velocity_errors_weighed_by_the_square_of_the_time() -> None:
    """As the error of x0: x̂0 − x0 = t·(v − v̂)."""
    model = build("debug", prediction_type="velocity", out_channels=48).randomize_(0)
    x0, z_lq, noise = 0.3 * torch.randn(3, 2, 48, 8, 8, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0.9, 0.2])
    with torch.no_grad():
        found = flow_loss(model, x0, z_lq, t, noise, weighting="sigma_squared")[0]
        x_t = flow.interpolate(x0, noise, t)
        v = model(x_t, 1000 * t, model.encode_condition(z_lq)).sample
    expected = (x_t - flow.spread(t, v) * v - x0).square().mean()
    torch.testing.assert_close(found, expected)


def test_gradients_are_not_clipped_at_zero(tmp_path: Path) -> None:
    weights = []
    for clip in (0.0, 1e9, 1e-3):
        torch.manual_seed(0)
        run = quick(tmp_path / str(clip), 1, clip=clip, optimizer="adam", warmup=0)
        train(build("debug").randomize_(0), pixel_codec(), run)
        state = torch.load(tmp_path / str(clip) / "checkpoint-1/optimizer.bin", weights_only=True)
        weights.append(state["state"][0]["exp_avg"])
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_eight_bit_adam_goes_on_exactly(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    finals = []
    for name, parts in (("whole", (4,)), ("parts", (2, 4))):
        for i, steps in enumerate(parts):
            torch.manual_seed(0)
            run = quick(tmp_path / name, steps, optimizer="adam8bit", schedule="constant")
            resume = "latest" if i else None
            train(build("debug").randomize_(0), pixel_codec(), run, resume)
        finals.append(load_file(tmp_path / name / "checkpoint-4/model.safetensors"))
    assert all(torch.equal(finals[0][n], finals[1][n]) for n in finals[0])


def test_the_start_is_the_damaged_picture() -> None:
    model = align_positions_(build("tiny")).eval()
    z, x1 = torch.rand(1, 48, 32, 32) * 2 - 1, torch.randn(1, 48, 32, 32)
    with torch.no_grad():
        v = model(x1, torch.tensor([1000.0]), lq_latents=z).sample
    # Half a step of 8 bits: what the thresholds of cosine coefficients take from the start.
    torch.testing.assert_close(x1 - v, z, rtol=0, atol=1 / 255)


def test_the_start_attends_to_the_same_place() -> None:
    """Image tokens find the conditioning token of their place before any training."""
    model = align_positions_(build("tiny")).eval()
    z = torch.randn(1, 48, 32, 32) * 0.5
    with torch.no_grad():
        condition = model.encode_condition(z)
        block = model.transformer_blocks[0]
        image = torch.nn.functional.layer_norm(model.pos_embed(z), (256,))
        q = block.attn.to_q(image)[0, :, :64]
        k = block.attn.to_k(condition.tokens[0])[0, :, :64]
    found = (q @ k.T).argmax(-1)
    assert (found == torch.arange(256)).float().mean() > 0.9


def test_times_and_stages() -> None:
    t = sample_times(4000, Settings(), torch.Generator().manual_seed(0))
    assert t.min() > 0
    assert t.max() == 1
    assert (t == 1).float().mean() == pytest.approx(Settings().pure_noise, abs=0.03)
    s = Settings(steps=100)
    assert [stage_of(i, s)[0] for i in (0, 59, 60, 99, 100)] == [128, 128, 256, 256, 256]
    with pytest.raises(ValueError, match="add up to 1"):
        Settings(stages=((64, 1, 0.5),))


def test_balance_is_one_for_even_routers() -> None:
    model = build("debug")
    with torch.no_grad():
        model.mim.intra_router.zero_()
    even = torch.full((2, 3, 4, 4), 0.5)
    pooled = torch.randn(2, 3, 128)
    assert balance_loss(model, pooled, even).item() == pytest.approx(1)


def test_trains_what_mimdit_init_makes(tmp_path: Path) -> None:
    """The mixtures of a velocity model on an SD3.5 layout, in its VAE's latents."""
    write_folder(tmp_path / "sd35")
    init = ["--backbone", str(tmp_path / "sd35"), "--out", str(tmp_path / "new"), "--mim-dim", "64"]
    assert init_command([*init, "--precision", "fp32"]) == 0
    command = f"--init {tmp_path / 'new'} --output {tmp_path / 'run'} --freeze-backbone"
    more = "--max-train-steps 2 --stages 128:2:1 --dataloader-num-workers 0 --lr-warmup-steps 1"
    assert train_command([*command.split(), *more.split()]) == 0
    before, after = (load_pipeline(str(tmp_path / name)) for name in ("new", "run/model"))
    own, trained = before.transformer.state_dict(), after.transformer.state_dict()
    assert not torch.equal(own["mim.zero_weight"], trained["mim.zero_weight"])
    frozen = "transformer_blocks.0.attn.to_q.weight"
    assert torch.equal(own[frozen].bfloat16().float(), trained[frozen])
    assert type(after.vae).__name__ == "AutoencoderKL"
