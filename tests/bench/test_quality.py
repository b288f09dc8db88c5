import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import classical, quality, routing
from mimdit.loading import assemble
from mimdit.metrics import psnr
from mimdit.presets import build


def score(image: np.ndarray, clean: np.ndarray) -> float:
    return psnr(torch.from_numpy(image), torch.from_numpy(clean))


@pytest.mark.parametrize("damage", ["noise", "low_light", "haze", "rain"])
def test_some_classical_method_helps(damage: str) -> None:
    for name, clean in quality.pictures(192).items():
        image = quality.damaged(damage, clean, seed=0)
        after = [
            score(classical.restore(m, image), clean) for m in classical.METHODS[damage].values()
        ]
        if damage != "rain" or name == "coffee":
            assert max(after) > score(image, clean), name


def test_deconvolution_sharpens_a_known_blur() -> None:
    clean = quality.pictures(128)["coffee"]
    blurred = classical.restore(lambda x: classical.ndimage.gaussian_filter(x, (2, 2, 0)), clean)
    sharp = classical.restore(classical.METHODS["blur"]["Richardson–Lucy, σ=2.0"], blurred)
    assert score(sharp, clean) > score(blurred, clean) + 0.5


def test_mutual_information_of_known_tables() -> None:
    labels = ["a", "a", "b", "b"]
    apart = torch.eye(2)[[0, 0, 1, 1]].view(4, 1, 1, 2)
    assert routing.mutual_information(labels, apart).item() == pytest.approx(1)
    even = torch.full((4, 1, 1, 2), 0.5)
    assert routing.mutual_information(labels, even).item() == pytest.approx(0, abs=1e-6)
    # Labels weigh the same, however many pictures each has.
    more = torch.cat([apart, apart[:1].expand(4, -1, -1, -1)])
    found = routing.mutual_information([*labels, *"aaaa"], more)
    assert found.item() == pytest.approx(1)


@pytest.fixture
def untrained(tmp_path: Path) -> Path:
    pipe = assemble(build("debug").randomize_(0).eval(), default_steps=1)
    pipe.save_pretrained(tmp_path / "model")
    return tmp_path


def test_command(untrained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = untrained / "new/rows.jsonl", untrained / "newer/sheet.png"
    command = ["--model", str(untrained / "model"), "--size", "64", "--seeds", "2", "--metrics"]
    command += ["--steps", "1", "2", "--damages", "noise", "haze", "rain+haze"]
    assert quality.main([*command, "--out", str(out), "--picture", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert "| damage | damaged | best classical | 1 step | 2 steps |" in printed
    assert "Mutual information" in printed
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    # Four pictures, two seeds; the damaged one, the methods, two numbers of steps.
    counts = {d: sum(row["damage"] == d for row in rows) for d in ("noise", "haze")}
    assert counts == {"noise": 8 * (1 + 3 + 2), "haze": 8 * (1 + 3 + 2)}
    noise = [r["psnr"] for r in rows if r["damage"] == "noise" and r["variant"] == "damaged"]
    assert f"| noise | {np.mean(noise):.2f} / " in printed
    with Image.open(picture) as sheet:
        assert sheet.size == (2 * 64, 3 * 64)


def test_a_model_that_is_not_there_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for more in ([], ["--dataset", "folder", "--data", str(tmp_path)]):
        Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
        command = ["--model", "nowhere", *more, "--metrics"]
        if more:
            command += ["--output", str(tmp_path / "out")]
        assert quality.main(command) == 2
        error = capsys.readouterr().err
        assert error.startswith("mimdit-eval: --model nowhere: no such model folder")
        assert len(error.splitlines()) == 1


def test_flags_of_data_sets_need_one(capsys: pytest.CaptureFixture[str]) -> None:
    for flags, expected in (
        (["--limit", "3"], "--limit goes with --dataset only"),
        (["--score-damaged"], "--score-damaged goes with --dataset only"),
        (["--dataset", "folder", "--data", "x", "--limit", "0"], "--limit: expected at least 1"),
        (["--size", "0"], "--size: expected at least 11, got 0"),
        (["--steps", "8", "0"], "--steps: expected at least 1, got 0"),
        (["--dataset", "folder", "--data", "x", "--steps", "0"], "--steps: expected at least 1"),
        (["--seed", "1"], "--seed goes with --dataset only"),
        (["-t", "64"], "--tile goes with --dataset only"),
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
    ):
        with pytest.raises(SystemExit):
            quality.main(flags)
        assert expected in capsys.readouterr().err
