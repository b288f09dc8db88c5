"""The commands of the ablation tables and of what a step costs."""

from pathlib import Path

import pytest

from training import ablation, cost
from training.interrupt import Stopped


def test_an_ablation_does_not_mix_budgets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = {"noise": {"psnr": 20.0, "ssim": 0.5}}
    monkeypatch.setattr(ablation, "run_variant", lambda *_: {"parameters": 1, "figures": figures})
    command = ["--output", str(tmp_path), "--variants", "full", "--max-train-steps"]
    assert ablation.main([*command, "4"]) == 0
    assert ablation.main([*command, "4"]) == 0
    capsys.readouterr()
    assert ablation.main([*command, "5"]) == 1
    expected = "has runs of other settings: expected max_train_steps 4, got max_train_steps 5; use"
    assert expected in capsys.readouterr().err


def test_an_ablation_that_is_stopped_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise Stopped(3, "runs/full")

    monkeypatch.setattr(ablation, "run_variant", stop)
    assert ablation.main(["--output", str(tmp_path), "--variants", "full"]) == 130
    said = capsys.readouterr()
    assert said.out == "stopped after step 3 of runs/full; the same command goes on\n"
    assert not said.err


@pytest.mark.parametrize(("flag", "value"), [("--crop", "510"), ("--share", "0")])
def test_costs_of_what_cannot_be_are_refused(
    flag: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cost.main([flag, value])
    assert f"{flag}: expected " in capsys.readouterr().err
