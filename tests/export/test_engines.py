"""Engines: TensorRT-RTX's are built for real, which takes no GPU; TensorRT's calls are recorded."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")

from export import cli, folder
from export.engines import Target, build_engine, profile_shapes
from export.graphs import graphs_of
from export.libraries import ExportError
from export.limits import Limits
from export.locate import Locator
from export.manifest import verify
from export.onnx_export import input_shapes
from export.runtime import ExportedPipeline
from mimdit.metrics import psnr
from tests.export import damage, fake_tensorrt
from tests.export.conftest import UNCHECKED, Exported, reuse, with_gpu

LIMITS = Limits((1, 3), (8, 24))


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


def test_faults_of_engines_have_a_place(
    exported: Exported, tensorrt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is right, and what is built of it is not."""
    build = tensorrt.Builder.build_serialized_network
    change = damage.weight("denoiser", "model.transformer_blocks.0.attn.to_out.0.weight", 8)

    def faulty(builder: Any, network: Any, config: Any) -> Any:
        change(Path(network.path))
        return build(builder, network, config)

    inputs = graphs_of(exported.pipe)[2].example(2, 9, 12)
    inputs = {name: x.detach() for name, x in inputs.items()}
    found = []
    for method in (build, faulty):
        monkeypatch.setattr(tensorrt.Builder, "build_serialized_network", method)
        options = (exported.pipe, exported.folder, LIMITS, 18, 1e-5, exported.programs)
        found.append(Locator(*options, target=Target("tensorrt"))("denoiser", inputs, False))
    assert found[0] == "no node is far off its traced one"
    place = r"first difference: block 0, \w+ \w+ in model\.transformer_blocks\.0\S*, error"
    assert re.match(place, found[1]), found


@pytest.mark.slow
def test_rtx_takes_the_graphs_that_places_are_looked_for_in(
    exported: Exported, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    from export import locate

    sizes: list[int] = []

    def session(path: Path, library: str) -> None:
        sizes.append(path.stat().st_size)
        raise ExportError("no GPU")

    monkeypatch.setattr(locate, "EngineSession", session)
    options = (exported.pipe, exported.folder, LIMITS, 18, 1e-5, exported.programs)
    locator = Locator(*options, target=Target("tensorrt_rtx", ("89",)))
    inputs = graphs_of(exported.pipe)[2].example(1, 8, 8)
    inputs = {name: x.detach() for name, x in inputs.items()}
    assert locator("denoiser", inputs, False) == "no place found (no GPU)"
    assert sizes[0] > (exported.folder / "denoiser.onnx").stat().st_size / 2


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
    command = [str(exported.model), "--out", str(target), *UNCHECKED, "--trt-rtx", "--sm"]
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
    command = [str(exported.model), "--out", str(tmp_path / "x"), "--trt-rtx", *UNCHECKED]
    assert cli.main(command) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("mimdit-export: pool: TensorRT-RTX cannot parse Nonsense node_")
    assert [*tmp_path.iterdir()] == []
