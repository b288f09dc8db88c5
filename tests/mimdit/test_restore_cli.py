import json
import signal
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mimdit.cli.interrupts import Interrupts
from mimdit.cli.restore import main
from mimdit.loading import assemble
from mimdit.loading import load_pipeline as load_real_pipeline

# Two blocks, one picture, two groups, one of three sub-experts: [L,B,G], [L,B,G,k].
ROUTING = {
    "inter": [[[0.25, 0.75]], [[0.5, 0.5]]],
    "intra": [[[[1.0], [0.5]]], [[[1.0], [0.25]]]],
    "index": [[[[0], [2]]], [[[1], [2]]]],
}


class FakePipeline:
    """Inverts the picture; `calls` holds the options of each call."""

    def __init__(self):
        self.calls = []
        self.loads = []
        self.accelerated = False
        self.bar = {}

    def set_progress_bar_config(self, **settings):
        self.bar = settings

    def __call__(self, image, generator, output_type, **options):
        assert image.dtype == np.float32 and output_type == "np"
        noise = torch.rand(1, generator=generator).item()
        self.calls.append({"noise": noise, **options})
        if image.shape[:2] == (13, 13):
            raise RuntimeError("unlucky size\nwith details")
        result = np.full_like(image, np.nan) if image.shape[:2] == (17, 17) else 1 - image
        routing = SimpleNamespace(as_dict=lambda: ROUTING)
        return SimpleNamespace(images=result[None], routing=routing)


@pytest.fixture
def pipe(monkeypatch):
    fake = FakePipeline()

    def load(model, device, precision):
        fake.loads.append((model, device, precision))
        return fake

    def accelerate(pipe):
        pipe.accelerated = True
        return pipe

    monkeypatch.setattr("mimdit.loading.load_pipeline", load)
    monkeypatch.setattr("mimdit.engine.accelerate", accelerate)
    return fake


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "in").mkdir()
    return tmp_path / "in"


def picture(path, size=(6, 5), value=40):
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def pixel(path):
    with Image.open(path) as image:
        return np.asarray(image)[0, 0].tolist()


def test_folder_goes_on_past_broken_files(pipe, folder, capsys):
    picture(folder / "a.png")
    (folder / "b.png").write_text("text")
    picture(folder / "c.png", (13, 13))
    picture(folder / "d.png", (17, 17))
    data = picture(folder / "e.JPG", (64, 64)).read_bytes()
    (folder / "f.jpg").write_bytes(data[:-300])
    assert main(["-i", str(folder), "-o", "out"]) == 1
    out, err = capsys.readouterr()
    assert sorted(p.name for p in (folder.parent / "out").iterdir()) == ["a.png", "e.JPG"]
    assert out.startswith("restored 2 pictures into out in ") and "4 failed" in out
    lines = err.splitlines()
    assert len(lines) == 4 and "Traceback" not in err
    for line, name, words in zip(
        lines, "bcdf", ("not a picture", "unlucky size", "non-finite", "truncated"), strict=True
    ):
        assert f"in/{name}." in line and words in line
    assert pixel("out/a.png") == [215] * 3


def test_every_picture_starts_from_the_same_seed(pipe, folder):
    for name in ("a.png", "b.png"):
        picture(folder / name)
    assert main(["-i", "in", "--seed", "3"]) == 0
    assert main(["-i", "in", "--seed", "4", "--overwrite"]) == 0
    noises = [call["noise"] for call in pipe.calls]
    assert noises[0] == noises[1] != noises[2] == noises[3]


def test_options_reach_the_pipeline(pipe, folder):
    picture(folder / "a.png")
    flags = "--model m --device cpu --precision bf16 -t 256 --tile-overlap 32 --batch-size 4"
    more = "--steps 5 --shifts 2 --guidance-scale 2.5 --strength 0.5 --color-fix wavelet"
    assert main(["-i", "in/a.png", *flags.split(), *more.split()]) == 0
    assert pipe.loads == [("m", "cpu", "bf16")]
    call = pipe.calls[0]
    del call["noise"]
    assert call == {
        "num_inference_steps": 5,
        "shifts": 2,
        "guidance_scale": 2.5,
        "strength": 0.5,
        "color_fix": "wavelet",
        "tile": 256,
        "tile_overlap": 32,
        "tile_batch": 4,
    }


