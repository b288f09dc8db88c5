import json
from pathlib import Path

import pytest

from bench.suite import STAGES, Stage, main


def read(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "suite.json").read_text())


def test_stages_run_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = (
        Stage("good", "platform", gpu=False),
        Stage("bad", "this_is_no_module", gpu=False),
        Stage("slow", "http.server --bind 127.0.0.1 0", gpu=False),
    )
    assert main(["--out", str(tmp_path), "--limit", "3"], stages) == 1
    state = read(tmp_path)
    assert [state[name]["code"] for name in ("good", "bad", "slow")] == [0, 1, None]
    assert "No module named" in (tmp_path / "bad.log").read_text()
    capsys.readouterr()
    assert main(["--out", str(tmp_path), "--resume", "--stages", "good", "bad"], stages) == 1
    out = capsys.readouterr().out
    assert "good: done before" in out and "bad: failed (1)" in out


def test_gpu_stages_are_named_where_there_is_none(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--out", str(tmp_path), "--stages", "latency-512"]) == 0
    assert "latency-512: left out, it needs a GPU" in capsys.readouterr().out


def test_results_go_into_the_folder() -> None:
    for stage in STAGES:
        assert stage.command.startswith("pytest") or "--out {out}/" in stage.command
