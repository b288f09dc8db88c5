"""SD3.5 folders in, MiM-DiTs out."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
)
from safetensors.torch import save_file

from mimdit import MiMDiTPipeline, from_sd35
from mimdit.cli.init import main
from mimdit.loading import load_pipeline
from mimdit.transformer import MiMDiTTransformer2DModel
from tests.mimdit.sd35_folder import (
    LAYOUTS,
    backbone,
    original_names,
    text_components,
    write_folder,
)

SMALL = {"mim_dim": 64}


def quiet(*args: object, **options: object) -> MiMDiTPipeline:
    """`from_sd35` of a folder without text encoders."""
    with pytest.warns(UserWarning, match="no text encoders found"):
        return from_sd35(*args, **(SMALL | options))


def assert_same_without_conditioning(
    ours: MiMDiTTransformer2DModel, theirs: SD3Transformer2DModel
) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 16, 20, 12, generator=g)
    text, pooled = torch.randn(2, 9, 32, generator=g), torch.randn(2, 64, generator=g)
    t = torch.tensor([150.0, 800.0])
    with torch.no_grad():
        a = ours(x, t, encoder_hidden_states=text, pooled_projections=pooled).sample
        b = theirs(x, text, pooled, t).sample
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("save", [{}, {"max_shard_size": "300KB"}], ids=["whole", "sharded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_backbone_is_unchanged(layout: str, save: dict, tmp_path: Path) -> None:
    theirs = write_folder(tmp_path, layout, **save).transformer
    if save:
        assert len(list(tmp_path.glob("transformer/*.safetensors"))) > 2
    pipe = quiet(tmp_path)
    own, before = pipe.transformer.state_dict(), theirs.state_dict()
    assert set(before) == {k for k in own if not k.startswith(("mim.", "prompt_", "pooled_"))}
    assert all(torch.equal(own[k], tensor) for k, tensor in before.items())
    assert_same_without_conditioning(pipe.transformer, theirs)
    assert pipe.scheduler.config["shift"] == 3.0
    assert pipe.transformer.config["prediction_type"] == "velocity"
    pipe.transformer.randomize_(0)
    assert_same_without_conditioning(pipe.transformer, theirs)


def test_what_we_write_reads_back_here_and_in_diffusers(tmp_path: Path) -> None:
    write_folder(tmp_path / "sd35", text=text_components())
    pipe = from_sd35(tmp_path / "sd35", **SMALL, experts=3, groups=("se", "swin"))
    pipe.transformer.randomize_(1)
    pipe.save_pretrained(tmp_path / "ours")
    again = load_pipeline(str(tmp_path / "ours"))
    own, back = pipe.transformer.state_dict(), again.transformer.state_dict()
    assert own.keys() == back.keys()
    assert all(torch.equal(own[k], back[k]) for k in own)
    assert again.transformer.config["groups"] == ["se", "swin"]
    theirs = SD3Transformer2DModel.from_pretrained(tmp_path / "ours", subfolder="transformer")
    assert_same_without_conditioning(pipe.transformer, theirs)
    codec = AutoencoderKL.from_pretrained(tmp_path / "ours", subfolder="vae")
    assert all(torch.equal(codec.state_dict()[k], v) for k, v in pipe.vae.state_dict().items())
    FlowMatchEulerDiscreteScheduler.from_pretrained(tmp_path / "ours", subfolder="scheduler")
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "ours"), MiMDiTPipeline)


def test_weights_are_taken_over_not_copied() -> None:
    theirs = backbone()
    ours = MiMDiTTransformer2DModel.from_backbone(theirs, **SMALL)
    own = ours.state_dict()
    assert all(own[k].data_ptr() == v.data_ptr() for k, v in theirs.state_dict().items())
    assert all(p.requires_grad for p in ours.parameters())
    # The mixtures start as a fresh model's: ZeroLinear is zero, seeds repeat.
    assert not ours.mim.zero_weight.any()
    again = MiMDiTTransformer2DModel.from_backbone(theirs, **SMALL)
    other = MiMDiTTransformer2DModel.from_backbone(theirs, **SMALL, seed=1)
    assert torch.equal(again.mim.down_weight, ours.mim.down_weight)
    assert not torch.equal(other.mim.down_weight, ours.mim.down_weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_number_types(dtype: torch.dtype, tmp_path: Path) -> None:
    write_folder(tmp_path)
    pipe = quiet(tmp_path, dtype=dtype)
    found = {n: p.dtype for n, p in pipe.transformer.named_parameters()}
    wide = {name for name, found_dtype in found.items() if found_dtype != dtype}
    assert wide == {"mim.inter_router", "mim.intra_router"}
    assert pipe.transformer.dtype == dtype
    assert pipe.transformer.mim.running_mean.dtype == torch.float32
    assert {p.dtype for p in pipe.vae.parameters()} == {dtype}


@pytest.mark.parametrize("t5", [True, False], ids=["t5", "clip only"])
def test_prompts_are_those_of_diffusers(t5: bool, tmp_path: Path) -> None:
    theirs = write_folder(tmp_path, text=text_components(t5))
    pipe = from_sd35(tmp_path, positive="a sharp picture", negative="a blur", **SMALL)
    assert pipe.text_encoder is None
    for name, text in (("empty", ""), ("positive", "a sharp picture"), ("negative", "a blur")):
        embeds, _, pooled, _ = theirs.encode_prompt(
            text, None, None, do_classifier_free_guidance=False
        )
        stored = pipe.transformer.prompt(name)
        torch.testing.assert_close(stored[0], embeds)
        torch.testing.assert_close(stored[1], pooled)
    assert pipe.transformer.config["prompt_tokens"] == 333


def test_guidance_and_captions(tmp_path: Path) -> None:
    write_folder(tmp_path, text=text_components())
    pipe = from_sd35(tmp_path, keep_text_encoders=True, **SMALL)
    pipe.set_progress_bar_config(disable=True)
    pipe.transformer.randomize_(0)
    picture = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))

    def restore(**options: object) -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return pipe(picture, 2, output_type="latent", generator=generator, **options).images

    plain, guided = restore(), restore(guidance_scale=3.0)
    assert (plain - guided).abs().max() > 1e-3
    assert (plain - restore(prompt="a cat")).abs().max() > 1e-4
    torch.testing.assert_close(plain, restore(prompt=""))
    with pytest.raises(ValueError, match="are equal"):
        restore(guidance_scale=3.0, prompt="a cat", negative_prompt="a cat")
    pipe.save_pretrained(tmp_path / "ours")
    again = MiMDiTPipeline.from_pretrained(tmp_path / "ours")
    assert again.text_encoder is not None
    pipe.text_encoder = None
    with pytest.raises(ValueError, match="prompt: expected none"):
        restore(prompt="a cat")


def test_a_single_file_of_original_names(tmp_path: Path) -> None:
    theirs = backbone()
    save_file(original_names(theirs), tmp_path / "sd35.safetensors")
    write_folder(tmp_path / "sd35")
    pipe = quiet(tmp_path / "sd35.safetensors", vae=tmp_path / "sd35")
    own = pipe.transformer.state_dict()
    assert all(torch.equal(own[k], tensor) for k, tensor in theirs.state_dict().items())
    assert_same_without_conditioning(pipe.transformer, theirs)
    with pytest.raises(ValueError, match="holds no VAE"):
        quiet(tmp_path / "sd35.safetensors")
    whole = (tmp_path / "sd35.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="is broken or incomplete"):
        from_sd35(tmp_path / "cut.safetensors")
    eighth = {name: v.to(torch.float8_e4m3fn) for name, v in original_names(theirs).items()}
    save_file(eighth, tmp_path / "fp8.safetensors")
    with pytest.raises(ValueError, match="expected fp32, bf16 or fp16 weights"):
        from_sd35(tmp_path / "fp8.safetensors")
    with pytest.raises(ValueError, match="holds no text encoders"):
        from_sd35(tmp_path / "sd35.safetensors", text_encoders=tmp_path / "sd35", **SMALL)
    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not an SD3"):
        from_sd35(tmp_path / "other.safetensors")


def test_text_encoders_in_the_file_may_be_of_any_type(tmp_path: Path) -> None:
    """As in published files: T5 in 8 bits, and whole numbers."""
    theirs = backbone()
    text = {
        "text_encoders.t5xxl.transformer.shared.weight": torch.zeros(4, 4).to(torch.float8_e4m3fn),
        "text_encoders.clip_l.transformer.text_model.embeddings.position_ids": torch.arange(4),
    }
    save_file(original_names(theirs) | text, tmp_path / "all.safetensors")
    write_folder(tmp_path / "sd35")
    own = quiet(tmp_path / "all.safetensors", vae=tmp_path / "sd35").transformer.state_dict()
    assert all(torch.equal(own[k], tensor) for k, tensor in theirs.state_dict().items())


@pytest.mark.parametrize(
    "name", ["x_embedder.proj.weight", "context_embedder.weight", "pos_embed", "joint_blocks.a.b"]
)
def test_files_with_tensors_of_other_shapes(name: str, tmp_path: Path) -> None:
    tensors = original_names(backbone()) | {f"model.diffusion_model.{name}": torch.zeros(3)}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"other\.safetensors is not an SD3\.5 checkpoint"):
        from_sd35(tmp_path / "other.safetensors")


def test_wrong_and_incomplete_folders(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        from_sd35(tmp_path / "none")
    with pytest.raises(ValueError, match="is not an SD3"):
        from_sd35(tmp_path)
    write_folder(tmp_path / "a", max_shard_size="300KB")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    sorted((tmp_path / "b/transformer").glob("*.safetensors"))[0].unlink()
    with pytest.raises(ValueError, match="transformer cannot be loaded"):
        quiet(tmp_path / "b")
    shutil.rmtree(tmp_path / "b/vae")
    with pytest.raises(ValueError, match="diffusers layout: vae"):
        from_sd35(tmp_path / "b")
    config = tmp_path / "a/transformer/config.json"
    changed = json.loads(config.read_text())
    config.write_text(json.dumps(changed | {"num_layers": 4}))
    with pytest.raises(ValueError, match="transformer cannot be loaded"):
        quiet(tmp_path / "a")
    config.write_text(json.dumps(changed | {"_class_name": "FluxTransformer2DModel"}))
    with pytest.raises(ValueError, match="expected an SD3Transformer2DModel, got Flux"):
        from_sd35(tmp_path / "a")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_folder(tmp_path / "sd35", text=text_components())
    out = tmp_path / "models/ours"
    command = ["--backbone", str(tmp_path / "sd35"), "--out", str(out), "--mim-dim", "64"]
    assert main([*command, "--experts", "1", "--top-k", "1"]) == 0
    assert "fresh mixtures of experts" in capsys.readouterr().out
    assert "MiM-DiT" in (out / "README.md").read_text()
    assert [p.name for p in out.parent.iterdir()] == ["ours"]
    pipe = load_pipeline(str(out), precision="bf16")
    assert pipe.transformer.config["experts"] == 1
    assert pipe.transformer.dtype == torch.bfloat16
    assert main(command) == 1
    assert "not an empty folder" in capsys.readouterr().err
    command[3] = str(tmp_path / "second")
    assert main([*command, "--experts", "1"]) == 1
    assert capsys.readouterr().err.startswith("mimdit-init: top_k: expected 1 to 1")
    assert main(["--backbone", str(tmp_path), "--out", str(out / "x")]) == 1
    assert "transformer/config.json" in capsys.readouterr().err
    assert not (tmp_path / "second").exists()


def test_a_model_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The download itself is replaced by a local folder."""
    write_folder(tmp_path / "sd35")
    quiet(tmp_path / "sd35").save_pretrained(tmp_path / "ours")
    asked = []

    def snapshot(name: str, **options: object) -> str:
        asked.append((name, options["revision"]))
        return str(tmp_path / "ours")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    pipe = MiMDiTPipeline.from_pretrained("someone/model", revision="v2")
    assert asked == [("someone/model", "v2")]
    assert pipe.transformer.config["mim_dim"] == 64