def test_defaults(pipe, folder):
    picture(folder / "a.png")
    assert main(["-i", "in", "--device", "cpu"]) == 0
    assert pipe.loads == [("tiny", "cpu", None)]
    assert pixel("restored/a.png") == [215] * 3
    assert pipe.calls[0]["tile"] == 0 and pipe.calls[0]["num_inference_steps"] is None


@pytest.mark.parametrize("terminal", [True, False])
def test_slow_pictures_show_their_passes(pipe, folder, monkeypatch, terminal):
    """On a terminal always; in a log those of a single picture, now and then."""
    monkeypatch.setattr("sys.stderr.isatty", lambda: terminal)
    picture(folder / "a.png")
    assert main(["-i", "in"]) == 0
    assert not pipe.bar.get("disable") and (pipe.bar.get("mininterval", 0) >= 10) != terminal
    picture(folder / "b.png")
    assert main(["-i", "in", "--overwrite"]) == 0
    assert bool(pipe.bar.get("disable")) != terminal
    # Gone with its picture; nothing flickers for quick ones.
    assert not terminal or (pipe.bar["delay"] > 0 and not pipe.bar["leave"])


def test_one_file_to_a_named_file(pipe, folder, capsys):
    picture(folder / "a.png", (1, 1))
    assert main(["-i", "in/a.png", "-o", "new/b.jpg", "--report", "--compare"]) == 0
    assert sorted(p.name for p in (folder.parent / "new").iterdir()) == [
        "b.jpg",
        "b.json",
        "b_compare.html",
        "b_compare.png",
        "b_experts.png",
    ]
    assert capsys.readouterr().out.startswith("restored 1 picture into new/b.jpg in ")


def test_report_and_comparison(pipe, folder):
    picture(folder / "a.png")
    assert main(["-i", "in/a.png", "-o", "out", "--report", "--compare", "--suffix", "_x"]) == 0
    report = json.loads((folder.parent / "out/a_x.json").read_text())
    assert report["routing"] == ROUTING
    assert (report["width"], report["height"], report["seed"]) == (6, 5, 0)
    assert report["inter_mean"] == {"group 1": 0.375, "group 2": 0.625}
    assert report["picks"] == {"group 1": [1, 1, 0], "group 2": [0, 0, 2]}
    with Image.open("out/a_x_compare.png") as image:
        assert image.size == (14, 5)
    with Image.open("out/a_x_experts.png") as image:
        assert image.width > 500
    page = (folder.parent / "out/a_x_compare.html").read_text()
    # Before, after, the small picture and the experts; no list for one picture.
    assert page.count("data:image/") == 4 and "compare.html" not in page
    assert not (folder.parent / "out/compare.html").exists()


def test_globs_and_several_inputs(pipe, folder):
    for name in ("a.png", "b.png", "c.jpg", "d.gif"):
        picture(folder / name)
    assert main(["-i", "in/*.png", "in/b.png", "in/c.jpg", "in/d.gif", "-o", "out"]) == 0
    assert len(pipe.calls) == 4
    names = sorted(p.name for p in (folder.parent / "out").iterdir())
    assert names == ["a.png", "b.png", "c.jpg", "d.png"]


@pytest.mark.parametrize("ext", ["png", "jpg", "webp"])
def test_ext(pipe, folder, ext):
    picture(folder / "a.png")
    assert main(["-i", "in", "-o", "out", "--ext", ext]) == 0
    with Image.open(f"out/a.{ext}") as image:
        assert image.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[ext]


def test_name_clash_is_reported_for_the_later_one(pipe, folder, capsys):
    picture(folder / "a.jpg", value=40)
    picture(folder / "a.png", value=90)
    assert main(["-i", "in", "-o", "out", "--ext", "png"]) == 1
    assert "in/a.png: would write the same files as in/a.jpg" in capsys.readouterr().err
    assert pixel("out/a.png") == [215] * 3
    assert main(["-i", "in", "-o", "jpg"]) == 0
    assert main(["-i", "in", "-o", "reports", "--report"]) == 1


def test_inputs_are_only_replaced_on_demand(pipe, folder, capsys):
    picture(folder / "a.png")
    assert main(["-i", "in", "-o", "in"]) == 1
    assert "would replace its own input" in capsys.readouterr().err
    assert main(["-i", "in", "-o", "in", "--resume"]) == 1
    assert pixel("in/a.png") == [40] * 3 and not pipe.calls
    assert main(["-i", "in", "-o", "in", "--overwrite"]) == 0
    assert pixel("in/a.png") == [215] * 3


