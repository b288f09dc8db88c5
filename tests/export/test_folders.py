"""What lies beside the graphs of a folder: weights in files of their own, and files of others."""

import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("onnxruntime")

from export import cli, folder
from export.libraries import ExportError
from export.manifest import finished_folder, verify, write_manifest
from export.runtime import ExportedPipeline
from tests.export import damage
from tests.export.conftest import UNCHECKED, Exported, reuse

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


def test_a_link_stays_one(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """To another disk, say: the export lies where it leads."""
    monkeypatch.setattr(folder, "export_onnx", reuse(exported))
    link, place = tmp_path / "link", tmp_path / "disk" / "place"
    place.parent.mkdir()
    link.symlink_to(place)
    command = [str(exported.model), "--out", str(link), *UNCHECKED]
    for _ in range(2):
        assert cli.main(command) == 0, capsys.readouterr()
        verify(place)
        assert link.is_symlink() and [*place.parent.iterdir()] == [place]
    assert sorted(tmp_path.iterdir()) == [place.parent, link]


def test_mount_points_are_refused(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Before anything is exported: no folder can take their place."""
    monkeypatch.setattr("os.path.ismount", lambda path: Path(path) == tmp_path)
    assert cli.main([str(exported.model), "--out", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("is a mount point, not to be replaced; give a folder in it")


def test_an_export_put_aside_comes_back(tmp_path: Path) -> None:
    """Of a process that was killed while it put a new one in its place."""
    target, aside = tmp_path / "out", tmp_path / ".out.abcd1234.earlier"
    other = tmp_path / ".out.old.abcd1234.earlier"
    other.mkdir()

    def write(name: str) -> None:
        with finished_folder(target) as work:
            write_manifest(work, {"by": name})
            if name == "failed":
                assert verify(target)["by"] == "first"
                raise ValueError("that is enough")

    write("first")
    target.rename(aside)
    with pytest.raises(ValueError, match="enough"):
        write("failed")
    assert verify(target)["by"] == "first"
    # Killed a moment later.
    shutil.copytree(target, aside)
    (aside / "notes.txt").write_text("mine")
    write("second")
    assert verify(target)["by"] == "second"
    assert (target / "notes.txt").read_text() == "mine"
    assert sorted(tmp_path.iterdir()) == [other, target]


@pytest.mark.parametrize("name", ["tiny", "sd35-medium"])
def test_folders_with_names_of_presets(
    name: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Shipped models come first, as in `mimdit-restore`; others are folders if there is one."""
    asked: list[str] = []

    def load_pipeline(name: str, **_: Any) -> Any:
        asked.append(name)
        return exported.pipe

    monkeypatch.setattr("mimdit.loading.load_pipeline", load_pipeline)
    monkeypatch.setattr(folder, "export_onnx", reuse(exported))
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert cli.main([name, "--out", "out", *UNCHECKED]) == 0, capsys.readouterr()
    assert asked == [name]
    found = verify(tmp_path / "out")["model"]["name"]
    assert found == ("tiny" if name == "tiny" else str(tmp_path / name))
