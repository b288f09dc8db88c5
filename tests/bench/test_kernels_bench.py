import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from bench import kernel_cases, kernel_checks, kernels, measure
from bench.kernel_cases import CASES, SMALL, Case, make, variants
from bench.plots import kernel_bars
from mimkernels.backend import interpreting

CPU = torch.device("cpu")
# All take long, as each is compiled both ways; their kernels have tests of their own.
SOME = ["image_gate", "expert_linear", "expert_combine", "window_attention"]
needs_interpreter = pytest.mark.skipif(not interpreting(), reason="runs kernels on the CPU")


@pytest.mark.parametrize("size", SMALL, ids=str)
@pytest.mark.parametrize("op", CASES)
def test_comparators_are_equal_to_the_reference(op: str, size: kernel_cases.Size) -> None:
    case = make(op, size, torch.float32, CPU)
    grads, wanted = kernel_checks.oracle(case)
    others = {name: run for name, run in case.comparators.items() if callable(run)}
    # Where there are none, the reference is what others do.
    assert others or op not in ("image_gate", "expert_linear", "expert_combine", "grouped_linear")
    for name, run in others.items():
        for pass_, call in kernel_checks.PASSES.items():
            error = kernel_checks.difference(call(run, case.tensors, grads), wanted[pass_])
            assert error < 2e-6, (name, pass_)


@needs_interpreter
@pytest.mark.parametrize("op", CASES)
def test_kernels_take_what_the_cases_give(op: str) -> None:
    case = make(op, SMALL[0], torch.float32, CPU)
    grads, _ = kernel_checks.oracle(case)
    launches = [kernels._launches(case, call, grads) for call in kernel_checks.PASSES.values()]
    # Not every gradient has a kernel of its own.
    assert 0 < launches[0] <= launches[1]


@needs_interpreter
@pytest.mark.parametrize("ops", [SOME, pytest.param([*CASES], marks=pytest.mark.slow)], ids=len)
def test_command_on_a_cpu(
    ops: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    assert kernels.main(["--quick", "--device", "cpu", "--out", str(out), "--ops", *ops]) == 0
    assert "kernel speeds need a GPU" in capsys.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(row["op"], row["pass"]) for row in rows} == {
        (o, p) for o in ops for p in kernel_checks.PASSES
    }
    for row in rows:
        assert row["bench"] == "kernels" and row["dtype"] == "float32" and row["torch"]
        assert (row["tokens"], row["channels"], row["experts"], row["slots"]) == (12, 16, 4, 2)
        if row["variant"] == "liger":
            assert row["reason"] and row["parity"] is None
        else:
            assert row["parity"] is True and row["error"] < 2e-5 and row["reason"] is None
        # Time of an interpreter is not a kernel's.
        assert not any(key.endswith("_us") for key in row)
    launches = {(r["op"], r["pass"]): r["launches"] for r in rows if r["variant"] == "triton"}
    # Forward, input and weight; of expert_combine the last two in each of four groups.
    assert launches["expert_linear", "forward+backward"] == 3
    assert launches["expert_combine", "forward"] == 1
    assert launches["expert_combine", "forward+backward"] == 1 + 4 * 2
    assert launches["image_gate", "forward"] == 2


def wrong(case: Case) -> Case:
    return replace(case, kernel=lambda *tensors: case.reference(*tensors) * 1.001)


def test_a_wrong_kernel_fails_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = CASES["expert_linear"]
    monkeypatch.setitem(CASES, "expert_linear", lambda size, draw: wrong(plain(size, draw)))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert kernels.main(["--quick", "--device", "cpu", "--ops", "expert_linear"]) == 1
    assert "differs from the reference by" in capsys.readouterr().out


def test_errors_are_seen() -> None:
    exact = [torch.tensor([1.0, -2.0], dtype=torch.float64), torch.tensor([3, 4])]
    assert kernel_checks.difference([torch.tensor([1.0, -1.0]), exact[1]], exact) == 0.5
    for found in ([exact[0] * float("nan"), exact[1]], [exact[0], exact[1] + 1]):
        assert kernel_checks.difference(found, exact) == float("inf")
    assert kernel_checks.difference([exact[0][:1], exact[1]], exact) == float("inf")


