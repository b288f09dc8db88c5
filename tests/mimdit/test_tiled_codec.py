import pytest
import torch
from diffusers import AutoencoderKL

from mimdit.codec import PixelCodec, decode, encode
from mimdit.tiled_codec import codec_bytes, codec_tile, decode_tiles, encode_tiles

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 16, 16),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=128,
        scaling_factor=1.5,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


@torch.no_grad()
def test_the_pixel_codec_is_exact_in_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimdit.tiled_codec._ROWS", 18)
    codec, x = PixelCodec(factor=4), torch.rand(2, 3, 72, 40)
    z = encode_tiles(codec, x, 0, CPU, CPU)
    assert torch.equal(z, encode(codec, x * 2 - 1))
    assert torch.equal(decode_tiles(codec, z, 0, CPU), decode(codec, z) / 2 + 0.5)
    assert codec_tile(codec) == codec_bytes(codec, 0) == 0


@torch.no_grad()
def test_a_small_picture_passes_whole(vae: AutoencoderKL) -> None:
    x = torch.rand(2, 3, 128, 96)
    z = encode_tiles(vae, x, codec_tile(vae), CPU, CPU)
    assert torch.equal(z, encode(vae, x * 2 - 1))
    assert torch.equal(decode_tiles(vae, z, codec_tile(vae), CPU), decode(vae, z) / 2 + 0.5)


@torch.no_grad()
def test_tiles_meet_without_seams(vae: AutoencoderKL) -> None:
    """Without norms and attention, which see their tile alone, tiles give the whole's result."""
    vae = AutoencoderKL(**(dict(vae.config) | {"mid_block_add_attention": False})).eval()
    for module in vae.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.GroupNorm):
                setattr(module, name, torch.nn.Identity())
    rows, columns = torch.linspace(0, 1, 256)[:, None], torch.linspace(0, 3, 320)
    x = torch.stack([rows * columns.sin(), rows + 0 * columns, (rows * 2 + columns).cos()])[None]
    x = x * 0.4 + 0.5
    whole = encode(vae, x * 2 - 1)
    seen: list[torch.Size] = []
    hook = vae.encoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape))
    z = encode_tiles(vae, x, 128, CPU, CPU)
    hook.remove()
    assert len(seen) == 9 and set(seen) == {torch.Size((1, 3, 128, 128))}
    assert not vae.use_tiling
    # A corner that one tile covers, with no border near; elsewhere zeros beyond a tile's border
    # count as little as the border's weight.
    torch.testing.assert_close(z[..., :16, :16], whole[..., :16, :16], rtol=1e-5, atol=1e-5)
    assert (z - whole).abs().mean() < 0.01 * whole.std()
    out, wanted = decode_tiles(vae, whole, 128, CPU), decode(vae, whole) / 2 + 0.5
    torch.testing.assert_close(out[..., :64, :64], wanted[..., :64, :64], rtol=1e-5, atol=1e-5)
    assert (out - wanted).abs().mean() < 0.01 * wanted.std()


@torch.no_grad()
def test_tiles_shrink_where_memory_runs_out(
    vae: AutoencoderKL, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, released = torch.rand(1, 3, 300, 256), []
    wanted = encode_tiles(vae, x[..., :256, :], 128, CPU, CPU)
    plain = vae.encode

    def hungry(pictures: torch.Tensor) -> object:
        if pictures.shape[-1] > 128:
            raise torch.OutOfMemoryError("out of memory")
        return plain(pictures)

    monkeypatch.setattr(vae, "encode", hungry)
    with pytest.warns(UserWarning, match="tiles of 128 pixels"):
        found = encode_tiles(
            vae, x[..., :256, :], 256, CPU, CPU, release=lambda: released.append(1)
        )
    assert torch.equal(found, wanted) and released == [1]
