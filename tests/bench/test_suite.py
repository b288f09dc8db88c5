import argparse
import importlib
import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest

from bench.stages import STAGES, Stage
from bench.suite import main


def read(folder: Path) -> dict[str, dict[str, object]]:
    return json.loads((folder / "suite.json").read_text())


def test_stages_run_and_resume(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = (
        Stage("good", "platform", gpu=False),
        Stage("bad", "this_is_no_module", gpu=False),
        Stage("slow", "http.server --bind 127.0.0.1 0", gpu=False),
    )
    (tmp_path / "good.jsonl").write_text("rows of before")
    assert main(["--out", str(tmp_path), "--limit", "3"], stages) == 1
    state = read(tmp_path)
    assert [state[name]["code"] for name in ("good", "bad", "slow")] == [0, 1, None]
    assert "No module named" in (tmp_path / "bad.log").read_text()
    assert "No module named" in capsys.readouterr().out
    # Nothing is doubled, and nothing lost.
    assert not (tmp_path / "good.jsonl").exists()
    assert (tmp_path / "good.jsonl.before").read_text() == "rows of before"
    assert main(["--out", str(tmp_path), "--resume", "--stages", "good", "bad"], stages) == 1
    out = capsys.readouterr().out
    assert "good: done before" in out and "bad: failed (1)" in out
    assert set(read(tmp_path)) == {"good", "bad", "slow"}


ROW = '{"bench": "kernels"}\n'


def test_stages_that_go_on_by_themselves_keep_their_rows(tmp_path: Path) -> None:
    stages = (Stage("kernels", "platform", gpu=False, resumes=True),)
    (tmp_path / "kernels.jsonl").write_text(ROW)
    assert main(["--out", str(tmp_path), "--resume"], stages) == 0
    assert (tmp_path / "kernels.jsonl").read_text() == ROW
    assert main(["--out", str(tmp_path)], stages) == 0
    assert not (tmp_path / "kernels.jsonl").exists()


def test_all_stages_fit_into_the_time_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = (Stage("later", "platform", gpu=False),)
    assert main(["--out", str(tmp_path), "--total", "5"], stages) == 1
    assert "later: left to --resume, the time is up" in capsys.readouterr().out
    assert main(["--out", str(tmp_path), "--total", "600", "--resume"], stages) == 0


@pytest.mark.parametrize("stopped", [False, True], ids=["time limit", "suite stopped"])
def test_nothing_outlives_a_stage(
    stopped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the program under a sanitizer, which would go on beside the next measurement."""
    number = tmp_path / "number"
    (tmp_path / "staged.py").write_text(
        "import pathlib, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"pathlib.Path({str(number)!r}).write_text(str(child.pid))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def stop() -> None:
        while not number.exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    command = ["--out", str(tmp_path / "out"), "--limit", "60" if stopped else "3"]
    stages = (Stage("parent", "staged", gpu=False),)
    if stopped:
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises(SystemExit, match="143"):
            main(command, stages)
        assert not (tmp_path / "out" / "suite.json").exists()
    else:
        assert main(command, stages) == 1
    status = Path(f"/proc/{number.read_text()}/stat")
    for _ in range(100):
        # Gone, or waiting for its new parent to notice.
        if not status.exists() or status.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("what the stage started still runs")


def test_stages_that_cannot_run_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--out", str(tmp_path), "--stages", "latency-512"]) == 0
    assert "latency-512: left out, it needs a GPU" in capsys.readouterr().out
    stages = (Stage("checked", "platform", gpu=False, under="no-such-program --strict"),)
    assert main(["--out", str(tmp_path)], stages) == 0
    assert "checked: left out, there is no no-such-program" in capsys.readouterr().out


class ParsedError(Exception):
    """Ends a command behind its arguments."""


@pytest.mark.parametrize("small", [False, True], ids=["", "small"])
@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_commands_take_their_arguments(
    stage: Stage, small: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    words = stage.words("python", tmp_path, small)
    name, *given = words[words.index("-m") + 1 :]
    if name == "pytest":
        files = [word for word in given if word.startswith("tests")]
        assert files and all(Path(__file__).parents[2].joinpath(file).exists() for file in files)
        return
    plain = argparse.ArgumentParser.parse_args

    def parsed(self: argparse.ArgumentParser, argv: list[str]) -> None:
        found = plain(self, argv)
        assert found.out == tmp_path / f"{stage.name}.jsonl"
        raise ParsedError

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parsed)
    with pytest.raises(ParsedError):
        importlib.import_module(name).main(given)


@pytest.mark.slow
def test_the_whole_suite_at_small_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["--small", "--out", str(tmp_path)]) == 0, capsys.readouterr().out
    for stage in STAGES:
        if stage.name not in read(tmp_path):
            assert stage.under
            continue
        if "--out" in stage.command:
            rows = (tmp_path / f"{stage.name}.jsonl").read_text().splitlines()
            assert rows and all(json.loads(row) for row in rows)