def test_another_input_is_never_replaced(pipe, folder, capsys):
    picture(folder / "a.png")
    picture(folder / "a_x.png", value=90)
    assert main(["-i", "in", "-o", "in", "--suffix", "_x", "--overwrite"]) == 1
    assert "would replace the input" in capsys.readouterr().err
    assert pixel("in/a_x.png") == [90] * 3
    assert pixel("in/a_x_x.png") == [165] * 3


def test_what_exists_stays_unless_told_otherwise(pipe, folder, capsys):
    for name in ("a.png", "b.png"):
        picture(folder / name)
    command = ["-i", "in", "-o", "out"]
    assert main(command) == 0
    there = picture(folder.parent / "out/a.png", value=7).read_bytes()
    (folder.parent / "out/b.png").unlink()
    assert main(command) == 1
    assert "in/a.png: out/a.png exists; use --resume to keep it" in capsys.readouterr().err
    assert (folder.parent / "out/a.png").read_bytes() == there
    assert pixel("out/b.png") == [215] * 3 and len(pipe.calls) == 3
    assert main([*command, "--overwrite"]) == 0
    assert pixel("out/a.png") == [215] * 3


def test_resume_writes_what_is_missing(pipe, folder, capsys):
    for name in ("a.png", "b.png"):
        picture(folder / name)
    command = ["-i", "in", "-o", "out"]
    assert main(command) == 0
    (folder.parent / "out/b.png").unlink()
    picture(folder.parent / "out/a.png", value=7)
    capsys.readouterr()
    assert main([*command, "--resume"]) == 0
    assert "restored 1 picture into out" in (out := capsys.readouterr().out)
    assert "1 already there" in out and len(pipe.calls) == 3
    loads = len(pipe.loads)
    assert main([*command, "--resume"]) == 0
    assert len(pipe.loads) == loads
    # Reports are added without a change of the pictures.
    assert main([*command, "--resume", "--report"]) == 0
    assert len(pipe.calls) == 5 and pixel("out/a.png") == [7] * 3
    assert (folder.parent / "out/a.json").exists()


def test_resume_with_other_settings_says_so(pipe, folder, capsys):
    for name in ("a.png", "b.png"):
        picture(folder / name)
    command = ["-i", "in", "-o", "out", "--report", "--resume"]
    assert main([*command, "--strength", "0.5", "--experts", "se=0.5"]) == 0
    assert main([*command, "--strength", "0.5", "--experts", "se=0.5", "--batch-size", "2"]) == 0
    assert not capsys.readouterr().err
    # Of one picture the heat map is missing: its other files stay.
    (folder.parent / "out/b_experts.png").unlink()
    before = (folder.parent / "out/b.json").read_bytes()
    assert main(command) == 0
    assert capsys.readouterr().err == (
        "note: in/a.png and 1 more: is there already, made with "
        "experts {'se': 0.5}, strength 0.5; --overwrite makes it anew\n"
    )
    assert (folder.parent / "out/b.json").read_bytes() == before
    for text in ("[]", "{", ""):
        (folder.parent / "out/b.json").write_text(text)
        assert main(command) == 0
        assert "in/a.png: is there already" in capsys.readouterr().err


def test_the_list_of_pages_is_made_up_for_when_only_it_is_missing(pipe, folder):
    for name in ("a.png", "b.png"):
        picture(folder / name)
    command = ["-i", "in", "-o", "out", "--compare"]
    assert main(command) == 0
    page = folder.parent / "out/compare.html"
    text = page.read_text()
    page.unlink()
    assert main([*command, "--resume"]) == 0
    assert page.read_text() == text and len(pipe.calls) == 2
    assert main(["-i", "none.png", "missing.png", "-o", "new", "--compare"]) == 1
    assert not (folder.parent / "new").exists()


def test_resume_beside_the_inputs_restores_no_result_again(pipe, folder):
    picture(folder / "a.png")
    command = ["-i", "in", "-o", "in", "--suffix", "_x"]
    assert main(command) == 0
    picture(folder / "b.png")
    assert main([*command, "--resume"]) == 0
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["a.png", "a_x.png", "b.png", "b_x.png"]


