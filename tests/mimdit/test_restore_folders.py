"""Folders of `mimdit-restore`: trees, names, links, URLs, and runs that are cut off."""

import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from mimdit.cli.places import find
from mimdit.cli.restore import main
from mimdit.image_io import PictureError

ROUTING = {"inter": [[[1.0]]], "intra": [[[[1.0]]]], "index": [[[[0]]]]}


class Inverter:
    """A pipeline that inverts pictures and sleeps a little; `seen` holds the options of calls."""

    def __init__(self, pause=0.0):
        self.pause, self.seen = pause, []

    def set_progress_bar_config(self, **_):
        pass

    def __call__(self, image, generator, output_type, strength, **options):
        time.sleep(self.pause)
        self.seen.append(options)
        result = image + np.float32(strength) * (1 - 2 * image)
        return SimpleNamespace(
            images=result[None], routing=SimpleNamespace(as_dict=lambda: ROUTING)
        )


@pytest.fixture
def pipe(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    fake = Inverter()
    monkeypatch.setattr("mimdit.loading.load_pipeline", lambda *_: fake)
    monkeypatch.setattr("mimdit.engine.accelerate", lambda pipe: pipe)
    return fake


def picture(path, value=40):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (7, 5), (value, value, value)).save(path)
    return path


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in Path(folder).rglob("*") if p.is_file())


def test_subfolders_are_mirrored(pipe):
    for name in ("a.png", "x/a.PNG", "x/y/b.JPeG", "x/.hidden/c.png", ".d.png", "x/e.txt"):
        picture(Path("in") / name) if not name.endswith("txt") else Path("in", name).touch()
    assert main(["-i", "in", "-o", "out"]) == 0
    assert tree("out") == ["a.png", "x/a.PNG", "x/y/b.JPeG"]


def test_globs_mirror_below_their_fixed_beginning(pipe):
    for name in ("a/x.png", "b/x.png", "b/deep/y.png"):
        picture(Path("in") / name)
    assert main(["-i", "in/*/x.png", "-o", "one"]) == 0
    assert tree("one") == ["a/x.png", "b/x.png"]
    assert main(["-i", "in/**/*.png", "-o", "all"]) == 0
    assert tree("all") == ["a/x.png", "b/deep/y.png", "b/x.png"]
    assert main(["-i", "in/b/deep/y.png", "-o", "flat"]) == 0
    assert tree("flat") == ["y.png"]


def test_an_output_inside_the_input_is_no_input(pipe):
    picture("in/a.png")
    assert main(["-i", "in", "-o", "in/restored"]) == 0
    picture("in/b.png")
    assert main(["-i", "in", "-o", "in/restored", "--resume"]) == 0
    assert tree("in/restored") == ["a.png", "b.png"]


def test_links_to_folders_are_followed_once_and_dead_ones_reported(pipe, capsys):
    picture("in/a.png")
    picture("elsewhere/b.png")
    Path("in/loop").symlink_to("..", target_is_directory=True)
    Path("in/other").symlink_to("../elsewhere", target_is_directory=True)
    Path("in/self.png").symlink_to("self.png")
    Path("in/dead.png").symlink_to("nowhere.png")
    assert main(["-i", "in", "-o", "out"]) == 1
    written = [name for name in tree("out") if name.endswith("b.png")]
    assert "a.png" in tree("out") and len(written) == 1
    err = capsys.readouterr().err
    assert "in/self.png: " in err and "in/dead.png: no such file" in err


