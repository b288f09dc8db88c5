import json
import time
from pathlib import Path

import pytest

from bench import data


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["--size", "24", "--seconds", "0.001", "--types", "05Noise", "haze+rain"]
    assert data.main([*command, "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["what"] for row in rows] == ["05Noise", "haze+rain"]
    assert f"| 05Noise | {rows[0]['rate']:.0f} |" in capsys.readouterr().out
    assert data.main([*command, "--least", "1e9"]) == 1
    assert "slower than 1e+09: 05Noise, haze+rain" in capsys.readouterr().err


def test_waiting_does_not_count() -> None:
    # By the clock it could not reach 200.
    assert data.rate(lambda rng: time.sleep(0.005), 0) > 400


def test_reading_compares_crops_with_whole_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_LARGE", (360, 640))
    rows = data.reading(32, 0.001)
    assert [row["what"] for row in rows] == ["png of 640×360", "jpg of 640×360"]
    assert all(row[key] > 0 for row in rows for key in ("native", "wide", "whole"))


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--types", "05Noise", "21Snow"], "--types: type: expected one of 01Blur"),
        (["--size", "0"], "--size: expected at least 1, got 0"),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_timed(
    flags: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        data.main(flags)
    said = capsys.readouterr()
    assert expected in said.err and not said.out