@pytest.mark.parametrize("name", ["none.png", "none/*.png", ".", "a.png b.png " * 30])
def test_nothing_to_read(pipe, folder, capsys, name):
    assert main(["-i", name, "-o", "out.png"]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not pipe.loads and not (folder.parent / "out.png").exists()


def test_only_broken_inputs_load_no_model(pipe, folder):
    (folder / "a.png").write_text("text")
    assert main(["-i", "in", "-o", "out"]) == 1
    assert not pipe.loads and not (folder.parent / "out").exists()


def test_output_folder_that_cannot_be_made(pipe, folder, capsys):
    picture(folder / "a.png")
    (folder.parent / "out").touch()
    assert main(["-i", "in", "-o", "out"]) == 1
    assert "cannot make this folder" in capsys.readouterr().err
    assert not pipe.loads


@pytest.mark.parametrize("error", [ValueError, OSError, KeyError, ImportError])
def test_model_errors_are_one_sentence(folder, monkeypatch, capsys, error):
    def load(*_):
        raise error("no such model 'x'\nsecond line")

    monkeypatch.setattr("mimdit.loading.load_pipeline", load)
    picture(folder / "a.png")
    assert main(["-i", "in", "--model", "x"]) == 1
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "cannot load the model 'x'" in err
    assert main(["-i", "in", "--model", "x", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_missing_device(pipe, folder, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    picture(folder / "a.png")
    assert main(["-i", "in", "--device", "cuda"]) == 1
    assert "--device cuda is not available" in capsys.readouterr().err


def test_out_of_memory_says_what_to_do(folder, pipe, monkeypatch, capsys):
    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    monkeypatch.setattr(FakePipeline, "__call__", fail)
    picture(folder / "a.png")
    assert main(["-i", "in"]) == 1
    assert "use smaller tiles" in capsys.readouterr().err


def press_keys():
    signal.raise_signal(signal.SIGINT)


def other_error():
    """Ctrl-C inside a library that makes an error of its own of it."""
    try:
        press_keys()
    except KeyboardInterrupt:
        raise OSError("unable to load weights") from None


def dropped():
    """Ctrl-C where Python cannot raise it."""

    class Thing:
        pass

    thing = Thing()
    _ = weakref.ref(thing, lambda _: press_keys())
    del thing


@pytest.mark.parametrize("press", [press_keys, other_error, dropped])
@pytest.mark.parametrize("place", ["load", "picture", "write"])
def test_interrupt(folder, pipe, monkeypatch, capsys, press, place):
    for name in ("a.png", "b.png", "c.png"):
        picture(folder / name)
    home, name = {
        "load": (sys.modules["mimdit.engine"], "accelerate"),
        "picture": (FakePipeline, "__call__"),
        "write": (sys.modules["mimdit.cli.work"], "write_picture"),
    }[place]
    usual, times = getattr(home, name), []

    def stopped(*args, **options):
        times.append(place)
        # In the second picture; a picture with a comparison is two files.
        if len(times) == {"load": 1, "picture": 2, "write": 4}[place]:
            press()
        return usual(*args, **options)

    monkeypatch.setattr(home, name, stopped)
    command = ["-i", "in", "-o", "out", "--compare"]
    assert main(command) == 130
    out, err = capsys.readouterr()
    assert err == "mimdit-restore: stopped; run again with --resume to go on\n"
    done = 0 if place == "load" else 1 + (press is dropped)
    assert out.startswith(f"restored {done} picture") if done else not out
    there = {p.name for p in (folder.parent / "out").glob("?.png")}
    assert len(there) == done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(home, name, usual)
    assert main([*command, "--resume"]) == 0
    assert len(list((folder.parent / "out").iterdir())) == 3 * 3 + 1


def test_interrupt_while_weights_are_read(debug_model, folder, monkeypatch, capsys):
    """torch looks at a storage as at a sequence, and takes what that raises for "no sequence"."""
    assemble(debug_model, 1).save_pretrained("model")
    picture(folder / "a.png")
    usual, pressed = torch.UntypedStorage.__getitem__, []

    def item(storage, place):
        if isinstance(place, int):
            pressed.append(place)
            press_keys()
        return usual(storage, place)

    monkeypatch.setattr(torch.UntypedStorage, "__getitem__", item)
    with Interrupts(), pytest.raises(OSError, match="Unable to load weights"):
        load_real_pipeline("model")
    assert main(["-i", "in", "--model", "model", "--device", "cpu"]) == 130
    assert len(pressed) == 2
    out, err = capsys.readouterr()
    assert not out and err == "mimdit-restore: stopped; run again with --resume to go on\n"


def test_a_job_in_the_background_ignores_ctrl_c(folder, pipe, monkeypatch):
    picture(folder / "a.png")
    usual = FakePipeline.__call__
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        monkeypatch.setattr(
            FakePipeline,
            "__call__",
            lambda *a, **k: press_keys() or usual(*a, **k),
        )
        assert main(["-i", "in"]) == 0
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    "flags",
    [
        "--steps 0",
        "--steps x",
        "--strength 1.5",
        "--strength nan",
        "--guidance-scale -1",
        "--seed -1",
        "--tile -1",
        "-t 64",
        "--batch-size 0",
        "--device tpu",
        "--precision int8",
        "--color-fix yes",
        "--ext gif",
        "--suffix a/b",
        "--resume --overwrite",
        "-o out.png",
        "-o out.gif",
        "--unknown",
        "-o=",
        "-i=",
        "--experts spatial",
        "--experts spatial=2",
        "--experts =0.5",
        "--experts se=0.1,se=0.2",
        "--ray-workers 2",
        "--ray --device cuda:1",
    ],
)
def test_wrong_arguments_exit_with_2(folder, capsys, flags):
    for name in ("a.png", "b.png"):
        picture(folder / name)
    with pytest.raises(SystemExit) as caught:
        main(["-i", "in", *flags.split()])
    assert caught.value.code == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    ["--model tiny", "--precision fp32", "--no-accelerate", "--experts se=0.1"],
)
def test_what_an_exported_folder_cannot_follow_is_refused(pipe, folder, capsys, flags):
    """Also where it is the default, which was asked for."""
    picture(folder / "a.png")
    with pytest.raises(SystemExit) as caught:
        main(["-i", "in", "-o", "out", "--engine", "exported", *flags.split()])
    assert caught.value.code == 2
    flag = flags.split()[0]
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"mimdit-restore: error: {flag} does not go with --engine: ")
    assert not pipe.loads and not (folder.parent / "out").exists()


def test_a_named_file_excludes_suffix_and_ext(folder):
    picture(folder / "a.png")
    with pytest.raises(SystemExit):
        main(["-i", "in", "-o", "b.png", "--ext", "jpg"])


def test_help_imports_no_torch():
    code = (
        "import sys; from mimdit.cli.restore import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules or 'diffusers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--color-fix" in done.stdout and "examples:" in done.stdout


@pytest.mark.parametrize("flags", [[], ["--no-accelerate"]])
def test_the_engine_runs_unless_declined(pipe, folder, flags):
    assert main(["-i", str(picture(folder / "a.png")), "-o", "out", *flags]) == 0
    assert pipe.accelerated is not bool(flags)


def test_an_exported_folder_takes_the_place_of_the_model(pipe, folder, monkeypatch):
    seen = []
    entry = SimpleNamespace(load=lambda: lambda path, device: seen.append((path, device)) or pipe)
    monkeypatch.setattr("mimdit.cli.model.entry_points", lambda **_: [entry])
    command = ["-i", str(picture(folder / "a.png")), "-o", "out", "--engine", "exported"]
    assert main(command) == 0
    assert [str(path) for path, _ in seen] == ["exported"] and not pipe.loads
    flags = "--device cpu -t 128 --tile-overlap 16 --batch-size 2 --routing tile --shifts 2"
    more = "--steps 3 --guidance-scale 2 --strength 0.5 --color-fix adain --seed 4"
    assert main([*command, "--overwrite", *flags.split(), *more.split()]) == 0
    assert seen[1][1] == "cpu"
    del pipe.calls[1]["noise"]
    assert pipe.calls[1] == {
        "num_inference_steps": 3,
        "shifts": 2,
        "guidance_scale": 2,
        "strength": 0.5,
        "color_fix": "adain",
        "tile": 128,
        "tile_overlap": 16,
        "tile_batch": 2,
        "routing": "tile",
    }
    monkeypatch.setattr("mimdit.cli.model.entry_points", lambda **_: [])
    assert main([*command, "--overwrite"]) != 0
