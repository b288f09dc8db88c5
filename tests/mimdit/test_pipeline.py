from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.callbacks import SDCFGCutoffCallback
from PIL import Image

from mimdit.loading import assemble, load_pipeline
from mimdit.pipeline import MiMDiTPipeline
from mimdit.presets import build
from mimdit.transformer import MiMDiTTransformer2DModel
from training.warm_start import align_positions_


@pytest.fixture(scope="module")
def pipe(debug_model: MiMDiTTransformer2DModel) -> MiMDiTPipeline:
    pipe = assemble(debug_model, default_steps=3)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).random((height, width, 3), dtype=np.float32)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("size", [(1, 1), (7, 300), (128, 128), (131, 257)], ids=str)
def test_any_size_comes_back_exactly(pipe: MiMDiTPipeline, size: tuple[int, int]) -> None:
    out = pipe(picture(*size), generator=seeded(), output_type="np").images
    assert out.shape == (1, *size, 3)
    assert np.isfinite(out).all()
    assert out.min() >= 0
    assert out.max() <= 1


def test_same_seed_same_bits(pipe: MiMDiTPipeline) -> None:
    x = picture(140, 90)
    a, b, c = (pipe(x, generator=seeded(s), output_type="np").images for s in (0, 0, 1))
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


@pytest.mark.parametrize("size", [(131, 257), (128, 128), (3, 5)], ids=str)
def test_shifted_grids_meet_again(size: tuple[int, int]) -> None:
    """A model whose correction is zero gives the picture back, wherever its patches lie."""
    # Without cosine coefficients, whose thresholds start at the edge of what can be seen.
    model = align_positions_(build("debug", out_channels=51)).eval()
    pipe = assemble(model, default_shifts=4, default_steps=1)
    pipe.set_progress_bar_config(disable=True)
    x = picture(*size)
    for shifts in (1, 2, 4):
        out = pipe(x, 1, shifts, output_type="np").images[0]
        np.testing.assert_allclose(out, x, atol=1e-5)
    seen = []
    pipe(x, callback_on_step_end=lambda *a: seen.append(a[1]) or {})
    assert seen == [0] * 4
    seen.clear()
    pipe(x, 2, callback_on_step_end=lambda *a: seen.append(a[1]) or {})
    assert seen == [0, 1]


def test_shifts_average_different_results(pipe: MiMDiTPipeline) -> None:
    x = picture(128, 136)
    one, two = (pipe(x, 2, n, generator=seeded(), output_type="np").images for n in (1, 2))
    assert np.abs(one - two).max() > 1e-3


