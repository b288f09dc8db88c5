"""Damages: same seed same result, ranges, identity limits, composite order, held-out pictures."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from training import damages, data
from training.degrade import FOUNDIR_TYPES, KINDS, MODELS, ORDER, degrade, sample_kinds

CASES = {**{kind: (kind,) for kind in KINDS}, **FOUNDIR_TYPES}
IDENTITIES = {
    "gaussian noise": ("noise", {"model": "gaussian", "sigma": 0.0}),
    "poisson noise": ("noise", {"model": "poisson", "scale": 0.0}),
    "raw noise": ("noise", {"model": "raw", "shot": 0.0}),
    "haze": ("haze", {"beta": 0.0}),
    "low light": ("low_light", {"alpha": 1.0, "beta": 1.0, "gamma": 1.0, "shot": 0.0}),
    "rain": ("rain", {"density": 0.0, "veil": 0.0}),
    "gaussian blur": ("blur", {"model": "gaussian", "sigma": 0.0}),
    "motion blur": ("blur", {"model": "motion", "length": 0.0}),
}


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    return np.random.default_rng(7).random((height, width, 3), dtype=np.float32)


def check(result: np.ndarray, shape: tuple[int, ...]) -> None:
    assert result.shape == shape
    assert result.dtype == np.float32
    assert np.isfinite(result).all()
    assert result.min() >= 0 and result.max() <= 1


@pytest.mark.parametrize("kinds", CASES.values(), ids=CASES.keys())
def test_same_seed_same_result_in_range(kinds: tuple[str, ...]) -> None:
    image = picture()
    before = image.copy()
    first, label = degrade(image, kinds, np.random.default_rng(3))
    second, again = degrade(image, kinds, np.random.default_rng(3))
    other, _ = degrade(image, kinds, np.random.default_rng(4))
    check(first, image.shape)
    assert np.array_equal(first, second) and label == again
    assert not np.array_equal(first, other)
    assert np.array_equal(image, before)
    assert json.loads(json.dumps(label.as_dict())) == label.as_dict()


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (7, 5), (33, 80)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_any_size_any_model(kind: str, shape: tuple[int, int]) -> None:
    for model in MODELS[kind]:
        for value in (0.0, 0.5, 1.0):
            flat = np.full((*shape, 3), value, np.float32)
            result, _ = degrade(flat, (kind,), np.random.default_rng(0), **{kind: {"model": model}})
            check(result, flat.shape)


@pytest.mark.parametrize(("kind", "fixed"), IDENTITIES.values(), ids=IDENTITIES.keys())
def test_identity_limit(kind: str, fixed: dict[str, float | int | str]) -> None:
    image = picture()
    result, label = degrade(image, (kind,), np.random.default_rng(0), **{kind: fixed})
    np.testing.assert_allclose(result, image, atol=1e-6)
    assert {key: label.parameters[kind][key] for key in fixed} == fixed


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_parameters_stay_in_their_ranges(kind: str) -> None:
    image, rng = picture(2, 2), np.random.default_rng(1)
    for _ in range(100):
        values = degrade(image, (kind,), rng)[1].parameters[kind]
        for key, span in MODELS[kind][str(values["model"])].ranges.items():
            value = float(values[key])
            assert span.low <= value <= span.high or value == span.rest


def test_fixing_a_parameter_leaves_the_others() -> None:
    free = degrade(picture(), ("rain",), np.random.default_rng(5))[1].parameters["rain"]
    fixed = degrade(picture(), ("rain",), np.random.default_rng(5), rain={"width": 2.0})[1]
    assert fixed.parameters["rain"] == {**free, "width": 2.0}


def test_gaussian_noise_has_its_sigma() -> None:
    flat = np.full((128, 128, 3), 0.5, np.float32)
    fixed: dict[str, float | int | str] = {"model": "gaussian", "sigma": 25 / 255, "gray": 0}
    result, _ = degrade(flat, ("noise",), np.random.default_rng(0), noise=fixed)
    assert abs(float((result - flat).std()) * 255 - 25) < 0.5


def test_blur_and_haze_against_their_formulas() -> None:
    spot = np.zeros((41, 41, 3), np.float32)
    spot[20, 20] = 1
    blurred = damages.gaussian_blur(spot, np.random.default_rng(0), sigma=2.0)
    y, x = np.mgrid[-10:11, -10:11]
    kernel = np.exp(-(x**2 + y**2) / 8.0)
    np.testing.assert_allclose(blurred[10:31, 10:31, 1], kernel / kernel.sum(), atol=1e-6)
    image, depth = picture(5, 6), np.linspace(0, 1, 30).reshape(5, 6)
    t = np.exp(-1.5 * depth)[..., None]
    hazy = damages.haze(image, np.random.default_rng(0), beta=1.5, airlight=0.8, depth=depth)
    np.testing.assert_allclose(hazy, image * t + 0.8 * (1 - t), atol=1e-6)


def test_composites_apply_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sorted(ORDER) == sorted(KINDS)
    image = picture()
    _, label = degrade(image, reversed(ORDER), np.random.default_rng(0))
    assert label.kinds == ORDER
    # Low light first: a dark picture still meets the haze's bright airlight.
    both, label = degrade(
        image, ("haze", "low_light"), np.random.default_rng(0), low_light={"shot": 0.0}
    )
    dark, _ = degrade(
        image, ("low_light",), np.random.default_rng(0), low_light=label.parameters["low_light"]
    )
    assert both.mean() > dark.mean() + 0.1


def test_errors_name_what_was_got() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match=r"expected some of .*'blur'.* got \['snow'\]"):
        degrade(picture(), ("snow",), rng)
    with pytest.raises(ValueError, match="salt"):
        degrade(picture(), ("noise",), rng, noise={"model": "salt"})
    with pytest.raises(ValueError, match="sigmas"):
        degrade(picture(), ("noise",), rng, noise={"model": "gaussian", "sigmas": 1.0})
    with pytest.raises(ValueError, match="haze"):
        degrade(picture(), ("noise",), rng, haze={"beta": 1.0})
    with pytest.raises(ValueError, match="shape"):
        degrade(picture()[..., 0], ("noise",), rng)


def test_sampled_kinds_are_single_or_foundir_mixtures() -> None:
    rng = np.random.default_rng(0)
    drawn = [sample_kinds(rng) for _ in range(600)]
    assert set(drawn) == {()} | {(kind,) for kind in KINDS} | set(FOUNDIR_TYPES.values())
    assert 0.2 < sum(len(kinds) > 1 for kinds in drawn) / 600 < 0.4
    assert len(FOUNDIR_TYPES) == 20


def test_held_out_pictures_are_never_trained_on() -> None:
    held = data.held_out()
    if not held:
        pytest.skip("scikit-image and scikit-learn are not installed")

    def digest(image: np.ndarray) -> str:
        return hashlib.sha256(image.tobytes() + str(image.shape).encode()).hexdigest()

    kept = data.photographs()
    assert kept and all(image.dtype == np.uint8 and image.shape[2] == 3 for image in kept)
    assert not {digest(image) for image in held.values()} & {digest(image) for image in kept}
    assert not set(data.HELD_OUT) & set(data.PHOTOGRAPHS)


@pytest.mark.parametrize("size", [1, 5, 64])
def test_pairs_are_seeded(size: int) -> None:
    def take(seed: int) -> list[dict[str, torch.Tensor | str]]:
        pairs = iter(data.PairDataset(size, seed=seed))
        return [next(pairs) for _ in range(8)]

    for one, two in zip(take(1), take(1), strict=True):
        assert one["kinds"] == two["kinds"]
        for key in ("clean", "damaged"):
            first, second = one[key], two[key]
            assert isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor)
            assert first.shape == (3, size, size) and first.dtype == torch.float32
            assert torch.equal(first, second)
            assert float(first.min()) >= 0 and float(first.max()) <= 1
    pairs = zip(take(1), take(2), strict=True)
    assert any(
        not torch.equal(torch.as_tensor(a["clean"]), torch.as_tensor(b["clean"])) for a, b in pairs
    )


def test_training_sees_more_of_dull_haze() -> None:
    """Airlights below 0.75 are 0.43 of the range; a share of the draws takes no others."""
    crops = data.CleanCrops(4, np.random.default_rng(0), procedural_share=1.0)
    labels = (data.drawn_pair(crops, mixtures=0.25)[2] for _ in range(2000))
    found = [float(x.parameters["haze"]["airlight"]) for x in labels if "haze" in x.kinds]
    assert len(found) > 300
    expected = data.DULL_SHARE + (1 - data.DULL_SHARE) * 0.15 / 0.35
    assert sum(a < 0.75 for a in found) / len(found) == pytest.approx(expected, abs=0.08)


def test_user_folder(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    Image.new("L", (20, 30), 200).save(tmp_path / "deep" / "one.JPG")
    Image.new("RGBA", (3, 4), (255, 0, 0, 128)).save(tmp_path / "two.png")
    (tmp_path / "notes.txt").write_text("no picture")
    assert [path.name for path in data.folder(tmp_path)] == ["one.JPG", "two.png"]
    crops = data.CleanCrops(16, np.random.default_rng(0), 0.0, tmp_path, folder_share=1.0)
    for _ in range(6):
        check(next(crops), (16, 16, 3))
    with pytest.raises(ValueError, match="got none"):
        data.folder(tmp_path / "nowhere")
