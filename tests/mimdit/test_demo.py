"""The page of `mimdit-demo`: what it does with pictures, many visitors at once, a real browser."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mimdit.cli.demo import build_parser, main, serve
from mimdit.cli.model import StopError
from mimdit.cli.studio import Stopped, Studio, sentence
from mimdit.image_io import PictureError, read_picture
from mimdit.loading import assemble
from mimdit.restoration import restore
from mimdit.transformer import MiMDiTTransformer2DModel

ROOT = Path(__file__).parents[2]
VISITORS = 24


def saved(path: Path, side: int = 40, seed: int = 0) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side + 8, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def studio(
    debug_model: MiMDiTTransformer2DModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Studio:
    # Set by every studio; put back for other tests.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    pipe = assemble(debug_model, 2)
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path / "temporary"
    folder.mkdir()
    return Studio(pipe, folder, 100_000, 10)


def test_a_picture_is_restored_as_elsewhere_and_leaves_nothing(
    studio: Studio, tmp_path: Path
) -> None:
    path, seen = saved(tmp_path / "a.png"), []
    for out in studio.restore(str(path), "me", lambda *a: seen.append(a), 3, 0.7, 5, "adain"):
        wanted = restore(path, model=studio.pipe, steps=3, strength=0.7, seed=5, color_fix="adain")
        with Image.open(out.result) as result:
            assert np.array_equal(np.asarray(result), np.asarray(wanted))
        assert Path(out.result).name == "a_restored.png"
        assert set(out.weights) == {"spatial", "channel", "swin", "se"}
        assert sum(out.weights.values()) == pytest.approx(1, abs=1e-3)
        for place, source in zip(out.shown, (path, out.result), strict=True):
            with Image.open(place) as shown, Image.open(source) as whole:
                assert np.array_equal(np.asarray(shown), np.asarray(whole))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert not list(studio.folder.iterdir())


def test_looking_says_what_a_picture_is(studio: Studio, tmp_path: Path) -> None:
    for shown, text in studio.look(str(saved(tmp_path / "a.png", 150))):
        assert text == "158×150 pixels, 4 tiles"
        with Image.open(shown) as image:
            assert image.size == (158, 150)
    assert not list(studio.folder.iterdir())


def test_a_picture_in_work_can_be_stopped(studio: Studio, tmp_path: Path) -> None:
    path, seen = str(saved(tmp_path / "a.png")), []

    def stop(done: int, total: int) -> None:
        seen.append(done)
        studio.stop("another")
        if done == 2:
            studio.stop("me")

    with pytest.raises(Stopped):
        next(studio.restore(path, "me", stop, 9))
    assert seen == [1, 2]
    # The next picture of the same visitor is not concerned.
    assert next(studio.restore(path, "me", lambda *_: None)).result


def test_a_waiting_picture_can_be_stopped(studio: Studio, tmp_path: Path) -> None:
    path = str(saved(tmp_path / "a.png"))
    begun, go_on = threading.Event(), threading.Event()

    def hold(done: int, total: int) -> None:
        begun.set()
        go_on.wait(60)

    with ThreadPoolExecutor() as pool:
        first = pool.submit(next, studio.restore(path, "first", hold, 1))
        assert begun.wait(60)
        second = pool.submit(next, studio.restore(path, "second", lambda *_: None, 1))
        while "second" not in studio._visitors:
            time.sleep(0.01)
        studio.stop("second")
        go_on.set()
        assert isinstance(second.exception(), Stopped)
        assert first.result().weights


def test_what_is_too_much_is_a_sentence(studio: Studio, tmp_path: Path) -> None:
    def start(path: Path, **options: int) -> None:
        next(studio.restore(str(path), "me", lambda *_: None, **options))

    small = saved(tmp_path / "a.png")
    with pytest.raises(PictureError, match=r"more than 0\.1 million pixels") as caught:
        start(saved(tmp_path / "b.png", 400))
    assert sentence(str(tmp_path / "b.png"), caught.value).startswith("b.png: more than")
    with pytest.raises(ValueError, match="steps: expected 0 to 10, got 11"):
        start(small, steps=11)
    with pytest.raises(ValueError, match="seed: expected"):
        start(small, seed=-1)
    with pytest.raises(ValueError, match="strength: expected 0 to 1"):
        start(small, strength=2)
    broken = tmp_path / "c.png"
    broken.write_bytes(small.read_bytes()[:60])
    with pytest.raises(PictureError) as caught:
        start(broken)
    assert str(tmp_path) not in sentence(str(broken), caught.value)
    assert sentence(None, MemoryError()) == "out of memory; use a smaller picture"


def test_safe_by_default() -> None:
    args = build_parser().parse_args([])
    assert (args.host, args.max_megapixels, args.max_file_mb, args.queue) == (
        "127.0.0.1",
        16,
        64,
        32,
    )


def test_no_address_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """It would mean every address of this computer."""
    with pytest.raises(SystemExit) as caught:
        main(["--host", ""])
    assert caught.value.code == 2
    assert "--host: expected an address, got ''" in capsys.readouterr().err


def test_no_room_for_uploads_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(**_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    assert main([]) == 1
    assert capsys.readouterr().err == "mimdit-demo: [Errno 28] No space left on device\n"


def test_without_gradio_one_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    for name in ("GRADIO_TEMP_DIR", "GRADIO_ANALYTICS_ENABLED"):
        monkeypatch.setenv(name, "")
    with pytest.raises(StopError, match=r"pip install 'mimdit\[demo\]'"):
        serve(build_parser().parse_args([]), tmp_path)
    assert main([]) == 1
    err = capsys.readouterr().err
    assert err.startswith("mimdit-demo: the page needs Gradio") and len(err.splitlines()) == 1


@pytest.fixture(scope="module")
def served(
    debug_model: MiMDiTTransformer2DModel, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, int, Path]]:
    """Address of a page, its process, and the folder of its model."""
    pytest.importorskip("gradio", reason="needs Gradio: pip install 'mimdit[demo]'")
    folder = tmp_path_factory.mktemp("demo")
    assemble(debug_model, 2).save_pretrained(folder / "model")
    command = [sys.executable, "-m", "mimdit.cli.demo", "--model", str(folder / "model")]
    command += ["--device", "cpu", "--port", "0", "--max-megapixels", "0.1", "--max-file-mb", "0.5"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(folder)}
    env["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [env.get("PYTHONPATH")])])
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.match(r"mimdit-demo: (http://127\.0\.0\.1:\d+)/? ", line)
        try:
            assert found is not None, line
            yield found[1], process.pid, folder
        finally:
            process.terminate()


def resident(pid: int) -> int:
    """Bytes of main memory that a process holds."""
    text = Path(f"/proc/{pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) * 1024


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.skipif(sys.platform != "linux", reason="reads memory from /proc")
@pytest.mark.usefixtures("one_thread")  # as the page has
def test_many_visitors_at_once(served: tuple[str, int, Path], tmp_path: Path) -> None:
    from gradio_client import Client, handle_file

    url, pid, folder = served
    paths = [saved(tmp_path / f"{i}.png", 40 + i, i) for i in range(VISITORS)]
    wanted = [
        restore(path, model=folder / "model", device="cpu", seed=i) for i, path in enumerate(paths)
    ]
    clients = [
        Client(
            url, verbose=False, download_files=str(tmp_path / "answers"), analytics_enabled=False
        )
        for _ in paths
    ]

    def ask(i: int) -> np.ndarray:
        given = handle_file(str(paths[i]))
        # An emptied field means 0. A button is changed by an update, which holds the file.
        answer = clients[i].predict(given, 1.0, 0, i or None, "none", api_name="/restore")
        return read_picture(answer[2]["value"]).rgb

    ask(0)
    before = resident(pid)
    with ThreadPoolExecutor(VISITORS) as pool:
        answers = list(pool.map(ask, range(VISITORS)))
    for answer, picture in zip(answers, wanted, strict=True):
        assert np.array_equal(np.rint(answer * 255), np.asarray(picture))
    grown = resident(pid) - before
    print(f"{VISITORS} visitors at once: {grown / 1e6:.1f} MB more")
    assert grown < 300e6
    broken = tmp_path / "broken.png"
    broken.write_bytes(paths[0].read_bytes()[:90])
    big = saved(tmp_path / "big.png", 400)
    for path, words in ((broken, "broken.png: "), (big, "million pixels")):
        with pytest.raises(Exception, match=words) as caught:
            clients[0].predict(handle_file(str(path)), 1.0, 0, 0, "none", api_name="/restore")
        assert str(folder) not in str(caught.value)


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.usefixtures("one_thread")
def test_in_a_real_browser(served: tuple[str, int, Path], tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs Chromium")
    url, _, folder = served
    path = saved(tmp_path / "photo.png", 60)
    (tmp_path / "bad.png").write_text("text")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=browser, args=["--no-sandbox"])
        page = chromium.new_page(viewport={"width": 1280, "height": 1000})
        asked, wrong = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(url)
        page.set_default_timeout(60_000)
        page.set_input_files("#picture input[type=file]", str(path))
        page.get_by_text("68×60 pixels, 1 tile").wait_for()
        page.click("#restore")
        page.get_by_text("68×60 pixels in").wait_for()
        page.wait_for_function(
            "[...document.querySelectorAll('#slider img')].filter(i => i.naturalWidth == 68)"
            ".length >= 2"
        )
        for name in ("spatial", "channel", "swin", "se"):
            assert page.locator("#experts").get_by_text(name, exact=True).is_visible()
        page.screenshot(path=str(tmp_path / "page.png"), full_page=True)
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "down.png")
        wanted = restore(path, model=folder / "model", device="cpu")
        with Image.open(tmp_path / "down.png") as image:
            assert np.array_equal(np.asarray(image), np.asarray(wanted))
        # A long run is stopped, and the page goes on.
        page.get_by_label("number input for Steps").fill("100")
        page.keyboard.press("Tab")
        page.click("#restore")
        page.wait_for_timeout(1000)
        page.click("#cancel")
        page.get_by_text("Stopped.").first.wait_for()
        page.get_by_label("number input for Steps").fill("1")
        page.keyboard.press("Tab")
        page.click("#restore")
        page.get_by_text("68×60 pixels in").wait_for()
        page.locator("#picture").get_by_label("Clear").or_(
            page.locator("#picture").get_by_label("Remove")
        ).first.click()
        page.set_input_files("#picture input[type=file]", str(tmp_path / "bad.png"))
        page.get_by_text("bad.png: not a picture of a known type").first.wait_for()
        # What is cut, too wide, too long or of another kind has one sentence each.
        (tmp_path / "cut.png").write_bytes(path.read_bytes()[:5000])
        Image.new("RGB", (400, 400)).save(tmp_path / "wide.png")
        saved(tmp_path / "long.png", 600)
        (tmp_path / "notes.txt").write_text("text")
        for name, words in (
            ("cut.png", "cut.png: damaged or truncated"),
            ("wide.png", "wide.png: more than 0.1 million pixels"),
            ("long.png", 'exceed the maximum allowed size of 488.3 Kb: "long.png"'),
            ("notes.txt", "Invalid file type: notes.txt"),
        ):
            page.goto(url)
            page.set_input_files("#picture input[type=file]", str(tmp_path / name))
            page.get_by_text(words).first.wait_for()
        chromium.close()
    assert not wrong
    elsewhere = [each for each in asked if not each.startswith((url, "data:", "blob:"))]
    assert not elsewhere
