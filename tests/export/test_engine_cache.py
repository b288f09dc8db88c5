"""Engines are kept by all that they depend on, and refused where one of it differs."""

import shutil
import warnings
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from export import cache, cli, compare, folder
from export.cache import differs
from export.engines import Target
from export.libraries import ExportError
from export.runtime import ExportedPipeline
from mimdit.cli.model import load
from tests.export.conftest import GPU_A, UNCHECKED, Exported, reuse, with_gpu


def test_equal_keys_reuse_engines(
    exported: Exported, built: Path, tensorrt: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(folder, "export_onnx", reuse(exported))
    command = [str(exported.model), "--out", str(built), "--trt", *UNCHECKED]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("engine reused") == 3
    assert not [call for call in tensorrt.calls if call[0] == "build"]
    assert cli.main([*command, "--workspace", "1"]) == 0
    captured = capsys.readouterr()
    assert "building an engine of pool, as workspace: expected 1073741824, got None" in captured.err
    assert captured.out.count("engine built") == 3
    assert len([call for call in tensorrt.calls if call[0] == "build"]) == 3
    tensorrt.__version__ = "10.17.0"
    assert cli.main([*command, "--workspace", "1"]) == 0
    assert "as version: expected '10.17.0', got '10.16.1'" in capsys.readouterr().err
    # A damaged engine is not carried on.
    (built / "pool.trt.engine").write_bytes(b"")
    assert cli.main([*command, "--workspace", "1"]) == 0
    assert "reused" not in capsys.readouterr().out


def test_keys_differ_by_every_field(exported: Exported, tmp_path: Path, tensorrt: Any) -> None:
    path = tmp_path / "pool.onnx"
    shutil.copy(exported.folder / "pool.onnx", path)
    shapes = {"z_lq": [[1], [2], [3]]}
    given: dict[str, Any] = {
        "graph": path,
        "target": Target("tensorrt"),
        "shapes": shapes,
        "precision": "fp32",
        "weights": "a",
    }
    key = cache.engine_key(**given)
    assert differs(key, cache.engine_key(**given)) == ""
    changes = {
        "weights": {"weights": "b"},
        "profile": {"shapes": {"z_lq": [[1], [2], [4]]}},
        "precision": {"precision": "fp16"},
        "workspace": {"target": Target("tensorrt", workspace=1)},
        "gpu": {"target": Target("tensorrt", ("90",))},
    }
    for field, change in changes.items():
        assert differs(key, cache.engine_key(**(given | change))).startswith(f"{field}: expected")
    path.write_bytes(path.read_bytes() + b"\0")
    assert differs(key, cache.engine_key(**given)).startswith("graph: expected")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"found": None}, "pool.trt.engine: expected an NVIDIA GPU that torch can use, found none"),
        (
            {"found": GPU_A | {"name": "GPU B"}},
            "pool.trt.engine: gpu: expected 'GPU B', got 'GPU A'; export again",
        ),
        (
            {"found": GPU_A | {"capability": "120"}},
            "pool.trt.engine: capabilities: expected one with 120, the GPU's, got 90; export again",
        ),
        (
            {"version": "11.3.0"},
            "pool.trt.engine: version: expected '11.3.0', got '10.16.1'; export again",
        ),
    ],
    ids=["no-gpu", "name", "capability", "version"],
)
def test_foreign_engines_are_refused(
    built: Path,
    monkeypatch: pytest.MonkeyPatch,
    tensorrt: Any,
    change: dict[str, Any],
    message: str,
) -> None:
    if "version" in change:
        tensorrt.__version__ = change["version"]
    else:
        with_gpu(monkeypatch, change["found"])
    with pytest.raises(ExportError) as error:
        ExportedPipeline(built, runtime="tensorrt")
    assert str(error.value) == message
    if change.get("found", GPU_A):
        with pytest.warns(UserWarning, match="ONNX Runtime takes its place"):
            assert ExportedPipeline(built).runtime == "onnxruntime"


def test_tampered_engines_are_refused(built: Path) -> None:
    path = built / "denoiser.trt.engine"
    data = path.read_bytes()
    for changed, field in ((data[:-1], "bytes"), (data[:-1] + b"\0\0", "bytes"), (b"", "bytes")):
        path.write_bytes(changed)
        with pytest.raises(ExportError, match=rf"files\.denoiser\.trt\.engine\.{field}: expected"):
            ExportedPipeline(built, runtime="tensorrt")
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(ExportError, match=r"files\.denoiser\.trt\.engine\.sha256: expected"):
        ExportedPipeline(built, runtime="tensorrt")


def test_engines_are_compared_where_onnx_runtime_lacks_their_precision(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    def lacks(*_: Any) -> None:
        raise ExportError("precision: expected another one")

    monkeypatch.setattr(compare, "require_precision", lacks)
    assert cli.main(["--check", str(built)]) == 0
    captured = capsys.readouterr()
    assert "leaving out ONNX Runtime (precision: expected another one" in captured.err
    rows = [line.split()[0] for line in captured.out.splitlines() if "(tensorrt)" in line]
    assert {"pool", "conditioner", "denoiser", "picture"} <= set(rows)
    with_gpu(monkeypatch, None)
    assert cli.main(["--check", str(built)]) == 1
    assert "mimdit-export: precision: expected another one" in capsys.readouterr().err


def test_what_takes_an_engines_place_is_said(
    built: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """By `mimdit-restore`, too, which is silent about warnings."""
    entry = SimpleNamespace(load=lambda: ExportedPipeline)
    monkeypatch.setattr("mimdit.cli.model.entry_points", lambda **_: [entry])
    with_gpu(monkeypatch, GPU_A | {"name": "GPU B"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = load(Namespace(debug=False, engine=built, device="auto"))
    assert pipe.runtime == "onnxruntime"
    assert capsys.readouterr().err == (
        "note: pool.trt.engine: gpu: expected 'GPU B', got 'GPU A'; export again; "
        "ONNX Runtime takes its place\n"
    )
