"""Every fault that the doctor reports, made in a folder."""

import json
import shutil
from pathlib import Path

import pytest

from tests.training import data_folders
from training.doctor import examine, main


def kinds(root: Path, name: str) -> list[tuple[str, str]]:
    """Faults other than counts, by kind and file or folder name."""
    found = examine(name, root).faults
    return [(fault.kind, Path(fault.path).name) for fault in found if fault.kind != "count"]


def test_a_sound_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_folders.folders(tmp_path / "mine")
    assert main(["doctor", str(root)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"folder in {root}") and "6 pictures looked at, no faults" in out


@pytest.mark.parametrize(
    ("name", "group", "found", "published"),
    [
        ("foundir", "08Haze", 2, 200),
        ("uhdll", "testing_set", 2, 150),
        ("realrain", "RealRain-1k-H/train", 2, 784),
        ("hazerd", "HazeRD", 10, 75),
        ("4krd", "4KRD", 6, None),
    ],
)
def test_counts_against_the_published_numbers(
    name: str,
    group: str,
    found: int,
    published: int | None,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make = {"4krd": data_folders.fourkrd}.get(name) or getattr(data_folders, name)
    root = make(tmp_path)
    code = main(["doctor", str(root), "--dataset", name, "--json"])
    report = json.loads(capsys.readouterr().out)
    assert {"name": group, "pairs": found, "published": published} in report["groups"]
    counted = [fault["path"] for fault in report["faults"] if fault["kind"] == "count"]
    assert (group in counted) is (published is not None)
    assert code == (1 if published else 0) and report["sound"] is (published is None)
    assert {fault["kind"] for fault in report["faults"]} <= {"count"}


def test_unmatched_and_layout(tmp_path: Path) -> None:
    root = data_folders.foundir(tmp_path)
    (root / "01Blur/LQ/0002.png").unlink()
    shutil.rmtree(root / "20Lowlight_Noise_JPEG/GT")
    (root / "meta.txt").write_text("01Blur/GT/0002.png, 01Blur/LQ/0002.png\n")
    assert kinds(root, "foundir") == [
        ("unmatched", "0002.png"),
        ("layout", "20Lowlight_Noise_JPEG"),
        ("metadata", "meta.txt:1"),
    ]
    counts = [f for f in examine("foundir", root).faults if f.kind == "count"]
    assert any(
        f.path == "01Blur" and "expected 150 pairs as published, got 1" in f.message for f in counts
    )


def test_hazerd_scenes(tmp_path: Path) -> None:
    root = data_folders.hazerd(tmp_path, scenes=3)
    (root / "data/simu/IMG_0_50_A.jpg").unlink()
    (root / "data/img/IMG_2_RGB.jpg").unlink()
    data_folders.save(root / "data/img/IMG_9_RGB.jpg", 77)
    assert set(kinds(root, "hazerd")) == {
        *(("unmatched", f"IMG_2_{50 * n}_A.jpg") for n in range(1, 6)),
        ("unmatched", "IMG_9_RGB.jpg"),
    }
    messages = [fault.message for fault in examine("hazerd", root).faults if fault.kind == "count"]
    assert "expected 5 hazy pictures of this scene, got 4" in messages


def test_files_that_are_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = data_folders.folders(tmp_path, count=7)
    data_folders.save(root / "LQ/0.jpg", 5, (24, 31))
    data = (root / "LQ/1.jpg").read_bytes()
    (root / "LQ/1.jpg").write_bytes(data[: len(data) // 2])
    (root / "GT/2.PNG").write_bytes(b"")
    shutil.copy(root / "LQ/3.jpg", root / "LQ/4.jpg")
    (root / "LQ/5.jpg").unlink()
    shutil.copy(root / "GT/5.PNG", root / "LQ/5.png")
    data_folders.save(root / "LQ/6.png", 99)
    assert set(kinds(root, "folder")) == {
        ("size", "0.jpg"),
        ("unreadable", "1.jpg"),
        ("unreadable", "2.PNG"),
        ("duplicate", "4.jpg"),
        ("identical", "5.png"),
        ("duplicate", "6.png"),
    }
    assert main(["doctor", str(root), "--workers", "2"]) == 1
    out = capsys.readouterr().out
    assert "size: 1\n" in out and "expected 32×24 as" in out and "got 31×24" in out
    assert "the file is empty" in out and "has the same name as 6.jpg" in out
    assert "14 pictures looked at, 6 faults" in out


def test_originals_may_recur(tmp_path: Path) -> None:
    root = data_folders.folders(tmp_path)
    shutil.copy(root / "GT/0.PNG", root / "GT/1.PNG")
    assert kinds(root, "folder") == []


def test_clean_folder(tmp_path: Path) -> None:
    data_folders.save(tmp_path / "a.png", 1)
    data_folders.save(tmp_path / "b/c.png", 1)
    data_folders.save(tmp_path / "d.png", 2)
    report = examine("clean", tmp_path)
    assert report.groups == {"pictures": (3, None)}
    assert kinds(tmp_path, "clean") == [("duplicate", "c.png")]


def test_no_known_layout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "expected one of the layouts" in error and len(error.splitlines()) == 1
    assert main(["doctor", str(tmp_path), "--dataset", "uhdll"]) == 2
    assert "expected training_set or testing_set, each with input and gt" in capsys.readouterr().err
