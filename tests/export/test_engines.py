"""Engines: TensorRT-RTX's are built for real, which takes no GPU; TensorRT's calls are recorded."""

import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")

from export import backends, cache, cli, engines, folder
from export.cache import differs
from export.engines import Target, build_engine, profile_shapes
from export.graphs import graphs_of
from export.libraries import ExportError
from export.manifest import verify
from export.onnx_export import Limits, input_shapes
from export.runtime import ExportedPipeline
from export.sessions import EngineSession
from mimdit.metrics import psnr
from tests.export import damage, fake_tensorrt
from tests.export.conftest import Exported, reuse

A = {"name": "GPU A", "capability": "90"}
LIMITS = Limits((1, 3), (8, 24))
SMALL = ["--batch", "1..3", "--no-check"]


def with_gpu(patch: pytest.MonkeyPatch, found: dict[str, str] | None) -> None:
    for module in (engines, cache, backends):
        patch.setattr(module, "gpu", lambda: found)


@pytest.fixture
def tensorrt(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A recording `tensorrt`, a GPU, and sessions whose memory is the CPU's."""
    fake = fake_tensorrt.module("10.16.1")
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    with_gpu(monkeypatch, A)
    monkeypatch.setattr(backends, "EngineSession", partial(EngineSession, device="cpu"))
    return fake


@pytest.fixture
def built(
    exported: Exported, tensorrt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """A folder with engines of the stand-in; its picture is checked after one step."""
    monkeypatch.setattr("export.plan.STEPS", 1)
    monkeypatch.setattr(folder, "export_onnx", reuse(exported))
    target = tmp_path / "built"
    assert cli.main([str(exported.model), "--out", str(target), "--trt", *SMALL]) == 0
    return target


@pytest.mark.parametrize(("version", "flags"), [("10.16.1", 2), ("11.3.0", 0)])
def test_one_builder_for_both_versions(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, flags: int
) -> None:
    fake = fake_tensorrt.module(version)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)
    (pool, *_) = graphs_of(exported.pipe)
    shutil.copy(exported.folder / "pool.onnx", tmp_path)
    stages: list[str] = []
    target = Target("tensorrt", workspace=2**30)
    engine = build_engine(tmp_path, pool, LIMITS, 16, target, stages.append)
    shapes = [[1, 48, 16, 16], [1, 48, 32, 32], [3, 48, 48, 48]]
    assert fake.calls == [
        ("create_network", flags),
        ("profile", {"z_lq": tuple(shapes)}),
        ("clear_flag", "TF32"),
        ("limit", "WORKSPACE", 2**30),
        ("build", "pool.onnx"),
    ]
    assert stages == [f"pool: building engine, step {i} of 2" for i in (1, 2)]
    assert (tmp_path / engine.file).read_bytes() == (tmp_path / "pool.onnx").read_bytes()
    report = json.loads((tmp_path / engine.report).read_text())
    assert report["Layers"] == ["Name: a", "Name: b"]


def test_profiles_are_those_of_the_files(exported: Exported) -> None:
    """Keys of the cache are known before a network is parsed."""
    import onnx

    for graph in graphs_of(exported.pipe):
        model = onnx.load(exported.folder / f"{graph.name}.onnx", load_external_data=False)
        inputs = {
            value.name: [d.dim_value or -1 for d in value.type.tensor_type.shape.dim]
            for value in model.graph.input
        }
        assert inputs == input_shapes(graph, LIMITS)
        assert profile_shapes(graph, inputs, LIMITS, 16)["z_lq"][1][2:] == [32, 32]


def test_restores_through_engines(exported: Exported, built: Path) -> None:
    runtime = ExportedPipeline(built, runtime="tensorrt")
    assert runtime.runtime == "tensorrt"
    assert ExportedPipeline(built).runtime == "tensorrt"
    assert ExportedPipeline(built, "cpu").runtime == "onnxruntime"
    runtime.set_progress_bar_config(disable=True)
    x = np.random.default_rng(0).random((2, 131, 150, 3), dtype=np.float32)
    ours, theirs = (
        call(x, 1, generator=torch.Generator().manual_seed(3), tile=96, output_type="np")
        for call in (runtime, exported.pipe)
    )
    assert psnr(torch.from_numpy(ours.images), torch.from_numpy(theirs.images)) > 60
    with pytest.raises(ExportError, match=r"z_lq: expected shapes from 1×1 to 2×2, got 1×48×20000"):
        runtime.graphs["pool"](z_lq=torch.zeros(1, 48, 20000, 2))


def test_engines_are_compared_where_they_run(
    exported: Exported, built: Path, capsys: Any, tensorrt: Any
) -> None:
    assert cli.main(["--check", str(built)]) == 0
    out = capsys.readouterr().out
    assert "denoiser (tensorrt)" in out and "engine reused, compared above (tensorrt)" in out


def test_equal_keys_reuse_engines(
    exported: Exported, built: Path, tensorrt: Any, capsys: Any
) -> None:
    count = len([call for call in tensorrt.calls if call[0] == "build"])
    command = [str(exported.model), "--out", str(built), "--trt", *SMALL]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("engine reused") == count == 3
    assert len([call for call in tensorrt.calls if call[0] == "build"]) == count
    assert cli.main([*command, "--workspace", "1"]) == 0
    captured = capsys.readouterr()
    assert "building an engine of pool, as workspace: expected 1073741824, got None" in captured.err
    assert captured.out.count("engine built") == 3
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
            {"found": A | {"name": "GPU B"}},
            "pool.trt.engine: gpu: expected 'GPU B', got 'GPU A'; export again",
        ),
        (
            {"found": A | {"capability": "120"}},
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
    if change.get("found", A):
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


def test_what_is_missing_is_said(
    exported: Exported, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with_gpu(monkeypatch, None)
    assert cli.main([str(exported.model), "--out", str(tmp_path / "x"), "--trt"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("mimdit-export: tensorrt cannot be imported")
    assert "pip install 'mimdit[trt]'" in line and "NVIDIA GPU" in line
    with pytest.raises(ExportError, match=r"engines\.tensorrt\.pool: expected an engine"):
        ExportedPipeline(exported.folder, runtime="tensorrt")
    with pytest.raises(ExportError, match=r"runtime: expected one of auto, .*, got 'torch'"):
        ExportedPipeline(exported.folder, runtime="torch")


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_an_interrupted_build_stops(
    exported: Exported, tensorrt: Any, tmp_path: Path, name: str
) -> None:
    pytest.importorskip(name)
    (pool, *_) = graphs_of(exported.pipe)
    shutil.copy(exported.folder / "pool.onnx", tmp_path)

    target = Target(name, ("89",) if name == "tensorrt_rtx" else ())

    def interrupt(stage: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(tmp_path, pool, LIMITS, 16, target, interrupt)
    assert [path.name for path in tmp_path.iterdir()] == ["pool.onnx"]


def test_rtx_engines_without_a_gpu(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(folder, "export_onnx", reuse(exported))
    target = tmp_path / "out"
    command = [str(exported.model), "--out", str(target), *SMALL, "--trt-rtx", "--sm"]
    assert cli.main([*command, "89,120"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("engine built, not run (tensorrt_rtx)") == 3
    manifest = verify(target)
    entry = manifest["engines"]["tensorrt_rtx"]["denoiser"]
    assert entry["key"]["capabilities"] == ["89", "120"]
    assert entry["key"]["version"] == trt.__version__ == manifest["versions"]["tensorrt-rtx"]
    path = target / entry["file"]
    assert path.stat().st_size > (exported.folder / "denoiser.onnx").stat().st_size / 2
    assert len(json.loads((target / entry["report"]).read_text())["Layers"]) > 10
    # Without a GPU the library can tell no more than that these are engines of its own.
    malformed = int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    data = path.read_bytes()
    assert not runtime.get_engine_validity(data)[1] & malformed
    assert runtime.get_engine_validity(bytes(len(data)))[1] & malformed
    assert cli.main([*command, "89,120"]) == 0
    assert capsys.readouterr().out.count("engine reused, not run") == 3


def test_rtx_errors_are_one_sentence(exported: Exported, tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    command = [str(exported.model), "--out", str(tmp_path / "x"), "--trt-rtx", "--sm", "12"]
    assert cli.main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "mimdit-export: --sm: expected some of 75, 80, 86, 89, 120, 121, got '12'"
    (pool, *_) = graphs_of(exported.pipe)
    target = Target("tensorrt_rtx", ("89",))
    (tmp_path / "pool.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="pool: TensorRT-RTX cannot parse"):
        build_engine(tmp_path, pool, LIMITS, 16, target)
    assert not (tmp_path / "x").exists()


def test_an_operator_that_rtx_lacks(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    pytest.importorskip("tensorrt_rtx")
    change = damage.unknown_operator("pool")
    monkeypatch.setattr(folder, "export_onnx", reuse(exported, change))
    command = [str(exported.model), "--out", str(tmp_path / "x"), "--trt-rtx", *SMALL]
    assert cli.main(command) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("mimdit-export: pool: TensorRT-RTX cannot parse Nonsense node_")
    assert [*tmp_path.iterdir()] == []