def test_without_the_interpreter_kernels_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    case = make("expert_linear", SMALL[0], torch.float32, CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "needs a GPU" in str(variants(case)["triton"])


def test_rows_with_times(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All of a GPU's path but the GPU: graphs are stood in for by times made up."""
    case = make("expert_linear", SMALL[0], torch.float32, CPU)
    case = replace(case, kernel=case.reference, comparators={"broken": lambda *x: 1 / 0})
    candidates = {"triton": case.kernel, "eager": case.reference} | case.comparators
    monkeypatch.setattr(kernel_cases, "variants", lambda _: candidates)
    sets: list[int] = []

    def captured(run: Any, copies: int, device: torch.device) -> measure.Replay:
        for i in range(copies):
            run(i)
        sets.append(copies)
        return measure.Replay(None, 7, run)  # pyright: ignore[reportArgumentType]

    def replayed(
        replays: Mapping[str, measure.Replay], device: torch.device, runs: int
    ) -> dict[str, list[float]]:
        micro = {kernels.EMPTY: 1e-6, "triton": 2e-6, "eager": 5e-6}
        return {name: [micro[name]] * runs for name in replays}

    monkeypatch.setattr(measure, "captured", captured)
    monkeypatch.setattr(measure, "replayed", replayed)
    monkeypatch.setattr(measure, "cache_bytes", lambda _: 2 * case.costs.forward.bytes)
    monkeypatch.setattr(measure, "empty_kernel", lambda _: lambda: None)
    monkeypatch.setattr(kernels, "_launches", lambda *_: 1)
    found = list(kernels.measure_case(case, torch.device("cuda"), 3, peak=1e12, bandwidth=1e10))
    # Twice the cache holds four sets; a fifth is on its way.
    assert set(sets) == {5}
    rows = {(row["pass"], row["variant"]): row for row in found}
    assert len(rows) == 8
    kernel, eager = (rows["forward", name] for name in ("triton", "eager"))
    assert kernel["p50_us"] == pytest.approx(2) and kernel["calls"] == 7 and kernel["runs"] == 3
    assert eager["kernel_speedup"] == pytest.approx(2.5)
    least = case.costs.forward
    assert kernel["matrix_share"] == pytest.approx(least.flops / 2e-6 / 1e12)
    assert kernel["bandwidth_share"] == pytest.approx(least.bytes / 2e-6 / 1e10)
    assert kernel["floor_us"] == pytest.approx(max(least.flops / 1e6, least.bytes / 1e4))
    both = rows["forward+backward", "triton"]
    assert both["flops"] == 3 * kernel["flops"]
    broken = rows["forward", "broken"]
    assert broken["parity"] is None and "ZeroDivisionError" in broken["reason"]
    assert rows["forward", kernels.EMPTY]["p50_us"] == pytest.approx(1)

    shown = [
        {"op": case.op, "device": "none", "dtype": "float32"} | vars(case.size) | r for r in found
    ]
    assert "| 5.0 (5.0–5.0) |" in kernels.table(shown)
    kernel_bars(shown, tmp_path / "rows.png")
    with Image.open(tmp_path / "rows.png") as picture:
        assert picture.width > 500


def test_faults_stop_no_other_size_and_resume_goes_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[kernel_cases.Size] = []

    def measured(case: Case, *rest: object) -> Iterator[kernels.Row]:
        made.append(case.size)
        row = {"pass": "forward", "variant": "eager", "error": 0.0, "parity": True, "reason": None}
        yield row
        if case.size == SMALL[0]:
            raise RuntimeError("an illegal access")

    monkeypatch.setattr(kernels, "measure_case", measured)
    out = tmp_path / "rows.jsonl"
    command = ["--device", "cpu", "--ops", "expert_linear", "--out", str(out)]
    assert kernels.main(command) == 1
    rows = list(map(json.loads, out.read_text().splitlines()))
    assert [row["parity"] for row in rows] == [True, False, True]
    assert rows[1]["reason"] == "RuntimeError: an illegal access"
    # Cut off behind the first size, it begins with the second.
    out.write_text("".join(json.dumps(row) + "\n" for row in rows[:2]))
    assert kernels.main([*command, "--resume"]) == 1
    assert list(map(json.loads, out.read_text().splitlines()))[:2] == rows[:2]
    assert made == [*SMALL, SMALL[1]]
    assert capsys.readouterr().out.count("an illegal access") == 2


def test_the_cpu_computes_what_a_gpu_has_no_memory_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def compute(case: object, device: torch.device) -> object:
        asked.append(device.type)
        if device.type == "cuda":
            raise torch.OutOfMemoryError("float64")
        return "results"

    monkeypatch.setattr(kernel_checks, "_oracle", compute)
    case: Any = SimpleNamespace(tensors=[SimpleNamespace(device=torch.device("cuda"))])
    assert kernel_checks.oracle(case) == "results" and asked == ["cuda", "cpu"]


def test_bad_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (["--ops", "gemm"], "--ops: expected some of image_gate"),
        (["--runs", "0"], "--runs:"),
        (["--resume"], "--resume: expected --out"),
    ]
    for command, message in cases:
        with pytest.raises(SystemExit):
            kernels.main(command)
        assert message in capsys.readouterr().err
