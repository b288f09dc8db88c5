import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mimdit.cli.init import main as init_command
from mimdit.loading import load_pipeline
from mimdit.presets import build, pixel_codec
from tests.mimdit.sd35_folder import write_folder
from training.loop import Settings, balance_loss, sample_times, stage_of, train
from training.optim import optimizers
from training.train import main as train_command
from training.warm_start import align_positions_


def settings(folder: Path, steps: int) -> Settings:
    return Settings(
        output=str(folder),
        steps=steps,
        stages=((32, 3, 0.5), (64, 2, 0.5)),
        warmup=2,
        checkpointing_steps=2,
        workers=0,
        balance=0.01,
    )


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


def test_resume_without_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a checkpoint-N folder"):
        train(build("debug"), pixel_codec(), settings(tmp_path, 2), resume="latest")


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
