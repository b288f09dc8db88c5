"""Folders that are not what they were are refused, and none is ever half written."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("onnxruntime")

from export.libraries import ExportError
from export.manifest import finished_folder, verify, weights_hash, write_manifest
from export.runtime import ExportedPipeline
from tests.export.conftest import Exported, pipeline


@pytest.fixture
def copy(exported: Exported, tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported.folder, tmp_path / "copy"))


def test_whole(exported: Exported) -> None:
    manifest = verify(exported.folder)
    assert set(manifest["files"]) == {
        *(f"{name}.onnx" for name in ("pool", "conditioner", "denoiser")),
        "prompts.npz",
        "parity.json",
    }
    assert manifest["limits"] == {"batch": [1, 3], "side": [8, 24]}
    assert manifest["parity"] == "passed"
    parts = (exported.pipe.transformer, exported.pipe.vae)
    assert manifest["model"]["weights"] == weights_hash(parts)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def shorten(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def set_precision(path: Path) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"precision": "fp16"}))


def set_format(path: Path) -> None:
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps(manifest | {"format": 0}))


@pytest.mark.parametrize(
    ("name", "change", "field"),
    [
        ("denoiser.onnx", flip, "files.denoiser.onnx.sha256: expected"),
        ("conditioner.onnx", shorten, "files.conditioner.onnx.bytes: expected"),
        ("pool.onnx", Path.unlink, "files.pool.onnx is missing"),
        ("prompts.npz", flip, "files.prompts.npz.sha256: expected"),
        ("manifest.json", set_precision, "sha256: expected"),
        ("manifest.json", set_format, "format: expected 3, got 0"),
        ("manifest.json", shorten, "not|sha256|manifest.json"),
        ("manifest.json", lambda path: path.write_text("{"), "manifest.json cannot be read"),
        ("manifest.json", lambda path: path.write_text("[]"), "manifest.json is no JSON object"),
        ("manifest.json", Path.unlink, "not an exported folder"),
    ],
)
def test_changes_are_refused(
    copy: Path, name: str, change: Callable[[Path], None], field: str
) -> None:
    change(copy / name)
    if name == "manifest.json" and change is shorten:
        # Only the last line's end is gone: still the same manifest.
        verify(copy)
        return
    for read in (verify, ExportedPipeline):
        with pytest.raises(ExportError, match=field) as error:
            read(copy)
        assert "\n" not in str(error.value)


def test_stale(exported: Exported) -> None:
    other = pipeline(seed=1)
    weights = weights_hash((other.transformer, other.vae))
    with pytest.raises(ExportError, match=r"model\.weights: expected"):
        verify(exported.folder, {"precision": "fp32", "model.weights": weights})
    with pytest.raises(ExportError, match="opset: expected 23, got 18"):
        verify(exported.folder, {"opset": 23})


def test_weights_hash_sees_names_types_and_values() -> None:
    class One(nn.Module):
        def __init__(self, x: torch.Tensor, name: str = "x") -> None:
            super().__init__()
            self.register_buffer(name, x)

    x = torch.arange(6.0)
    changed = [x + 1e-7, x.double(), x.view(2, 3), x.flip(0)]
    hashes = {weights_hash([One(v)]) for v in [x, *changed]} | {weights_hash([One(x, "y")])}
    assert len(hashes) == 6
    assert weights_hash([One(x.clone())]) in hashes
    assert weights_hash([One(x), One(x + 1)]) != weights_hash([One(x + 1), One(x)])


def test_a_failed_export_leaves_what_was_there(tmp_path: Path) -> None:
    target = tmp_path / "out"
    for content in ("first", "second"):
        with finished_folder(target) as work:
            (work / "x").write_text(content)
            assert not (target / "manifest.json").exists() or content == "second"
            write_manifest(work, {})
        assert (target / "x").read_text() == content
        verify(target)

    def stopped() -> None:
        with finished_folder(target) as work:
            (work / "x").write_text("third")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert (target / "x").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from pathlib import Path
from export.manifest import finished_folder

with finished_folder(Path(sys.argv[1])) as work:
    (work / "x").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_export_leaves_nothing_that_looks_finished(tmp_path: Path) -> None:
    target = tmp_path / "[out]*"
    with finished_folder(target) as work:
        write_manifest(work, {})
    path = os.pathsep.join(p for p in (os.getcwd(), *sys.path) if p)
    command = [sys.executable, "-c", KILLED, str(target)]
    killed = subprocess.run(command, env=os.environ | {"PYTHONPATH": path})
    assert killed.returncode == -signal.SIGKILL
    verify(target)
    assert [path.name for path in target.iterdir()] == ["manifest.json"]
    (left,) = (path for path in tmp_path.iterdir() if path != target)
    assert left.name.startswith(".") and (left / "x").read_text() == "half"
    # The next export takes it away, but not what others are still writing.
    with finished_folder(target) as one:
        assert not left.exists()
        with finished_folder(target) as two:
            assert one.exists()
            write_manifest(two, {"by": 2})
        assert verify(target)["by"] == 2
        write_manifest(one, {"by": 1})
    assert verify(target)["by"] == 1
    assert [*tmp_path.iterdir()] == [target]


def test_other_folders_are_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_text("")
    (tmp_path / "file").write_text("")
    for name, message in (("photos", "holds other files"), ("file", "is a file")):
        with pytest.raises(ExportError, match=message), finished_folder(tmp_path / name):
            raise AssertionError


def test_graphs_name_their_axes_and_no_places(exported: Exported) -> None:
    import onnx

    for path in exported.folder.glob("*.onnx"):
        data = path.read_bytes()
        assert str(Path.cwd()).encode() not in data and b"site-packages" not in data
        model = onnx.load_model_from_string(data)
        shape = model.graph.input[0].type.tensor_type.shape.dim
        assert [d.dim_param or d.dim_value for d in shape] == ["batch", 48, "2*rows", "2*columns"]
