"""`mimdit-export`: its messages and exit codes."""

import os
import re
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("onnxruntime")

from export import checks, cli, folder
from export.graphs import Pool, traceable
from export.libraries import ExportError
from export.limits import Limits
from export.manifest import verify, write_manifest
from export.onnx_export import export_onnx
from export.runtime import ExportedPipeline
from export.sessions import Session
from tests.export import damage
from tests.export.conftest import Exported, reuse


def test_success(exported: Exported) -> None:
    assert exported.code == 0
    lines = exported.out.splitlines()
    assert lines[0].split() == ["graph", "nodes", "MB", "s", "output", "error", "gate", "verdict"]
    starts = [line.split()[0] for line in lines[1:] if not line.startswith(" ")]
    assert starts == ["pool", "conditioner", "denoiser", "picture", "wrote"], exported.out
    assert "FAILED" not in exported.out
    for stage in ("loading", "exporting conditioner", "checking 3×17×12 tokens"):
        assert stage in exported.err


def test_a_gate_that_fails(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(folder, "export_onnx", reuse(exported))
    monkeypatch.setitem(checks.GATES, "fp32", 1e-12)
    monkeypatch.setattr("export.plan.STEPS", 1)
    target = tmp_path / "out"
    options = ["--batch", "1..3", "--sizes", "64x64"]
    assert cli.main([str(exported.model), "--out", str(target), *options]) == 1
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
    monkeypatch.setattr(folder, "export_onnx", reuse(exported))
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
        (["--workspace", "nan"], "expected a number of at least 0, got 'nan'"),
        (["--trt-sm"], "unrecognized arguments: --trt-sm"),
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


def test_a_full_disk(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        assert cli.main([str(exported.model), "--out", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r".*out: expected at least 0\.0\d GB of free disk space, got 0\.00 GB", line
    )
    # The system's own limit, met while writing.
    monkeypatch.setattr(folder, "export_onnx", reuse(exported))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
    try:
        assert cli.main([str(exported.model), "--out", str(tmp_path / "out")]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(
        r"mimdit-export: .*out: expected room for all of its files, got 'File too large'; "
        "nothing was written",
        line,
    )
    assert [*tmp_path.iterdir()] == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=str)
@pytest.mark.parametrize("stage", ["export_onnx", "build_engine", "compare"])
def test_interruptions(
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    stage: str,
    number: signal.Signals,
) -> None:
    """In every long stage: what was there before is still there, and nothing else."""

    def interrupted(*arguments: Any) -> Any:
        work = next(x for x in arguments if isinstance(x, Path))
        (work / "half").write_text("")
        os.kill(os.getpid(), number)

    target = Path(shutil.copytree(exported.folder, tmp_path / "out"))
    command = [str(exported.model), "--out", str(target), "--batch", "1..3"]
    if stage == "build_engine":
        pytest.importorskip("tensorrt_rtx")
        command.append("--trt-rtx")
    before = verify(target)
    commands = [command, ["--check", str(target)]] if stage == "compare" else [command]
    monkeypatch.setattr(folder, "export_onnx", reuse(exported))
    monkeypatch.setattr(folder, stage, interrupted)
    # In the background shells ignore it.
    foreground = signal.signal(signal.SIGINT, signal.default_int_handler)
    handler = signal.getsignal(signal.SIGTERM)
    try:
        codes = [cli.main(command) for command in commands]
    finally:
        signal.signal(signal.SIGINT, foreground)
    assert set(codes) == {130}
    assert capsys.readouterr().err.endswith("mimdit-export: stopped; nothing was written\n")
    assert verify(target) == before
    assert not (target / "half").exists() and [*tmp_path.iterdir()] == [target]
    assert signal.getsignal(signal.SIGTERM) == handler


def test_an_operator_that_onnx_lacks(exported: Exported, tmp_path: Path) -> None:
    class Bessel(Pool):
        def forward(self, z_lq: torch.Tensor) -> torch.Tensor:
            return torch.special.bessel_j0(super().forward(z_lq))

    graph = Bessel(exported.pipe.transformer).eval()
    message = "pool: expected operators that ONNX has, got (aten|prims).*bessel_j0"
    with pytest.raises(ExportError, match=message), traceable(exported.pipe, 400):
        export_onnx(graph, tmp_path, Limits((1, 2), (8, 16)))
    assert [*tmp_path.iterdir()] == []


def test_equal_outputs_keep_their_names(exported: Exported, tmp_path: Path) -> None:
    """As velocity and output of models that predict velocities."""

    class Twice(Pool):
        outputs = ("means", "again")

        def forward(self, z_lq: torch.Tensor) -> Any:
            means = super().forward(z_lq)
            return means, means

    graph = Twice(exported.pipe.transformer).eval()
    with traceable(exported.pipe, 400):
        export_onnx(graph, tmp_path, Limits((1, 1), (8, 8)))
    out = Session(tmp_path / "pool.onnx", threads=1)(z_lq=torch.rand(1, 48, 16, 16))
    assert list(out) == ["means", "again"] and (out["means"] == out["again"]).all()


def test_an_operator_that_the_runtime_lacks(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(
        folder, "export_onnx", reuse(exported, damage.unknown_operator("conditioner"))
    )
    assert cli.main([str(exported.model), "--out", str(tmp_path / "out")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("mimdit-export: conditioner.onnx: onnxruntime cannot load it")
    assert "Nonsense" in line and line.endswith("--no-check leaves the comparison out")
    assert [*tmp_path.iterdir()] == []


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
    assert err.splitlines()[-1].startswith(f"mimdit-export: {name} cannot be imported")
    assert err.count("\n") == 1
    extra = "trt-rtx" if name == "tensorrt_rtx" else "export"
    assert f"pip install 'mimdit[{extra}]'" in err


def test_no_bfloat16_on_this_device(tmp_path: Path, capsys: Any) -> None:
    """ONNX Runtime lacks its plain operators for CPUs: said before anything is exported."""
    assert cli.main(["debug", "--out", str(tmp_path / "onnx"), "--precision", "bf16"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(
        r"mimdit-export: precision: expected one that onnxruntime [\d.]+ computes in on cpu, "
        r"got bf16 \(.*\); --no-check leaves the comparison out",
        line,
    )
    assert [*tmp_path.iterdir()] == []


def test_bfloat16_graphs_are_refused_where_they_cannot_run(
    exported: Exported, tmp_path: Path
) -> None:
    target = Path(shutil.copytree(exported.folder, tmp_path / "out"))
    damage.unknown_operator("pool")(target / "pool.onnx")
    manifest = verify(exported.folder)
    entries = {k: v for k, v in manifest.items() if k not in ("format", "files", "sha256")}
    write_manifest(target, entries | {"precision": "bf16"})
    with pytest.raises(ExportError, match=r"^precision: expected .* on cpu, got bf16 \(pool"):
        ExportedPipeline(target, "cpu")
