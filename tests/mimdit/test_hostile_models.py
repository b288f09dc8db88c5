"""Model folders that are not: refused in one sentence, before they run or fill memory."""

import json
import pickle
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mimdit.cli.restore import main
from mimdit.loading import assemble, load_pipeline
from mimdit.transformer import MiMDiTTransformer2DModel
from mimdit.vetting import check_folder

WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
Change = Callable[[Path], object]


class Evil:
    """Pickled, it makes a file where it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("hacked"),)


@pytest.fixture(scope="module")
def model(debug_model: MiMDiTTransformer2DModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sound") / "model"
    assemble(debug_model, 1).save_pretrained(folder)
    return folder


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Change:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


def json_of(name: str, **values: Any) -> Change:
    def change(data: bytes) -> bytes:
        return json.dumps(json.loads(data) | values).encode()

    return bytes_of(name, change)


def header(change: Callable[[dict[str, Any]], object]) -> Change:
    def changed(data: bytes) -> bytes:
        length = struct.unpack("<Q", data[:8])[0]
        head = json.loads(data[8 : 8 + length])
        new = change(head)
        text = json.dumps(head if new is None else new).encode()
        return struct.pack("<Q", len(text)) + text + data[8 + length :]

    return bytes_of(WEIGHTS, changed)


def first(head: dict[str, Any]) -> dict[str, Any]:
    return head[sorted(name for name in head if name != "__metadata__")[0]]


def pickled(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).with_suffix(".bin").write_bytes(pickle.dumps(Evil()))


def program(folder: Path) -> None:
    (folder / "vae" / "evil.py").write_text("from pathlib import Path\nPath('hacked').touch()\n")
    json_of("model_index.json", vae=["evil", "Evil"])(folder)


def hostile() -> Iterator[tuple[str, Change]]:
    yield "pickle alone", pickled
    yield "pickle inside", bytes_of(WEIGHTS, lambda _: pickle.dumps(Evil()))
    yield "program beside", program
    for i, length in enumerate((0, 1, 2**20, 10**8, 10**8 + 1, 2**32, 2**63, 2**64 - 1)):
        yield (
            f"header length {i}",
            bytes_of(WEIGHTS, lambda d, n=length: struct.pack("<Q", n) + d[8:]),
        )
    for i, text in enumerate(
        (b"", b"{", b"[]", b"7", b"{}", b"[" * 10**5, b"\xff" * 9, b'{"a": 5}')
    ):
        yield f"header text {i}", bytes_of(WEIGHTS, lambda d, t=text: struct.pack("<Q", len(t)) + t)
    for i in range(8):
        yield f"weights cut {i}", bytes_of(WEIGHTS, lambda d, i=i: d[: len(d) * i // 8])
    for end in (1, 7, 100):
        yield f"weights without the last {end}", bytes_of(WEIGHTS, lambda d, n=end: d[:-n])
    yield "weights with more", bytes_of(WEIGHTS, lambda d: d + b"\0" * 64)
    for i, shape in enumerate(([], [1], [2**40, 2**40], [-1], [0], ["5"], None, 7, [2**62, 4])):
        yield f"shape {i}", header(lambda h, s=shape: first(h).update(shape=s))
    for i, offsets in enumerate(([0, 2**40], [8, 0], [-8, 8], [0, 1], [2**63, 2**63 + 4], None)):
        yield f"offsets {i}", header(lambda h, o=offsets: first(h).update(data_offsets=o))
    for kind in ("F7", "U64", "", None, "BOOL"):
        yield f"type {kind}", header(lambda h, k=kind: first(h).update(dtype=k))
    yield "tensor missing", header(lambda h: h.pop(sorted(h)[1]) and None)
    yield "tensor renamed", header(lambda h: h.update(other=h.pop(sorted(h)[1])))
    yield "weights missing", lambda folder: (folder / WEIGHTS).unlink()
    yield "weights a folder", lambda f: ((f / WEIGHTS).unlink(), (f / WEIGHTS).mkdir())
    for name in ("model_index.json", "transformer/config.json"):
        yield f"{name} missing", lambda folder, n=name: (folder / n).unlink()
        for i, text in enumerate((b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 10**5)):
            yield f"{name} text {i}", bytes_of(name, lambda _, t=text: t)
    for name, values in {
        "num_layers": (0, -1, 1, 3, 10**9, 2.5, "2", None),
        "pos_embed_max_size": (0, -16, 10**6, "16"),
        "num_attention_heads": (0, -2, 3, 10**9),
        "attention_head_dim": (0, 7, 2**40),
        "mim_dim": (0, 5, 10**12),
        "experts": (0, 10**9),
        "top_k": (0, 99),
        "patch_size": (0, 3, 10**7),
        "in_channels": (0, 47, 10**10),
        "prompt_tokens": (0, -4, 10**14),
        "prompts": ([], "empty", ["a"] * 9),
        "groups": ([], ["nonsense"] * 4),
        "prediction_type": ("nonsense", None),
        "damage_std": (0, -0.4, float("nan"), float("inf"), "0.4", None),
    }.items():
        for i, value in enumerate(values):
            yield f"{name} {i}", json_of("transformer/config.json", **{name: value})
    for i, part in enumerate((["subprocess", "Popen"], ["os", "system"], ["diffusers"], ["", ""])):
        yield f"part {i}", json_of("model_index.json", vae=part)
    for name in ("transformer", "vae", "scheduler"):
        for i, part in enumerate(
            (None, 5, [None, None], ["diffusers", "logging"], ["mimdit.codec", "codec_factor"])
        ):
            yield f"{name} without a class {i}", json_of("model_index.json", **{name: part})
    yield "class with a program", json_of("model_index.json", _class_name=["pipeline", "Evil"])
    yield "factor 0", json_of("vae/config.json", factor=0)
    yield "codec without a file", lambda folder: (folder / "vae" / "config.json").unlink()


CASES = dict(hostile())


def opened(name: str) -> object:
    check_folder(Path(name))
    return load_pipeline(name)


@pytest.mark.parametrize("case", CASES)
def test_refused_in_one_sentence(
    case: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model, "model")
    CASES[case](Path("model"))
    with pytest.raises((ValueError, OSError)) as caught:
        opened("model")
    text = str(caught.value)
    assert text and len(text) < 600
    assert not list(tmp_path.rglob("hacked"))


def test_a_sound_model_passes(model: Path) -> None:
    assert len(CASES) > 90
    check_folder(model)


def test_the_command_line_says_it_in_a_line(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (9, 9)).save("a.png")
    for case in ("pickle alone", "header length 6", "weights cut 3", "tensor missing"):
        shutil.copytree(model, "model")
        CASES[case](Path("model"))
        assert main(["-i", "a.png", "-o", "out", "--model", "model", "--device", "cpu"]) == 1
        err = capsys.readouterr().err.splitlines()
        assert len(err) == 1 and err[0].startswith("mimdit-restore: cannot load the model 'model'")
        assert not list(tmp_path.rglob("hacked")) and not list(Path().glob("out/*.png"))
        shutil.rmtree("model")
