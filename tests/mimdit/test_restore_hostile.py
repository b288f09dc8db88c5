"""Hostile inputs of `mimdit-restore`: each fails with one line, and nothing half-done is left."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mimdit.cli.restore import main
from mimdit.image_io import read_picture
from tests.mimdit.hostile_pictures import write_corpus

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems restrict names")
ROUTING = {"inter": [[[1.0]]], "intra": [[[[1.0]]]], "index": [[[[0]]]]}


class Copier:
    """A pipeline that gives the picture back."""

    def set_progress_bar_config(self, **_: object) -> None:
        pass

    def __call__(self, image: np.ndarray, **_: object) -> SimpleNamespace:
        routing = SimpleNamespace(as_dict=lambda: ROUTING)
        return SimpleNamespace(images=image[None], routing=routing)


@pytest.fixture(autouse=True)
def pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("mimdit.loading.load_pipeline", lambda *_: Copier())
    monkeypatch.setattr("mimdit.engine.accelerate", lambda pipe: pipe)


def test_no_hostile_picture_is_more_than_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    count = write_corpus(Path("in"))
    before = {p: os.lstat(p).st_mtime_ns for p in Path("in").rglob("*")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert main(["-i", "in", "-o", "out"]) == 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if not line.startswith("note: ")]
    written = [p for p in Path("out").rglob("*") if p.is_file()]
    print(f"{count} hostile pictures: {len(lines)} refused, {len(written)} readable after all")
    # Every one has its line or its picture, and never both.
    assert len(lines) + len(written) == count
    assert len(lines) >= 200
    assert f"restored {len(written)} pictures" in out and f"{len(lines)} failed" in out
    named = [line.split(": ")[0].removeprefix("in/") for line in lines]
    assert len(set(named)) == len(named)
    for line in lines:
        assert line.startswith("in/") and line.isprintable() and "Traceback" not in line
    for path in written:
        source = Path("in") / path.relative_to("out")
        # What cannot be written becomes a PNG.
        kinds = (source.suffix, ".gif", ".ppm")
        source = next(s for s in map(source.with_suffix, kinds) if s.exists())
        assert path.name not in named and not path.name.startswith(".")
        assert read_picture(path).rgb.shape == read_picture(source).rgb.shape
    # What programs in the files would have made.
    assert not list(Path().glob("**/hacked"))
    assert {p: os.lstat(p).st_mtime_ns for p in Path("in").rglob("*")} == before
    assert grown < 2**30


def test_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    Path("in").mkdir()
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (60, 60, 3), np.uint8)).save(f"in/{i:02}.png")
    Path("out").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k,mode=777", "tmpfs", "out"]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a small file system")
    try:
        assert main(["-i", "in", "-o", "out"]) == 1
        err = capsys.readouterr().err.splitlines()
        whole = sorted(p.name for p in Path("out").iterdir())
        assert 1 <= len(whole) < 12 and len(err) == 12 - len(whole)
        assert all("cannot be written (" in line and "No space left" in line for line in err)
        for name in whole:
            assert np.array_equal(read_picture(f"out/{name}").rgb, read_picture(f"in/{name}").rgb)
        subprocess.run(["mount", "-o", "remount,size=4m", "out"], check=True)
        assert main(["-i", "in", "-o", "out", "--resume"]) == 0
        assert len(list(Path("out").iterdir())) == 12
    finally:
        subprocess.run(["umount", "out"], check=False)


def test_a_name_too_long_for_what_is_added(capsys: pytest.CaptureFixture[str]) -> None:
    Path("in").mkdir()
    Image.new("RGB", (5, 5)).save(f"in/{'a' * 250}.png")
    assert main(["-i", "in", "-o", "out"]) == 0
    assert main(["-i", "in", "-o", "more", "--suffix", "_restored"]) == 1
    assert "cannot be written (" in capsys.readouterr().err
    assert not list(Path("more").iterdir())
