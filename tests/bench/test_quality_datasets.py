"""`mimdit-eval --dataset`: restored once, scored as saved, written in four formats."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import evaluate, evaluate_scores, paper, quality, tables
from mimdit import metrics
from mimdit.image_io import read_picture
from mimdit.loading import assemble
from mimdit.metrics import Metric, psnr
from mimdit.presets import build
from tests.training import data_folders
from training.datasets.layouts import read

pytest.importorskip("pyiqa")
SINGLE = ("01Blur", "05Noise", "08Haze", "10Rain", "14Lowlight")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    assemble(build("debug").randomize_(0).eval(), default_steps=1).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def foundir(tmp_path: Path) -> Path:
    root = tmp_path / "FoundIR"
    for t, name in enumerate(SINGLE):
        for i in (1, 2):
            folder = root / name
            paths = folder / f"GT/{i:04}.png", folder / f"LQ/{i:04}.png"
            data_folders.pair(*paths, 10 * t + i, (40, 48))
    return root


def command(model: str, name: str, root: Path, out: Path, *more: str) -> list[str]:
    flags = ["--model", model, "--dataset", name, "--data", str(root), "--output", str(out)]
    return [*flags, "--metrics", "psnr", "ssim", *more]


def test_foundir(
    model: str, foundir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert quality.main(command(model, "foundir", foundir, out, "no_such_metric")) == 0
    printed = capsys.readouterr()
    assert "note: 10 of 1500 published pairs are here" in printed.err
    results = json.loads((out / "results.json").read_text())
    named = {(f["degradation"], f["metric"]): f for f in results["figures"]}
    assert set(named) == {(d, m) for d in (*SINGLE, "all") for m in ("psnr", "ssim")}
    # Against the definition, on the saved files.
    scores = [
        psnr(*(torch.from_numpy(read_picture(path).rgb) for path in pair))
        for pair in zip(
            sorted((out / "restored/05Noise").iterdir()),
            sorted((foundir / "05Noise/GT").iterdir()),
            strict=True,
        )
    ]
    assert named["05Noise", "psnr"]["ours"] == pytest.approx(np.mean(scores), abs=1e-3)
    assert named["05Noise", "psnr"]["n"] == 2 and named["all", "psnr"]["n"] == 10
    assert "Y of YCbCr" in named["all", "ssim"]["variant"]
    assert list(results["missing"]) == ["no_such_metric"]
    assert {"torch", "pyiqa", "mimdit"} <= set(results["versions"])
    assert results["settings"]["steps"] == 1 and results["settings"]["seed"] == 0
    # Table 6 beside the paper's columns, weights of a picture that sum to one.
    assert set(results["inter"]) == {"blur", "noise", "haze", "rain", "low_light"}
    assert sum(results["inter"]["haze"]) == pytest.approx(1, abs=1e-5)
    assert "| blur | " in printed.out and "| 0.362 | 0.140 | 0.359 | 0.139 |" in printed.out
    assert "without no_such_metric" in printed.out and "pyiqa" in printed.out
    lines = (out / "results.csv").read_text().splitlines()
    assert len(list(csv.DictReader(lines))) == 12 and "pyiqa " in lines[1]
    assert len((out / "pictures.csv").read_text().splitlines()) == 11
    assert r"\begin{tabular}" in (out / "results.tex").read_text()


def test_goes_on_where_it_was_stopped(
    model: str, foundir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in SINGLE[1:4]:
        shutil.rmtree(foundir / name)
    out = tmp_path / "out"
    run = command(model, "foundir", foundir, out, "--limit", "1")
    assert quality.main(run) == 0
    first = out / "restored/01Blur/0001.png"
    pixels, second = first.read_bytes(), out / "restored/14Lowlight/0001.png"
    wanted = second.read_bytes()
    times = {path: path.stat().st_mtime_ns for path in (out / "restored").rglob("*.png")}
    second.unlink()
    assert quality.main(run) == 0
    assert second.read_bytes() == wanted
    again = {path: path.stat().st_mtime_ns for path in (out / "restored").rglob("*.png")}
    assert {path for path in times if times[path] != again[path]} == {second}
    capsys.readouterr()
    # Other settings do not mix with what is there.
    assert quality.main([*run, "--seed", "1"]) == 2
    assert "expected seed 0, got seed 1" in capsys.readouterr().err
    assert first.read_bytes() == pixels
    assert quality.main([*run, "--steps", "2"]) == 2
    assert "expected steps 1, got steps 2" in capsys.readouterr().err
    assert quality.main([*run, "--steps", "2", "--overwrite"]) == 0
    assert first.read_bytes() != pixels


def test_scores_pictures_of_any_method_without_a_model(tmp_path: Path) -> None:
    root = data_folders.hazerd(tmp_path / "HazeRD")
    out = tmp_path / "out"
    for pair in read("hazerd", root).pairs:
        assert pair.clean is not None
        (out / "restored").mkdir(parents=True, exist_ok=True)
        Image.open(pair.clean).save(out / f"restored/{pair.name}.png")
    run = command("no such model", "hazerd", root, out, "--score-damaged")
    assert quality.main(run) == 0
    figures = json.loads((out / "results.json").read_text())["figures"]
    assert [(f["degradation"], f["n"]) for f in figures] == [("HazeRD", 10)] * 2
    ssim = figures[1]
    assert ssim["ours"] == pytest.approx(1, abs=1e-4) and ssim["damaged"] < 0.9
    assert "damaged | ours" in (out / "results.md").read_text()


def test_broken_pictures_are_named(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = data_folders.folders(tmp_path / "mine")
    (root / "LQ/1.jpg").write_bytes(b"no picture")
    data_folders.save(root / "GT/2.PNG", 2, (25, 32))
    out = tmp_path / "out"
    assert quality.main(command(model, "folder", root, out)) == 1
    results = json.loads((out / "results.json").read_text())
    assert [f["n"] for f in results["figures"]] == [1, 1]
    assert [text.split(":")[0] for text in results["failures"]] == ["1", "2"]
    assert "not a picture" in results["failures"][0]
    assert "expected 32×25 pixels" in results["failures"][1]
    assert "failed: 1: " in capsys.readouterr().out


def test_settings_that_no_picture_was_restored_with_bind_nobody(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = data_folders.folders(tmp_path / "mine")
    run = command(model, "folder", root, tmp_path / "out")
    assert quality.main([*run, "--tile-overlap=-1"]) == 1
    assert "failed: 0: tile_overlap: expected at least 0" in capsys.readouterr().out
    assert quality.main([*run, "--limit", "1"]) == 0
    assert quality.main([*run, "--seed", "4"]) == 2
    assert "has pictures of other settings: expected seed 0, got seed 4" in capsys.readouterr().err


def test_two_folders_and_damaged_pictures_alone(model: str, tmp_path: Path) -> None:
    for i in range(2):
        data_folders.pair(tmp_path / f"a/{i}.png", tmp_path / f"b/{i}.png", i)
    more = ("--originals", str(tmp_path / "a"))
    assert quality.main(command(model, "folder", tmp_path / "b", tmp_path / "out", *more)) == 0
    # No original: what needs one is named as missing.
    run = command(model, "folder", tmp_path / "b", tmp_path / "alone", "piqe")
    assert quality.main(run) == 0
    results = json.loads((tmp_path / "alone/results.json").read_text())
    assert [f["metric"] for f in results["figures"]] == ["piqe"]
    assert list(results["missing"]) == ["psnr", "ssim"]


def test_wrong_arguments(model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, text in (
        (["--dataset", "foundir"], "needs --data"),
        (["--data", "x"], "needs --dataset"),
        (["--dataset", "uhdll", "--data", "x", "--seeds", "2"], "--seeds is of the held-out"),
        (["--dataset", "uhdll", "--data", "x", "--steps", "1", "2"], "expected one number"),
        (["--dataset", "uhdll", "--data", "x", "--originals", "y"], "--dataset folder only"),
    ):
        with pytest.raises(SystemExit):
            quality.main(flags)
        assert text in capsys.readouterr().err
    assert quality.main(command(model, "uhdll", tmp_path, tmp_path / "out")) == 2
    error = capsys.readouterr().err
    assert error.startswith("mimdit-eval: uhdll: expected training_set") and error.count("\n") == 1


def test_folder_metrics_get_the_pictures_of_a_degradation(foundir: Path) -> None:
    seen = []

    class Network:
        def __call__(self, ours: str, clean: str, **options: object) -> float:
            seen.append(
                (sorted(p.name for p in Path(ours).iterdir()), len(list(Path(clean).iterdir())))
            )
            return 3.5

    fid = Metric("fid", "fake", True, True, True, Network())
    pairs = list(read("foundir", foundir).pairs)[:3]
    rows, failures = evaluate_scores.score(pairs, evaluate._damaged, {"fid": fid})
    assert [row["name"] for row in rows] == ["01Blur/0001", "01Blur/0002", "05Noise/0001"]
    assert not failures
    found, missing = evaluate_scores.figures(
        "foundir", pairs, rows, evaluate._damaged, {"fid": fid}
    )
    # One picture has no FID; the paper's stands beside the others' of FoundIR.
    assert [(f.degradation, f.n, f.ours) for f in found] == [("01Blur", 2, 3.5), ("all", 3, 3.5)]
    assert found[0].paper["MiM-DiT"] == 16.9659 and not found[1].paper and not missing
    assert seen == [(["000000.png", "000001.png"], 2), ([f"00000{i}.png" for i in range(3)], 3)]


def test_figures_that_are_not_finite_are_named_and_not_averaged(foundir: Path) -> None:
    """As a metric may give for a picture of one colour; NaN is no JSON either."""
    values = iter([3.0, float("nan"), float("inf"), 5.0])
    niqe = Metric("niqe", "fake", True, False, False, lambda picture: next(values))
    pairs = list(read("foundir", foundir).pairs)[:4]
    rows, failures = evaluate_scores.score(pairs, evaluate._damaged, {"niqe": niqe})
    assert failures == [
        "01Blur/0002: no niqe: expected a finite number, got nan",
        "05Noise/0001: no niqe: expected a finite number, got inf",
    ]
    found, _ = evaluate_scores.figures("foundir", pairs, rows, evaluate._damaged, {"niqe": niqe})
    assert [(f.degradation, f.n, f.ours) for f in found] == [
        ("01Blur", 1, 3.0),
        ("05Noise", 1, 5.0),
        ("all", 2, 4.0),
    ]


def test_the_papers_columns() -> None:
    assert paper.figures("uhdll", "musiq")["MiM-DiT"] == 40.6206
    lpips = paper.figures("14Lowlight", "lpips")
    assert (lpips["AirNet"], lpips["DA-CLIP"], lpips["MiM-DiT"]) == (0.8002, 0.5067, 0.2176)
    assert {len(paper.figures(name, "fid")) for name in paper.NAMES} == {11}
    assert paper.figures("uhdll", "psnr") == {} and paper.figures("02Blur_Noise", "fid") == {}


def test_tables_show_the_papers_columns() -> None:
    figure = tables.Figure(
        "01Blur", "fid", "clean-fid", True, 150, 12.25, paper=paper.figures("01Blur", "fid")
    )
    settings = {"model": "a_b"}
    results = tables.Results("foundir", settings, {"torch": "2.15"}, [figure], {"niqe": "no net"})
    text = tables.markdown(results)
    assert "| degradation | metric | N | ours | MiM-DiT (paper) | AirNet (paper) |" in text
    assert "| 01Blur | fid ↓ | 150 | 12.2500 | 16.9659 | 42.4248 |" in text
    assert "- without niqe: no net" in text and "torch 2.15" in text and "fid: clean-fid" in text
    latex = tables.latex(results)
    assert r"01Blur & fid $\downarrow$ & 150 & 12.2500 & 16.9659 & 42.4248" in latex
    assert r"model a\_b" in latex
    row = next(csv.DictReader(tables.comma_separated(results).splitlines()))
    assert row["MiM-DiT (paper)"] == "16.9659" and row["better"] == "lower" and row["n"] == "150"


def test_standard_metrics_have_their_variants() -> None:
    assert set(metrics.STANDARD) <= set(metrics._VARIANTS)
    found, missing = metrics.load_metrics(["psnr", "ssim", "nothing"])
    assert set(found) == {"psnr", "ssim"} and list(missing) == ["nothing"]
    assert found["psnr"].needs_original and not found["psnr"].of_folders
