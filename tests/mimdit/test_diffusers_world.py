"""What people do with diffusers models: LoRA, offload, compilation, large pictures."""

from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload_with_hook
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from mimdit import accelerate, codec
from mimdit.pipeline import MiMDiTPipeline
from mimdit.presets import build
from mimdit.transformer import MiMDiTTransformer2DModel
from tests.mimdit.sd35_folder import backbone, vae


@pytest.fixture
def pipe() -> MiMDiTPipeline:
    model = MiMDiTTransformer2DModel.from_backbone(backbone(), mim_dim=64).randomize_(0)
    pipe = MiMDiTPipeline(model, vae(), FlowMatchEulerDiscreteScheduler(shift=3.0))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def restored(pipe: MiMDiTPipeline, height: int = 128, width: int = 128) -> torch.Tensor:
    picture = torch.rand(3, height, width, generator=torch.Generator().manual_seed(0))
    return pipe(picture, 2, output_type="pt", generator=torch.Generator().manual_seed(0)).images


def test_lora_of_the_backbone(pipe: MiMDiTPipeline, tmp_path: Path) -> None:
    theirs = backbone()
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj"]
    theirs.add_adapter(
        LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    )
    layers = get_peft_model_state_dict(theirs)
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)

    before = restored(pipe)
    pipe.load_lora_weights(tmp_path)
    with_lora = restored(pipe)
    assert (with_lora - before).abs().max() > 1e-3
    x, text, pooled = torch.randn(1, 16, 16, 16), torch.randn(1, 5, 32), torch.randn(1, 64)
    t = torch.tensor([500.0])
    with torch.no_grad():
        a = pipe.transformer(x, t, encoder_hidden_states=text, pooled_projections=pooled).sample
        b = theirs(x, text, pooled, t).sample
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
    pipe.set_adapters("default_0", 0.0)
    torch.testing.assert_close(restored(pipe), before)
    pipe.unload_lora_weights()
    assert torch.equal(restored(pipe), before)


def test_lora_of_an_accelerated_model(pipe: MiMDiTPipeline, tmp_path: Path) -> None:
    theirs = backbone()
    torch.manual_seed(0)
    targets = ["to_q", "to_k", "to_v", "to_add_out", "norm1.linear", "proj_out"]
    config = LoraConfig(r=4, lora_alpha=4, target_modules=targets, init_lora_weights=False)
    theirs.add_adapter(config)
    layers = get_peft_model_state_dict(theirs)
    StableDiffusion3Pipeline.save_lora_weights(tmp_path, transformer_lora_layers=layers)

    accelerate(pipe)
    before = restored(pipe)
    for change in (
        lambda: pipe.load_lora_weights(tmp_path),
        lambda: pipe.set_adapters("default_0", 0.5),
        lambda: pipe.fuse_lora(),
        lambda: pipe.unfuse_lora(),
        lambda: pipe.unload_lora_weights(),
    ):
        change()
        found = restored(pipe)
        wanted = restored(accelerate(pipe, enabled=False))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        accelerate(pipe)
    torch.testing.assert_close(found, before, rtol=0, atol=1e-4)


def test_conditioning_brings_an_offloaded_model_in(pipe: MiMDiTPipeline) -> None:
    """Diffusers offloads by hooks on `forward`; `encode_condition` runs before it."""
    model = pipe.transformer
    _, hook = cpu_offload_with_hook(model, torch.device("cpu"))
    moved = []
    hook.hook.pre_forward = lambda module, *args, **kwargs: moved.append(1) or (args, kwargs)
    z = torch.randn(1, 16, 16, 16)
    model.encode_condition(z)
    model.pool_condition(z)
    assert len(moved) == 2


def test_compiles_into_one_graph() -> None:
    model = build("debug").randomize_(0).eval()
    x, z = torch.randn(2, 1, 48, 16, 16)
    t = torch.tensor([500.0])
    with torch.no_grad():
        found = torch._dynamo.explain(model)(x, t, lq_latents=z)
    assert found.graph_break_count == 0
    assert found.graph_count == 1
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        # Random gains make velocities of several hundred.
        found, wanted = compiled(x, t, lq_latents=z).sample, model(x, t, lq_latents=z).sample
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_large_pictures_pass_the_vae_in_tiles(pipe: MiMDiTPipeline) -> None:
    """The small VAE of these tests is made for 128 pixels."""
    picture = torch.rand(1, 3, 152, 264) * 2 - 1
    with torch.no_grad():
        whole = pipe.vae.encode(picture).latent_dist.mode()
        pipe.vae.enable_tiling()
        tiles = pipe.vae.encode(picture).latent_dist.mode()
        pipe.vae.disable_tiling()
        z = codec.encode(pipe.vae, picture)
        shift, scale = 0.0609, 1.5305
        torch.testing.assert_close(z, (tiles - shift) * scale)
        assert not torch.allclose(tiles, whole)
        assert codec.decode(pipe.vae, z).shape == picture.shape
    assert not pipe.vae.use_tiling
    out = restored(pipe, 150, 261)
    assert out.shape == (1, 3, 150, 261)
    assert out.isfinite().all()
