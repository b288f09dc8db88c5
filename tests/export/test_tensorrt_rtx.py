"""Engines are built for real, without a GPU; running them needs one."""

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")
pytest.importorskip("tensorrt_rtx")

from export import cli, folder
from export.graphs import graphs_of
from export.libraries import ExportError
from export.manifest import verify
from export.onnx_export import Limits
from export.tensorrt_rtx import build_engine
from tests.export.conftest import Exported
from tests.export.test_export_cli import reuse


def test_folder_with_engines(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(folder, "export_onnx", reuse(exported.folder))
    options = ["--out", str(tmp_path / "out"), "--no-check", "--batch", "1..3", "--trt-rtx"]
    assert cli.main([str(exported.model), *options, "--sm", "89,120"]) == 0
    assert capsys.readouterr().out.count("engine built, not run") == 3
    manifest = verify(tmp_path / "out")
    assert manifest["engines"]["denoiser"]["capabilities"] == ["89", "120"]
    assert manifest["versions"]["tensorrt-rtx"] != "none"
    path = tmp_path / "out" / manifest["engines"]["denoiser"]["file"]
    assert path.stat().st_size > (exported.folder / "denoiser.onnx").stat().st_size / 2
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExportError, match=r"files\.denoiser\.rtx\.engine\.bytes: expected"):
        verify(tmp_path / "out")


def test_errors_are_one_sentence(exported: Exported, tmp_path: Path) -> None:
    (pool, *_) = graphs_of(exported.pipe)
    limits = Limits((1, 3), (8, 24))
    shutil.copy(exported.folder / "pool.onnx", tmp_path)
    with pytest.raises(ExportError, match="--sm: TensorRT-RTX does not build for '12'"):
        build_engine(tmp_path, pool, limits, 16, ["12"])
    (tmp_path / "pool.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="pool: TensorRT-RTX cannot parse"):
        build_engine(tmp_path, pool, limits, 16, ["89"])
