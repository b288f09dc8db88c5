"""What lies beside the graphs of a folder: weights in files of their own, and files of others."""

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from export import cli, folder
from export.libraries import ExportError
from export.manifest import verify
from export.runtime import ExportedPipeline
from tests.export import damage
from tests.export.conftest import Exported, reuse

WEIGHT = "model.transformer_blocks.1.attn.to_q.weight"


def test_other_files_beside_an_export_move_along(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(folder, "export_onnx", reuse(exported))
    monkeypatch.setattr(folder, "compare", lambda *_: [])
    target = Path(shutil.copytree(exported.folder, tmp_path / "out"))
    (target / "notes.txt").write_text("mine")
    (target / "restored").mkdir()
    (target / "restored" / "a.png").write_text("picture")
    commands = [["--out", str(target), "--no-check"], ["--out", str(target)]]
    for command in ([str(exported.model), *options] for options in commands):
        assert cli.main(command) == 0, capsys.readouterr()
        assert cli.main(["--check", str(target)]) == 0, capsys.readouterr()
        assert (target / "notes.txt").read_text() == "mine"
        assert (target / "restored" / "a.png").read_text() == "picture"
        assert not {"notes.txt", "restored"} & set(verify(target)["files"])
    assert [*tmp_path.iterdir()] == [target]


def test_the_present_folder(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Though its path has no name beside which others could lie."""
    monkeypatch.setattr(folder, "export_onnx", reuse(exported))
    monkeypatch.setattr(folder, "compare", lambda *_: [])
    target = tmp_path / "out"
    target.mkdir()
    for command in ([str(exported.model), "--out", "."], ["--check", "."]):
        monkeypatch.chdir(target)
        assert cli.main(command) == 0, capsys.readouterr()
        monkeypatch.chdir(tmp_path)
        verify(target)
    assert [*tmp_path.iterdir()] == [target]


@pytest.mark.parametrize("name", ["out", "out.failed"])
def test_folders_of_other_programs_are_kept(
    exported: Exported, tmp_path: Path, name: str, capsys: Any
) -> None:
    """A manifest.json alone makes no export."""
    (tmp_path / name).mkdir()
    for text in ('{"name": "web page"}', "[]", "{"):
        (tmp_path / name / "manifest.json").write_text(text)
        assert cli.main([str(exported.model), "--out", str(tmp_path / "out")]) == 1
        assert f"{name}: holds other files than an export" in capsys.readouterr().err
        assert (tmp_path / name / "manifest.json").read_text() == text


def test_weights_in_files_of_their_own(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """As beyond 2 GB: run, compared, searched for faults, and refused where they changed."""
    change = damage.both(damage.weight("denoiser", WEIGHT), damage.external)
    monkeypatch.setattr(folder, "export_onnx", reuse(exported, damage.external))
    monkeypatch.setattr("export.plan.STEPS", 1)
    target, options = tmp_path / "out", ["--batch", "1..3", "--sizes", "64x64"]
    assert cli.main([str(exported.model), "--out", str(target), *options]) == 0
    assert {f"{g}.onnx.data" for g in ("pool", "conditioner", "denoiser")} <= set(
        verify(target)["files"]
    )
    monkeypatch.setattr(folder, "export_onnx", reuse(exported, change))
    assert cli.main([str(exported.model), "--out", str(target), *options]) == 1
    out = capsys.readouterr().out
    assert f"first that differs: {WEIGHT}" in out and "first difference: block 1, " in out
    path = target / "denoiser.onnx.data"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ExportError, match=r"files\.denoiser\.onnx\.data\.bytes: expected"):
        ExportedPipeline(target, "cpu")