def test_saved_and_loaded(pipe: MiMDiTPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.rglob("*.bin"))
    loaded = load_pipeline(str(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    assert loaded.config["default_steps"] == 3
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(loaded.transformer.state_dict()[name], tensor), name
    x = picture(64, 64)
    a, b = (p(x, generator=seeded(), output_type="np").images for p in (pipe, loaded))
    np.testing.assert_allclose(a, b, atol=1e-4)


def test_kinds_of_input_and_output(pipe: MiMDiTPipeline) -> None:
    array = (picture(40, 50) * 255).astype(np.uint8)
    tensor = torch.from_numpy(array).permute(2, 0, 1) / 255
    results = [
        pipe(image, generator=seeded(), output_type="pt").images
        for image in (array, Image.fromarray(array), tensor, [Image.fromarray(array)])
    ]
    for result in results:
        assert result.shape == (1, 3, 40, 50)
        assert torch.equal(result, results[0])
    assert pipe(array, generator=seeded()).images[0].size == (50, 40)
    assert pipe(array, generator=seeded(), output_type="latent").images.shape == (1, 48, 32, 32)


def test_batch_equals_single_pictures(pipe: MiMDiTPipeline) -> None:
    both = np.stack([picture(150, 140, s) for s in (1, 2)])
    batch = pipe(both, generator=[seeded(1), seeded(2)], output_type="np", tile_batch=3).images
    for i in (0, 1):
        single = pipe(both[i], generator=seeded(i + 1), output_type="np").images[0]
        np.testing.assert_allclose(batch[i], single, atol=2e-4)


def test_routing_of_tiles_is_the_pictures(
    pipe: MiMDiTPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    encode: Callable = pipe.transformer.encode_condition

    def watch(latents: torch.Tensor, routing: object = None) -> object:
        condition = encode(latents, routing)
        seen.append(condition.routing)
        return condition

    monkeypatch.setattr(pipe.transformer, "encode_condition", watch)
    out = pipe(picture(300, 200), generator=seeded(), num_inference_steps=1)
    assert len(seen) > 2
    for routing in seen:
        assert torch.equal(routing.index, out.routing.index)


def test_conditions_kept_or_computed_anew(
    pipe: MiMDiTPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = picture(100, 200)
    kept = pipe(x, generator=seeded(), output_type="np").images
    encode, calls = pipe.transformer.encode_condition, []
    monkeypatch.setattr(
        pipe.transformer, "encode_condition", lambda *a: calls.append(a) or encode(*a)
    )
    tiles = len(pipe.plan(100, 200).tiling.corners)
    # All, one and none of the tiles' conditions are kept for the second and third step.
    one = 2 * 16 * 16 * 64 * 4
    for room, wanted in ((2**30, tiles), (one, 3 * tiles - 2), (0, 3 * tiles)):
        monkeypatch.setattr("mimdit.planning._KEPT", room)
        assert np.array_equal(pipe(x, generator=seeded(), output_type="np").images, kept)
        assert len(calls) == wanted
        calls.clear()


def test_experts_of_a_tile_or_of_the_picture(pipe: MiMDiTPipeline) -> None:
    x = np.concatenate([picture(128, 150), np.zeros((128, 150, 3), np.float32)], axis=1)
    results = {
        kind: pipe(x, generator=seeded(), routing=kind, output_type="np", tile_batch=2)
        for kind in ("picture", "tile")
    }
    tiles = len(pipe.plan(*x.shape[:2]).tiling.corners)
    assert tiles == 4
    inter = results["tile"].routing.inter
    assert results["picture"].routing.inter.shape == (2, 1, 4)
    assert inter.shape == (2, tiles, 4)
    # The first tile sees noise, the last one black.
    assert (inter[:, 0] - inter[:, -1]).abs().max() > 1e-2
    assert not np.array_equal(results["picture"].images, results["tile"].images)
    one = pipe(
        x[:, :128], generator=seeded(), output_type="np", tile_batch=2, num_inference_steps=1
    )
    torch.testing.assert_close(inter[:, :1], one.routing.inter)


@pytest.mark.parametrize("shifts", [1, 2, 4])
def test_every_pass_is_one_step_of_the_progress(pipe: MiMDiTPipeline, shifts: int) -> None:
    """On shifted grids a picture may need a row of tiles more."""
    seen: list[tuple[int, int]] = []
    pipe(picture(190, 100), 2, shifts, progress=lambda *passes: seen.append(passes))
    assert [done for done, _ in seen] == [*range(1, len(seen) + 1)]
    assert {total for _, total in seen} == {len(seen)}


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_generator_for_each_picture(pipe: MiMDiTPipeline, count: int) -> None:
    both, generators = np.stack([picture(20, 30)] * 2), [seeded(i) for i in range(count)]
    if count == 1:
        one, same = (
            pipe(both, 1, generator=g, output_type="np").images for g in (seeded(), generators)
        )
        assert np.array_equal(one, same)
        return
    message = f"generator: expected one, or 2 for as many pictures, got {count}"
    with pytest.raises(ValueError, match=message):
        pipe(both, 1, generator=generators)


def test_named_experts_replace_the_routers(pipe: MiMDiTPipeline) -> None:
    x = picture(64, 64)
    plain = pipe(x, 1, generator=seeded(), output_type="np")
    given = {"spatial": 0.5, "se": 0.2}
    out = pipe(x, 1, generator=seeded(), output_type="np", experts=given)
    before, after = plain.routing.inter, out.routing.inter
    torch.testing.assert_close(after[..., 0], torch.full((2, 1), 0.5))
    torch.testing.assert_close(after[..., 3], torch.full((2, 1), 0.2))
    torch.testing.assert_close(after.sum(-1), torch.ones(2, 1))
    torch.testing.assert_close(after[..., 1] / after[..., 2], before[..., 1] / before[..., 2])
    assert np.abs(out.images - plain.images).max() > 1e-3
    groups = pipe.transformer.mim.groups
    own = dict(zip(groups, before[0, 0].tolist(), strict=True))
    # What the routers chose, named, changes the other block alone.
    same = pipe(x, 1, generator=seeded(), output_type="np", experts={"spatial": own["spatial"]})
    torch.testing.assert_close(same.routing.inter[0], before[0])


def test_passes_of_a_picture_have_one_shape(
    pipe: MiMDiTPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, shapes = picture(128, 500), set()
    alone = pipe(x, 1, generator=seeded(), output_type="np").images
    predict = pipe.transformer.predict

    def watch(hidden: torch.Tensor, *args: object) -> torch.Tensor:
        shapes.add(tuple(hidden.shape))
        return predict(hidden, *args)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(pipe.transformer, "predict", watch)
    made = pipe.plan(128, 500, tile_batch=5)
    # Two passes take seven tiles either way; the second is filled up with one.
    assert (len(made.tiling.corners), made.batch, made.passes) == (7, 4, 2)
    for batch in (3, 5, 100):
        out = pipe(x, 1, generator=seeded(), output_type="np", tile_batch=batch).images
        np.testing.assert_allclose(out, alone, atol=2e-4)
        assert {shape[0] for shape in shapes} == {{3: 3, 5: 4, 100: 7}[batch]}
        shapes.clear()


def test_a_plan_says_what_will_happen(pipe: MiMDiTPipeline) -> None:
    made = pipe.plan(3000, 4000)
    assert made.batch == 1
    assert made.passes == len(made.tiling.corners) > 1000
    assert "4000×3000 pixels" in str(made)
    assert "tiles of 128×128, 1 in a forward pass" in str(made)
    # A few copies of the picture, and never more for more tiles.
    assert made.host < 10 * 3000 * 4000 * 12
    assert pipe.plan(6000, 8000).needed == made.needed
    with pytest.raises(ValueError, match="height, width, pictures: expected at least 1"):
        pipe.plan(0, 5)


@pytest.mark.parametrize("size", [(1, 700), (500, 2), (3, 3)], ids=str)
def test_extreme_shapes_on_shifted_grids(pipe: MiMDiTPipeline, size: tuple[int, int]) -> None:
    out = pipe(picture(*size), 1, 2, generator=seeded(), output_type="np").images
    assert out.shape == (1, *size, 3)
    assert np.isfinite(out).all()


def test_latents_kept_in_main_memory_change_nothing(
    pipe: MiMDiTPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where latents are not at home on the model's device, tiles travel."""
    x = picture(100, 200)
    kept = pipe(x, 1, generator=seeded(), output_type="np").images
    monkeypatch.setattr("mimdit.planning.home_of", lambda *_: torch.device("meta"))
    with pytest.raises((NotImplementedError, RuntimeError)):
        pipe(x, 1, generator=seeded())
    monkeypatch.setattr("mimdit.planning.home_of", lambda *_: torch.device("cpu"))
    assert np.array_equal(pipe(x, 1, generator=seeded(), output_type="np").images, kept)


def test_strength_zero_and_callback(pipe: MiMDiTPipeline) -> None:
    x = picture(33, 47)
    out = pipe(x, strength=0, generator=seeded(), output_type="np").images[0]
    np.testing.assert_allclose(out, x, atol=1e-6)
    seen: list[int] = []

    def callback(_: MiMDiTPipeline, i: int, t: torch.Tensor, state: dict) -> dict:
        seen.append(i)
        return {"latents": torch.zeros_like(state["latents"])} if i == 2 else state

    out = pipe(x, generator=seeded(), callback_on_step_end=callback, output_type="np").images
    assert seen == [0, 1, 2]
    assert np.array_equal(out, np.full_like(out, 0.5))
    empty: list[dict] = []
    pipe(
        x,
        1,
        callback_on_step_end=lambda *a: empty.append(dict(a[3])) or a[3],
        callback_on_step_end_tensor_inputs=(),
    )
    assert empty == [{}]


@pytest.mark.parametrize("fix", ["adain", "wavelet"])
def test_color_fix_moves_the_mean_to_the_input(fix: str) -> None:
    # Random gains would clip most pixels.
    pipe = assemble(build("debug", prediction_type="residual", out_channels=48).randomize_(0), 3)
    x = picture(64, 64) * 0.2 + 0.4
    plain, fixed = (
        pipe(x, generator=seeded(), color_fix=f, output_type="np").images[0] for f in ("none", fix)
    )
    target = x.mean((0, 1))
    assert np.abs(fixed.mean((0, 1)) - target).max() < np.abs(plain.mean((0, 1)) - target).max()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"strength": 1.5}, "strength"),
        ({"guidance_scale": 2.0}, "no positive prompt"),
        ({"color_fix": "blue"}, "color_fix"),
        ({"tile": 4}, "tile: expected 0 or 8 to 128"),
        ({"tile": 64, "tile_overlap": 64}, "tile_overlap"),
        ({"output_type": "jpg"}, "output_type"),
        ({"shifts": 3}, "shifts: expected one of 1, 2, 4"),
        ({"tile_batch": -1}, "tile_batch: expected 0"),
        ({"tile_overlap": -8}, "tile_overlap: expected at least 0"),
        ({"routing": "row"}, "routing: expected one of picture, tile"),
        ({"experts": {"swine": 0.5}}, r"experts: .*\(spatial, channel, swin, se\), got 'swine'"),
        ({"experts": {"swin": 1.5}}, "experts: expected weights from 0 to 1, got 1.5 for swin"),
        ({"experts": {"swin": float("nan")}}, "experts: expected weights from 0 to 1"),
        ({"experts": {"swin": 0.7, "se": 0.7}}, "experts: .* at most 1 together, got 1.4"),
        (
            {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]},
            "callback_on_step_end_tensor_inputs: expected latents, got 'prompt_embeds'",
        ),
        (
            {"callback_on_step_end": SDCFGCutoffCallback()},
            "callback_on_step_end_tensor_inputs: expected latents, got 'prompt_embeds'",
        ),
    ],
)
def test_bad_arguments(pipe: MiMDiTPipeline, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(picture(64, 64), **options)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.float32),
        np.full((8, 8, 3), np.nan, np.float32),
        np.full((8, 8, 3), 200.0, np.float32),
        [np.zeros((8, 8, 3), np.float32), np.zeros((8, 9, 3), np.float32)],
        "photo.png",
    ],
    ids=["gray", "nan", "range", "sizes", "path"],
)
def test_bad_pictures(pipe: MiMDiTPipeline, image: object) -> None:
    with pytest.raises(ValueError, match="image: expected"):
        pipe(image)  # pyright: ignore[reportArgumentType]


