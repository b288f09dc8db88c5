"""Flags that cannot be had end a command before it measures, in a line of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bench import ablation, latency, launches, predict, quality, tiles, trace

MEASURED = {"tiles": tiles.main, "trace": trace.main, "ablation": ablation.main}
MEASURED |= {"latency": latency.main}
CPU = ["--model", "debug", "--device", "cpu", "--precision", "fp32"]


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("tiles", ["--runs", "0"], "--runs: expected at least 1, got 0"),
        ("tiles", ["--steps", "0"], "--steps: expected at least 1, got 0"),
        ("tiles", ["--warmup", "-1"], "--warmup: expected at least 0, got -1"),
        ("tiles", ["--megapixels", "1", "nan"], "--megapixels: expected numbers above 0, got nan"),
        ("tiles", ["--megapixels", "inf"], "--megapixels: expected numbers above 0, got inf"),
        ("trace", ["--runs", "0"], "--runs: expected at least 1, got 0"),
        ("trace", ["--warmup", "-2"], "--warmup: expected at least 0, got -2"),
        ("trace", ["--sizes", "64", "63"], "--sizes: expected multiples of 8 pixels, got [63]"),
        ("ablation", ["--runs", "0"], "--runs: expected at least 1, got 0"),
        ("ablation", ["--steps", "0"], "--steps: expected at least 1, got 0"),
        ("ablation", ["--size", "63"], "--size: expected multiples of 8 pixels, got [63]"),
        ("latency", ["--sizes", "0"], "--sizes: expected multiples of 8 pixels, got [0]"),
        *(
            (name, ["--device", "nowhere"], "--model debug --device nowhere: ")
            for name in ("tiles", "trace", "ablation", "latency")
        ),
    ],
)
def test_refused_before_it_measures(
    name: str, flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit) as ended:
        MEASURED[name]([*CPU, "--out", str(out), *flags])
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("main", "flags", "words"),
    [
        (predict.main, ["--steps", "0"], "--steps: expected at least 1, got 0"),
        (predict.main, ["--sizes", "500"], "--sizes: expected multiples of 16 pixels, got [500]"),
        (launches.main, ["--batch", "0"], "--batch: expected at least 1, got 0"),
        (launches.main, ["--size", "63"], "--size: expected multiples of 2 latents, got [63]"),
        (quality.main, ["--picture", "sheet.xyz"], "--picture: expected a kind of picture"),
        (quality.main, ["--picture", "sheet"], "--picture: expected a kind of picture"),
    ],
)
def test_refused_before_a_model_is_there(
    main: Callable[[list[str]], int],
    flags: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert words in capsys.readouterr().err
