"""Targets, held against rows that were made up."""

import json
from pathlib import Path
from typing import Any

import pytest

from bench import targets
from bench.targets import Results, table

SD35 = {"bench": "latency", "model": "sd35-medium", "steps": 40, "batch": 1, "parity": True}
KERNEL = {"bench": "kernels", "pass": "forward", "variant": "triton", "parity": True}


def latency(variant: str, seconds: float, side: int = 512, **known: Any) -> dict[str, Any]:
    sizes = {"height": side, "width": side}
    return {**SD35, **sizes, "variant": variant, "picture_p50_s": seconds, **known}


def line(words: str, *files: list[dict[str, Any]]) -> str:
    """The one row of the table that begins with these words: what was measured, and the verdict."""
    (found,) = (row for row in table(Results(files)).splitlines() if row.startswith(f"| {words}"))
    return found.split("|", 3)[3].strip(" |")


def test_nothing_measured_is_neither_met_nor_missed() -> None:
    rows = table(Results([])).splitlines()[2:]
    assert len(rows) == len(targets.TARGETS)
    assert all(row.endswith("| not measured | |") for row in rows)


def test_the_last_figure_of_equal_results_counts() -> None:
    slow, fast = latency("engine", 0.5), latency("engine", 0.25)
    wrong = latency("engine", 0.1, parity=False)
    assert line("512², one picture", [slow]) == "0.500 s | missed"
    assert line("512², one picture", [slow], [fast, wrong]) == "0.250 s | met"
    assert line("512², one picture", [latency("engine", 0.1, batch=4)]) == "not measured"


def test_ratios_are_of_one_file() -> None:
    engine, bare = latency("engine", 0.3), latency("backbone-compiled", 0.25)
    assert line("512² beside", [engine], [bare]) == "not measured"
    assert line("512² beside", [latency("engine", 9.0)], [engine, bare]) == "1.20 × | missed"
    assert line("512² faster", [latency("reference", 1.8), engine]) == "6.00 × | met"


def test_the_worst_size_decides_where_the_floor_is_above_a_launch() -> None:
    rows = [
        {**KERNEL, "op": "window_attention", "floor_us": floor, "bandwidth_share": share}
        for floor, share in ((3, 0.1), (40, 0.8), (80, 0.65))
    ]
    assert line("window_attention: share", rows) == "65% | missed"
    assert line("window_attention: share", rows[:2]) == "80% | met"
    assert line("window_attention: share", rows[:1]) == "not measured"


def test_small_calls_are_counted_in_empty_kernels() -> None:
    empty = {**KERNEL, "variant": "empty kernel", "parity": None, "op": "joint_qkv", "p50_us": 2.0}
    small = {**KERNEL, "op": "joint_qkv", "floor_us": 1.0, "p50_us": 6.0, "launches": 2}
    assert line("small calls", [empty, small]) == "1.50 × | met"
    assert line("small calls", [small]) == "not measured"


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [latency(name, seconds) for name, seconds in (("reference", 2.0), ("engine", 0.2))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert targets.main([str(tmp_path)]) == 0
    assert "≥ 5.00 × | 10.00 × | met |" in capsys.readouterr().out
    (tmp_path / "text.txt").write_text("no rows")
    for name in ("text.txt", "missing"):
        with pytest.raises(SystemExit, match="2"):
            targets.main([str(tmp_path / name)])
        assert "expected JSON lines" in capsys.readouterr().err