def test_stray_files_of_a_killed_run_are_no_pictures(pipe):
    picture("in/a.png")
    Path("in/.0123456789abcdef.part").write_bytes(b"half")
    Path("in/.9e.png").write_bytes(b"half")
    assert [relative for _, relative in find("in", "out")[0]] == ["a.png"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems restrict names")
def test_names_of_any_bytes(pipe, capsys):
    names = [b"new\nline.png", b"latin-\xe9.png", "日本.png".encode(), b"a'b\"<c>&.png"]
    for name in names:
        picture(Path("in") / os.fsdecode(name))
    (Path("in") / os.fsdecode(b"bad\n\xff.png")).write_bytes(b"")
    assert main(["-i", "in", "-o", "out", "--report", "--compare"]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 1 and len(err.splitlines()) == 1
    assert "in/bad\\n\\udcff.png: the file is empty" in err
    written = {os.fsencode(p.name) for p in Path("out").iterdir()}
    assert set(names) <= written and len(written) == 5 * len(names) + 1
    assert json.loads(Path("out/日本.json").read_text())["input"] == "in/日本.png"
    page = Path("out", "a'b\"<c>&_compare.html").read_text()
    assert "<h1>a&#x27;b&quot;&lt;c&gt;&amp;.png</h1>" in page
    index = Path("out/compare.html").read_text()
    assert 'href="./new%0Aline_compare.html"' in index
    assert 'href="./latin-%E9_compare.html"' in index


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write anywhere")
def test_an_output_that_cannot_be_written_is_a_sentence(pipe, capsys):
    picture("in/a.png")
    Path("out").mkdir(mode=0o500)
    assert main(["-i", "in", "-o", "out"]) == 1
    assert "cannot be written (Permission denied)" in capsys.readouterr().err


def test_a_subfolder_that_cannot_be_made_fails_its_pictures_only(pipe, capsys):
    picture("in/a.png")
    picture("in/x/b.png")
    Path("out").mkdir()
    Path("out/x").touch()
    assert main(["-i", "in", "-o", "out"]) == 1
    assert "in/x/b.png: out/x: cannot make this folder" in capsys.readouterr().err
    assert tree("out") == ["a.png", "x"]


def test_nothing_is_left_of_a_picture_that_cannot_be_written(pipe, monkeypatch, capsys):
    def full(*_, **__):
        raise PictureError("out/a.png: cannot be written (No space left on device)")

    picture("in/a.png")
    monkeypatch.setattr("mimdit.cli.work.write_picture", full)
    assert main(["-i", "in", "-o", "out", "--report"]) == 1
    assert tree("out") == [] and "No space left" in capsys.readouterr().err


def test_every_file_of_an_unreadable_format_fails_alone(pipe, capsys):
    picture("in/a.png")
    good = Path("in/a.png").read_bytes()
    for i in range(0, 57, 7):
        Path(f"in/cut{i}.png").write_bytes(good[:i])
    assert main(["-i", "in", "-o", "out"]) == 1
    assert tree("out") == ["a.png"]
    assert len(capsys.readouterr().err.splitlines()) == len(range(0, 57, 7))


@pytest.mark.parametrize("kind", ["png", "jpg", "webp", "tif", "bmp"])
def test_strength_0_gives_the_input_back(pipe, kind):
    rng = np.random.default_rng(1)
    Path("in").mkdir()
    Image.fromarray(rng.integers(0, 255, (33, 21, 3), np.uint8)).save(f"in/a.{kind}")
    assert main(["-i", "in", "-o", "out", "--strength", "0"]) == 0
    assert Path(f"out/a.{kind}").read_bytes() == Path(f"in/a.{kind}").read_bytes()
    assert main(["-i", "in", "-o", "png", "--strength", "0", "--ext", "png"]) == 0
    with Image.open(f"in/a.{kind}") as before, Image.open("png/a.png") as after:
        assert np.array_equal(np.asarray(before), np.asarray(after))


def test_options_of_the_router_reach_the_pipeline_only_when_given(pipe):
    picture("in/a.png")
    flags = ["--experts", "spatial=0.5, channel=.2", "--routing", "tile"]
    assert main(["-i", "in", "-o", "one", *flags]) == 0
    assert pipe.seen[0]["experts"] == {"spatial": 0.5, "channel": 0.2}
    assert pipe.seen[0]["routing"] == "tile"
    assert main(["-i", "in", "-o", "two"]) == 0
    assert not {"experts", "routing", "tile_batch"} & set(pipe.seen[1])


def test_lists_of_pages_grow_and_foreign_files_stay(pipe):
    for name in ("a.png", "x/b.png"):
        picture(Path("in") / name)
    picture("more/c.png")
    picture("more/d.png")
    assert main(["-i", "in", "-o", "out", "--compare"]) == 0
    assert 'href="../compare.html"' in Path("out/x/b_compare.html").read_text().replace(
        "./..", ".."
    )
    assert main(["-i", "more", "-o", "out", "--compare"]) == 0
    page = Path("out/compare.html").read_text()
    assert page.count("<li>") == 4 and "4 pictures" in page
    for name in ("a", "x/b", "c", "d"):
        assert f'href="./{name}_compare.html"' in page
    Path("out/compare.html").write_text("my own")
    assert main(["-i", "in", "-o", "out", "--compare", "--overwrite"]) == 0
    assert Path("out/compare.html").read_text() == "my own"


def test_urls(pipe, capsys):
    import fsspec

    store = fsspec.filesystem("memory")
    for name in ("a.png", "x/b.JPG", "x/bad.png"):
        data = picture(Path("local") / name).read_bytes() if "bad" not in name else b"text"
        store.pipe_file(f"/urls/in/{name}", data)
    command = ["-i", "memory://urls/in", "-o", "memory://urls/out", "--report", "--compare"]
    assert main(command) == 1
    err = capsys.readouterr().err
    assert err.startswith("memory://urls/in/x/bad.png: not a picture") and "/tmp" not in err
    names = {name.removeprefix("/urls/out/") for name in store.find("/urls/out")}
    ends = (".json", "_experts.png", "_compare.html", "_compare.png")
    wanted = {f"{stem}{end}" for stem in ("a", "x/b") for end in ends}
    assert names == wanted | {"a.png", "x/b.JPG", "compare.html"}
    report = json.loads(store.cat_file("/urls/out/x/b.json"))
    assert report["output"] == "memory://urls/out/x/b.JPG"
    count = len(pipe.seen)
    assert main([*command, "--resume"]) == 1
    assert len(pipe.seen) == count and "2 already there" in capsys.readouterr().out
    assert main(command) == 1
    assert "exists; use --resume" in capsys.readouterr().err
    # From a URL into a folder, the same bytes as from a folder.
    assert main(["-i", "memory://urls/in/*.png", "-o", "down"]) == 0
    assert main(["-i", "local/a.png", "-o", "plain"]) == 0
    assert Path("down/a.png").read_bytes() == Path("plain/a.png").read_bytes()


@pytest.mark.parametrize("url", ["nosuch://bucket/a", "memory://nowhere/a.png"])
def test_urls_without_pictures_are_a_sentence(pipe, capsys, url):
    assert main(["-i", url, "-o", "out"]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and url in err
