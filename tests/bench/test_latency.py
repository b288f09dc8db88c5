import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench import latency, measure
from mimdit.loading import assemble
from mimdit.presets import build


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assemble(build("debug").randomize_(0)).save_pretrained(tmp_path / "model")
    out = tmp_path / "rows.jsonl"
    command = ["--model", str(tmp_path / "model"), "--sizes", "64", "--steps", "2", "--runs", "2"]
    assert (
        latency.main([*command, "--device", "cpu", "--precision", "fp32", "--out", str(out)]) == 0
    )
    assert "reference-cached" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    names = ["reference", "reference-cached", "engine-no-graph", "backbone-eager"]
    assert [row["variant"] for row in rows] == names
    for row in rows:
        assert row["parity"] and (row["rel_err"] or 0) < 1e-5
        assert 0 < row["picture_p50_s"] <= row["picture_p99_s"]
        assert row["step_tflop"] > 0 and row["peak_share"] > 0
    # A step of the literal form encodes the condition again and runs the queries it drops.
    flops = [row["step_tflop"] for row in rows]
    assert flops[0] > flops[1] > flops[2] > flops[3]
    assert (tmp_path / "rows.png").stat().st_size > 1000


def test_no_speed_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("debug").randomize_(0).requires_grad_(False).eval()
    honest = latency.variants_of(model)
    wrong = replace(honest[1], step=lambda x, t, c: honest[1].step(x, t, c) * 1.01)
    monkeypatch.setattr(latency, "variants_of", lambda _: [honest[0], wrong])
    rows = latency.run(model, "debug", size=64, steps=1, runs=1, warmup=0)
    assert [row["parity"] for row in rows] == [True, False]
    assert "picture_p50_s" in rows[0] and "picture_p50_s" not in rows[1]
    assert "no speed" in latency.table(rows)


def test_runs_are_interleaved() -> None:
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    times = measure.interleaved(calls, torch.device("cpu"), warmup=1, runs=2)
    assert order == ["a", "b"] * 3
    assert [len(t) for t in times.values()] == [2, 2]
