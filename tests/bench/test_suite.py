import argparse
import importlib
import json
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


def test_stages_that_go_on_by_themselves_keep_their_rows(tmp_path: Path) -> None:
    stages = (Stage("kernels", "platform", gpu=False, resumes=True),)
    (tmp_path / "kernels.jsonl").write_text("rows")
    assert main(["--out", str(tmp_path), "--resume"], stages) == 0
    assert (tmp_path / "kernels.jsonl").read_text() == "rows"
    assert main(["--out", str(tmp_path)], stages) == 0
    assert not (tmp_path / "kernels.jsonl").exists()


def test_all_stages_fit_into_the_time_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages = (Stage("later", "platform", gpu=False),)
    assert main(["--out", str(tmp_path), "--total", "5"], stages) == 1
    assert "later: left to --resume, the time is up" in capsys.readouterr().out
    assert main(["--out", str(tmp_path), "--total", "600", "--resume"], stages) == 0


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
