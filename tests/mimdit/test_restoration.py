"""`mimdit.restore`: kinds of pictures in and out, files, models by name."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mimdit.cli.restore import main
from mimdit.image_io import PictureError, read_picture
from mimdit.loading import assemble
from mimdit.pipeline import MiMDiTPipeline
from mimdit.restoration import pick_device, restore
from mimdit.transformer import MiMDiTTransformer2DModel

RNG = np.random.default_rng(3)


@pytest.fixture(scope="module")
def pipe(debug_model: MiMDiTTransformer2DModel) -> MiMDiTPipeline:
    pipe = assemble(debug_model, 1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return RNG.integers(0, 256, (33, 40, 3), np.uint8)


def test_what_comes_back_is_what_was_given(pipe: MiMDiTPipeline, pixels: np.ndarray) -> None:
    floats = pixels.astype(np.float32) / 255
    image = Image.fromarray(pixels)
    wanted = pipe(image, generator=torch.Generator().manual_seed(2), output_type="np").images[0]
    whole = np.rint(wanted * 255).astype(np.uint8)
    assert np.array_equal(np.asarray(restore(image, model=pipe, seed=2)), whole)
    assert np.array_equal(restore(pixels, model=pipe, seed=2), whole)
    assert np.array_equal(restore(floats, model=pipe, seed=2), wanted)
    assert restore(floats.astype(np.float64), model=pipe).dtype == np.float64
    deep = restore(pixels.astype(np.uint16) * 257, model=pipe, seed=2)
    assert deep.dtype == np.uint16 and np.array_equal(deep, np.rint(wanted * 65535))
    tensor = torch.from_numpy(floats).movedim(-1, 0)
    out = restore(tensor, model=pipe, seed=2)
    assert torch.equal(out, torch.from_numpy(wanted).movedim(-1, 0))
    batch = restore(tensor.repeat(2, 1, 1, 1), model=pipe)
    assert batch.shape == (2, 3, 33, 40)
    assert restore(np.stack([floats] * 2), model=pipe).shape == (2, 33, 40, 3)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "I;16", "1"])
def test_modes_of_pil(pipe: MiMDiTPipeline, pixels: np.ndarray, mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels).convert(mode)
    if mode.endswith("A"):
        image.putalpha(Image.fromarray(pixels[..., 1]))
    out = restore(image, model=pipe, strength=0)
    assert out.mode == {"P": "RGB", "1": "L"}.get(mode, mode) and out.size == image.size
    wanted = image if mode == "I;16" else image.convert(out.mode)
    assert np.array_equal(np.asarray(out), np.asarray(wanted))


def test_files_as_the_command_line_writes_them(
    pipe: MiMDiTPipeline, pixels: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    Image.fromarray(pixels).save("a.png", exif=exif, icc_profile=b"\0" * 16 + b"RGB " + b"\0" * 200)
    pipe.save_pretrained("model")
    out = restore("a.png", "b.png", model="model", device="cpu", seed=4)
    # Upright: the sides have changed places.
    assert out.size == (33, 40) and out.info["icc_profile"][16:20] == b"RGB "
    command = ["-i", "a.png", "-o", "c.png", "--model", "model", "--device", "cpu", "--seed", "4"]
    assert main(command) == 0
    assert Path("b.png").read_bytes() == Path("c.png").read_bytes()
    picture = read_picture("b.png")
    assert picture.exif is not None and b"Maker" in picture.exif
    assert np.array_equal(np.rint(picture.rgb * 255), np.asarray(out))
    with pytest.raises(PictureError, match="exists; pass overwrite=True"):
        restore(Path("a.png"), Path("b.png"), model=pipe)
    restore(Path("a.png"), Path("b.png"), model=pipe, strength=0, overwrite=True)
    assert np.array_equal(read_picture("b.png").rgb, read_picture("a.png").rgb)
    names = {"none.png": "no such file", "model": "is a folder", "a" * 300: "no such file"}
    for name, words in names.items():
        with pytest.raises(PictureError, match=words):
            restore(name, model=pipe)
    with pytest.raises(PictureError, match="cannot write"):
        restore("a.png", "b.gif", model=pipe)
    # Known before the work, not after it.
    with pytest.raises(PictureError, match="none: no such file or folder"):
        restore("a.png", "none/b.png", model="no model")
    with pytest.raises(ValueError, match="got a batch of 2"):
        restore(np.zeros((2, 9, 9, 3), np.uint8), "d.png", model=pipe)


def test_depth_of_arrays_and_floats_of_pil(pipe: MiMDiTPipeline, tmp_path: Path) -> None:
    deep = RNG.integers(0, 65536, (9, 12, 3), np.uint16)
    out = restore(deep, tmp_path / "a.png", model=pipe, strength=0)
    assert np.array_equal(out, deep)
    # As binary files of other machines hold it.
    turned = restore(deep.astype(">u2"), model=pipe, strength=0)
    assert turned.dtype == np.dtype(">u2") and np.array_equal(turned, deep)
    written = read_picture(tmp_path / "a.png")
    assert written.bits == 16 and np.array_equal(np.rint(written.rgb * 65535), deep)
    gray = deep[..., 0].astype(np.float32) / 65535
    image = restore(Image.fromarray(gray), model=pipe, strength=0)
    assert image.mode == "I;16" and np.array_equal(np.asarray(image), deep[..., 0])
    with pytest.raises(ValueError, match=r"values in \[0, 1\], got .* to 25"):
        restore(Image.fromarray(gray * 255), model=pipe)


@pytest.mark.parametrize(
    ("image", "options", "message"),
    [
        ([np.zeros((9, 9, 3), np.uint8)], {}, "expected the path of a file, .* got list"),
        (b"a.png", {}, "expected the path of a file, .* got bytes"),
        (np.zeros((9, 9, 3), np.uint8), {"seed": -1}, "seed: expected a whole number .* got -1"),
        (np.zeros((9, 9, 3), np.uint8), {"seed": 1.5}, "seed: expected a whole number .* got 1.5"),
        (np.zeros((9, 9, 3), np.uint8), {"seed": 2**63}, "seed: expected a whole number"),
    ],
)
def test_what_cannot_be_restored_is_said_before_a_model_is_loaded(
    image: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        restore(image, model="no model", **options)


def test_models_stay_until_their_files_change(
    pipe: MiMDiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []

    def load(name: str, device: str, precision: str | None) -> MiMDiTPipeline:
        loads.append((name, device, precision))
        return pipe

    monkeypatch.setattr("mimdit.loading.load_pipeline", load)
    monkeypatch.setattr("mimdit.engine.accelerate", lambda pipe: pipe)
    (tmp_path / "config.json").write_text("{}")
    x = np.zeros((9, 9, 3), np.uint8)
    for _ in range(2):
        restore(x, model=tmp_path, device="cpu", precision="fp32")
    assert loads == [(str(tmp_path), "cpu", "fp32")]
    os.utime(tmp_path / "config.json", ns=(0, 2**62))
    restore(x, model=tmp_path, device="cpu", precision="fp32")
    assert len(loads) == 2


def test_options_and_progress_reach_the_pipeline(pipe: MiMDiTPipeline) -> None:
    x = RNG.random((150, 40, 3), np.float32)
    seen: list[tuple[int, int]] = []
    out = restore(
        x,
        model=pipe,
        steps=2,
        shifts=2,
        seed=1,
        tile=128,
        tile_overlap=16,
        experts={"se": 1.0},
        routing="tile",
        color_fix="wavelet",
        progress=lambda *a: seen.append(a),
    )
    wanted = pipe(
        x,
        2,
        2,
        generator=torch.Generator().manual_seed(1),
        output_type="np",
        tile=128,
        tile_overlap=16,
        experts={"se": 1.0},
        routing="tile",
        color_fix="wavelet",
    ).images[0]
    assert np.array_equal(out, wanted)
    assert [total for _, total in seen] == [seen[-1][0]] * len(seen)
    assert [done for done, _ in seen] == list(range(1, len(seen) + 1)) and len(seen) >= 8

    def enough(done: int, total: int) -> None:
        raise StopIteration

    with pytest.raises(StopIteration):
        restore(x, model=pipe, progress=enough)
    with pytest.raises(ValueError, match="strength: expected 0 to 1"):
        restore(x, model=pipe, strength=3)


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert pick_device("auto") == pick_device("cpu") == "cpu"
    for name in ("cuda:1", "mps"):
        with pytest.raises(ValueError, match=f"device {name} is not available"):
            pick_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [pick_device(n) for n in ("auto", "cuda", "cuda:1")] == ["cuda", "cuda", "cuda:1"]
    for name in ("cuda:2", "gpu", "mps"):
        with pytest.raises(ValueError, match=f"device {name} is not available"):
            pick_device(name)
