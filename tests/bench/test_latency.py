import json
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel

from bench import latency, machine, measure, variants
from bench.inputs import load, make_inputs
from bench.rows import Row, RowFile
from bench.variants import MAKERS, variants_of
from mimdit.loading import assemble
from mimdit.presets import build

# What a row of `python -m bench.latency` has at least.
FIELDS = {"bench", "variant", "model", "device", "dtype", "height", "width", "batch", "steps"}
FIELDS |= {f"picture_p{p}_s" for p in (50, 90, 99)}
FIELDS |= {
    f"{part}_p{p}_ms"
    for part in ("step", "condition", "vae_encode", "vae_decode")
    for p in (50, 90, 99)
}
FIELDS |= {"cold_s", "capture_s", "peak_allocated_mb", "peak_reserved_mb", "tflops", "peak_share"}
FIELDS |= {"rel_err", "parity", "approximate", "revision", "torch", "triton", "diffusers"}
EXACT = ["reference", "reference-cached", "engine-no-graph", "engine"]
APPROXIMATE = ["engine-int8", "engine-first-block-cache"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assemble(build("debug").randomize_(0)).save_pretrained(tmp_path / "model")
    out = tmp_path / "rows.jsonl"
    names = [*EXACT, *APPROXIMATE, "engine-fp8", "backbone-eager", "tensorrt"]
    command = ["--model", str(tmp_path / "model"), "--sizes", "64", "--steps", "2", "--runs", "2"]
    command += ["--device", "cpu", "--precision", "fp32", "--batch", "2", "--out", str(out)]
    command += ["--warmup", "1", "--thresholds", "0", "1e9"]
    assert latency.main([*command, "--variants", *names]) == 0
    printed = capsys.readouterr().out
    assert "engine-fp8: left out, quantize: 'fp8' needs an NVIDIA GPU of compute" in printed
    assert "tensorrt: left out, it needs a GPU" in printed
    assert "engine-int8 (approximate)" in printed and "dB to the engine" in printed
    rows = {row["variant"]: row for row in map(json.loads, out.read_text().splitlines())}
    cached = [f"engine-first-block-cache={threshold}" for threshold in ("0", "1e+09")]
    assert list(rows) == [*EXACT, *APPROXIMATE, "backbone-eager", *cached]
    # The first step runs all blocks.
    assert [rows[name]["steps_skipped"] for name in cached] == [0, 1]
    assert rows[cached[0]]["psnr_db"] > 60 and rows[cached[0]]["threshold"] == 0
    assert "| 64² × 2 steps | 1e+09 |" in printed and "| 50% |" in printed
    for name, row in rows.items():
        assert not FIELDS - set(row), name
        assert row["parity"] and row["approximate"] == (name in [*APPROXIMATE, *cached])
        assert 0 < row["picture_p50_s"] <= row["picture_p90_s"] <= row["picture_p99_s"]
        assert row["step_tflop"] > 0 and row["peak_share"] > 0 and row["batch"] == 2
    for name in EXACT:
        assert rows[name]["rel_err"] < 1e-5 and rows[name]["psnr_db"] > 60
    assert rows["backbone-eager"]["rel_err"] is None
    assert 20 < rows["engine-int8"]["psnr_db"] < rows["engine"]["psnr_db"]
    # A step of the literal form encodes the condition again and runs the queries it drops.
    order = ["reference", "reference-cached", "backbone-eager"]
    flops = [rows[name]["step_tflop"] for name in order]
    assert flops == sorted(flops, reverse=True) and len(set(flops)) == 3
    assert (tmp_path / "rows.png").stat().st_size > 1000


def test_every_variant_runs_or_says_why_not() -> None:
    named = {"engine-compile", "engine-fp8", "backbone-eager", "backbone-compiled"}
    assert {*EXACT, *APPROXIMATE, *named, "onnxruntime", "tensorrt"} == set(MAKERS)
    assert latency.default_variants("cuda") == (list(MAKERS), {})
    unasked, reasons = latency.default_variants("cpu")
    assert set(unasked) | set(reasons) == set(MAKERS)
    assert all("ask for it with --variants" in reason for reason in reasons.values())


@pytest.fixture
def known_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measuring it takes longer than what is tested."""
    monkeypatch.setattr(measure, "matrix_peak", lambda *_: 1e11)
    monkeypatch.setattr(measure, "memory_bandwidth", lambda *_: 1e10)


@pytest.mark.usefixtures("known_machine")
def test_no_speed_without_parity(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = load("debug", "cpu", "fp32")

    def wrong(model: object, like: torch.Tensor) -> variants.Variant:
        honest = variants.reference_cached(pipe.transformer, like)
        return replace(honest, name="wrong", step=lambda x, t, c: honest.step(x, t, c) * 1.01)

    monkeypatch.setitem(MAKERS, "wrong", wrong)
    rows, missing = latency.run(pipe, "debug", 64, 1, 1, 0, ["reference", "wrong"])
    assert [row["parity"] for row in rows] == [True, False] and not missing
    assert "picture_p50_s" in rows[0] and "picture_p50_s" not in rows[1]
    assert "no speed" in latency.table(rows)


@pytest.mark.usefixtures("known_machine")
def test_what_fails_or_is_stopped_costs_nothing_else(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipe = load("debug", "cpu", "fp32")

    def broken(fault: Exception, first: int) -> Callable[..., variants.Variant]:
        def make(model: object, like: torch.Tensor) -> variants.Variant:
            honest, calls = variants.reference_cached(pipe.transformer, like), iter(range(99))

            def step(*arguments: Any) -> torch.Tensor:
                if next(calls) >= first:
                    raise fault
                return honest.step(*arguments)

            return replace(honest, name=str(fault), step=step)

        return make

    # At once, when its first picture is drawn, and while pictures are timed.
    monkeypatch.setitem(MAKERS, "memory", broken(torch.OutOfMemoryError("memory"), 0))
    monkeypatch.setitem(MAKERS, "late", broken(RuntimeError("late"), 8))
    file, written = RowFile(tmp_path / "rows.jsonl"), []

    def save(rows: Sequence[Row]) -> None:
        file.write(rows)
        written.append([row.get("runs") for row in rows])

    names = ["memory", "late", "reference", "reference-cached"]
    options = {"names": names, "seconds": 0.0, "save": save}
    rows, _ = latency.run(pipe, "debug", 64, 2, 9, 0, **options)
    assert [row["parity"] for row in rows] == [None, False, True, True]
    assert rows[0]["reason"] == "OutOfMemoryError: memory"
    assert rows[1]["reason"] == "RuntimeError: late"
    assert not any("picture_p50_s" in row for row in rows[:2])
    assert "no speed: RuntimeError: late" in latency.table(rows)
    # Whenever it is stopped, what was measured is there; time is up after three runs.
    assert [None, None] in written and [runs[-1] for runs in written[-4:]] == [1, 2, 3, 3]
    kept = list(map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines()))
    assert kept == rows and kept[2]["psnr_db"] > 60


@torch.no_grad()
def test_the_bare_backbone_is_diffusers_own() -> None:
    pipe = load("debug", "cpu", "fp32")
    given = make_inputs(pipe, 64, 1)
    variant = variants_of(pipe.transformer, given.z, ["backbone-eager"])[0][0]
    found = variant.step(given.seen, given.t, variant.encode(given.z))
    wanted = pipe.transformer.predict(given.seen, given.t, None)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)
    called: list[type] = []
    handle = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: called.append(type(module))
    )
    variant.step(given.seen, given.t, variant.encode(given.z))
    handle.remove()
    assert called[0] is SD3Transformer2DModel


@pytest.mark.slow
@torch.no_grad()
def test_other_runtimes_compute_the_same() -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    rows, missing = latency.run(
        load("debug", "cpu", "fp32"), "debug", 64, 1, 1, 0, ["reference", "onnxruntime"]
    )
    assert not missing and rows[1]["parity"] and rows[1]["rel_err"] > 0


def test_sizes_are_whole_tokens() -> None:
    with pytest.raises(ValueError, match="sizes: expected multiples of 8 pixels, got 60"):
        make_inputs(load("debug", "cpu", "fp32"), 60, 1)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--sizes", "64", "60"], r"--sizes: expected multiples of 8 pixels, got \[60\]"),
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--runs", "0"], "--runs: expected at least 1, got 0"),
        (["--batch", "-1"], "--batch: expected at least 1, got -1"),
        (["--model", "no-such-model"], "--model no-such-model --device cpu: "),
        (["--device", "cuda:99"], "--device cuda:99: "),
    ],
    ids=lambda given: given[0] if isinstance(given, list) else "",
)
def test_bad_requests_measure_nothing(
    given: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--model", "debug", "--device", "cpu", "--precision", "fp32"]
    with pytest.raises(SystemExit):
        latency.main([*command, "--out", str(tmp_path / "rows.jsonl"), *given])
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "rows.jsonl").exists()


def test_runs_are_interleaved() -> None:
    order: list[str] = []
    calls = {name: partial(order.append, name) for name in "ab"}
    times = measure.interleaved(calls, torch.device("cpu"), warmup=1, runs=2)
    assert order == ["a", "b"] * 3
    assert [len(t) for t in times.values()] == [2, 2]


def test_what_a_gpu_says_of_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {"clocks.sm": "1980, 2619, 41, 310.52", "clocks_event": None, "driver": "580.159.04"}

    def command(*words: str) -> str | None:
        assert words[:2] == ("nvidia-smi", "--id=GPU-0f3a")
        return next(text for key, text in said.items() if key in words[2])

    monkeypatch.setattr(machine, "_command", command)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid="0f3a"))
    device = torch.device("cuda")
    wanted = {"sm_mhz": 1980, "memory_mhz": 2619, "temperature_c": 41, "power_w": 310.52}
    assert machine.gpu_state(device) == wanted
    assert machine._ask(device, {"driver": "driver_version"}) == {"driver": "580.159.04"}
    assert machine.gpu_state(torch.device("cpu")) == {}


def test_peaks_are_by_the_clock_of_the_times() -> None:
    """Beside other work the wall's would be too low, and shares of it over 100 %."""
    ticks = count()
    peak = measure.matrix_peak(torch.device("cpu"), torch.float32, lambda: next(ticks))
    assert peak == 2 * 1024**3