def test_equal_prompts_make_guidance_an_error() -> None:
    model = build("debug", prompts=("empty", "positive", "negative")).randomize_(0).eval()
    pipe = assemble(model, 1)
    pipe.set_progress_bar_config(disable=True)
    x = picture(32, 32)
    plain, guided = (
        pipe(x, guidance_scale=g, generator=seeded(), output_type="np").images for g in (1.0, 3.0)
    )
    assert not np.array_equal(plain, guided)
    with torch.no_grad():
        model.prompt_embeds[1] = model.prompt_embeds[2]
    with pytest.raises(ValueError, match="prompt are equal"):
        pipe(x, guidance_scale=3.0)


def test_not_finite_results_are_refused() -> None:
    model = build("debug").eval()
    with torch.no_grad():
        model.proj_out.bias.fill_(float("nan"))
    pipe = assemble(model, 1)
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ValueError, match="not finite"):
        pipe(picture(32, 32))


def test_wrong_checkpoints(pipe: MiMDiTPipeline, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected .*tiny.*, a folder, or a hub id"):
        load_pipeline("nothing")
    with pytest.raises(ValueError, match=r"no model_index.json"):
        load_pipeline(str(tmp_path))
    pipe.save_pretrained(tmp_path)
    from safetensors.torch import load_file, save_file

    file = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors.pop("mim.zero_weight")
    save_file(tensors, file)
    with pytest.raises(ValueError, match="not the weights of this model"):
        load_pipeline(str(tmp_path))
