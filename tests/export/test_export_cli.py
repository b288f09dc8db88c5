"""`mimdit-export`: its messages and exit codes."""

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from export import cli, folder, parity
from export.libraries import ExportError
from export.onnx_export import Limits, Written
from export.runtime import ExportedPipeline
from tests.export.conftest import Exported


def reuse(source: Path) -> Any:
    """In place of an export that takes long: the files of an earlier one."""

    def copy(graph: Any, work: Path, limits: Limits, opset: int) -> Written:
        file = f"{graph.name}.onnx"
        shutil.copy(source / file, work / file)
        return Written(graph.name, file, 1, 0.0)

    return copy


def test_success(exported: Exported) -> None:
    assert exported.code == 0
    lines = exported.out.splitlines()
    assert lines[0].split() == ["graph", "nodes", "MB", "s", "output", "error", "gate", "verdict"]
    starts = [line.split()[0] for line in lines[1:] if not line.startswith(" ")]
    assert starts == ["pool", "conditioner", "denoiser", "picture", "wrote"]
    assert "FAILED" not in exported.out
    for stage in ("loading", "exporting conditioner", "checking 3×17×12 tokens"):
        assert stage in exported.err


def test_a_gate_that_fails(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(folder, "export_onnx", reuse(exported.folder))
    monkeypatch.setitem(parity.GATES, "fp32", 1e-12)
    target = tmp_path / "out"
    assert cli.main([str(exported.model), "--out", str(target), "--batch", "1..3"]) == 1
    out, err = capsys.readouterr()
    assert "FAILED" in out
    assert f"a gate failed; the files are in {target}.failed" in err
    assert not target.exists()
    assert (tmp_path / "out.failed" / "parity.json").is_file()
    with pytest.raises(ExportError, match="parity: expected passed, got failed"):
        ExportedPipeline(tmp_path / "out.failed", "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out.failed"]


def test_without_check(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(folder, "export_onnx", reuse(exported.folder))
    options = ["--out", str(tmp_path / "out"), "--no-check", "--batch", "1..3"]
    assert cli.main([str(exported.model), *options]) == 0
    assert capsys.readouterr().out.endswith("not checked\n")
    assert not (tmp_path / "out" / "parity.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--precision", "int8"], "invalid choice: 'int8'"),
        (["--sizes", "512"], "expected HxW or HxW,HxW,…, got '512'"),
        (["--sizes", "64x64", "--dynamic"], "not allowed with"),
        (["--batch", "2..4"], "expected 1 or 1..N, got '2..4'"),
        (["--trt"], "unrecognized arguments: --trt"),
    ],
    ids=str,
)
def test_wrong_arguments(options: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as error:
        cli.main(["--out", str(tmp_path / "out"), *options])
    assert error.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nowhere"], "no such model folder"),
        (["sd35-medium"], "sd35-medium ships without weights"),
        (["debug", "--sizes", "100x100"], "--sizes: expected multiples of 8 up to 128"),
        (["debug", "--sizes", "256x256"], "--sizes: expected multiples of 8 up to 128"),
    ],
    ids=str,
)
def test_one_sentence_errors(options: list[str], message: str, tmp_path: Path, capsys: Any) -> None:
    assert cli.main([*options, "--out", str(tmp_path / "out")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith(f"mimdit-export: {message}")
    assert not (tmp_path / "out").exists()


def test_other_files_are_kept(exported: Exported, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a.png").write_text("")
    assert cli.main([str(exported.model), "--out", str(tmp_path)]) == 1
    assert "holds other files than an export" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["onnx", "onnxscript", "onnxruntime", "tensorrt_rtx"])
def test_missing_libraries(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(cli.sys.modules, name, None)
    assert cli.main(["--out", str(tmp_path / "out"), "--trt-rtx"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"mimdit-export: {name} cannot be imported")
    assert err.count("\n") == 1
    extra = "trt-rtx" if name == "tensorrt_rtx" else "export"
    assert f"pip install 'mimdit[{extra}]'" in err


@pytest.mark.parametrize(
    ("options", "limits", "sizes"),
    [
        ([], Limits((1, 4), (8, 24)), [(2, 11, 13), (1, 16, 16), (3, 17, 12)]),
        (["--batch", "1"], Limits((1, 1), (8, 24)), [(1, 11, 13), (1, 16, 16), (1, 17, 12)]),
        (["--sizes", "128x128", "--batch", "1"], Limits((1, 1), (16, 16)), [(1, 16, 16)]),
        (
            ["--sizes", "64x96,192x128"],
            Limits((1, 4), (8, 24)),
            [(2, 11, 13), (1, 8, 12), (1, 24, 16), (3, 17, 12)],
        ),
    ],
    ids=str,
)
def test_plans(
    exported: Exported, options: list[str], limits: Limits, sizes: list[tuple[int, ...]]
) -> None:
    args = cli.build_parser().parse_args(["--out", "x", *options])
    settings = cli.plan(exported.pipe, args)
    assert settings.limits == limits
    assert list(settings.sizes) == sizes
