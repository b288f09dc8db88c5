"""Stored pairs to validate with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimdit.loading import assemble
from mimdit.presets import build
from training.config import Settings
from training.validation import Validator


def write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def settings(root: Path, **changes: object) -> Settings:
    run = Settings(output=str(root / "run"), validation_size=32, mixed_precision="no")
    return replace(run, validation_data=str(root), validation_dataset="folder", **changes)


def validator(run: Settings) -> Validator:
    Path(run.output).mkdir(parents=True, exist_ok=True)
    return Validator(assemble(build("debug").randomize_(0).eval(), 1), run)


def test_first_pairs_of_every_row_unscaled(tmp_path: Path) -> None:
    rng, pictures = np.random.default_rng(0), {}
    for row, side in (("rain", 48), ("snow", 20)):
        for i in range(6):
            for half in ("input", "target"):
                pictures[row, i, half] = rng.integers(0, 256, (side, side + 6, 3), dtype=np.uint8)
                write(tmp_path / half / row / f"{i}.png", pictures[row, i, half])
    found = validator(settings(tmp_path))
    assert [row for row, *_ in found.pairs] == ["rain"] * 4 + ["snow"] * 4
    _, damaged, clean = found.pairs[1]
    for array, half in ((damaged, "input"), (clean, "target")):
        expected = pictures["rain", 1, half][8:40, 11:43]
        np.testing.assert_array_equal(np.round(array * 255), expected)
    assert found.pairs[-1][1].shape == (20, 20, 3)
    figures, sheet = found(7)
    assert set(figures) == {"rain", "snow"} and {"psnr", "ssim"} <= set(figures["snow"])
    assert sheet.shape == (3, 3 * 32, 2 * 32)
    assert (tmp_path / "run/validation/step-7.png").is_file() and found.has(7)


def test_splits_that_are_not_trained_on_come_first(tmp_path: Path) -> None:
    for part, value in (("train", 10), ("test", 200)):
        for half in ("input", "target"):
            write(tmp_path / part / half / "a.png", np.full((32, 32, 3), value, np.uint8))
    assert [float(clean.max()) for _, _, clean in validator(settings(tmp_path)).pairs] == [
        pytest.approx(200 / 255)
    ]
    write(tmp_path / "val/input/b.png", np.full((32, 32, 3), 90, np.uint8))
    write(tmp_path / "val/target/b.png", np.full((32, 32, 3), 90, np.uint8))
    assert validator(settings(tmp_path)).pairs[0][1].max() == pytest.approx(90 / 255)


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (((40, 40), (40, 32)), r"a\.png in the size of its original, 32×40, got 40×40"),
        (((10, 40), (10, 40)), r"at least 11×11 pixels, .*a\.png of 40×10"),
    ],
    ids=["unlike", "small"],
)
def test_pairs_that_cannot_be_compared(
    tmp_path: Path, sizes: tuple[tuple[int, int], ...], sentence: str
) -> None:
    for half, size in zip(("input", "target"), sizes, strict=True):
        write(tmp_path / half / "a.png", np.zeros((*size, 3), np.uint8))
    with pytest.raises(ValueError, match=sentence):
        validator(settings(tmp_path))


def test_damaged_pictures_alone(tmp_path: Path) -> None:
    write(tmp_path / "a.png", np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"expected an original of .*a\.png, found none"):
        validator(settings(tmp_path))
