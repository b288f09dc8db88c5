"""TensorRT-RTX engines of the shipped model, built for real: all kinds of GPUs, any size."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from export import folder
from export.cli import main
from export.graphs import graphs_of
from export.manifest import verify

GPUS = ("80", "86", "89", "120")
GRAPHS = ("pool", "conditioner", "denoiser")
# As the library calls them.
KINDS = {"fp16": "Half", "bf16": "BFloat16|BF16"}


@pytest.mark.parametrize(
    ("precision", "capabilities", "names"),
    [
        ("fp16", GPUS, GRAPHS[1:]),
        # Tracing takes longest: the other type is left to the graph that runs in every step.
        ("bf16", ("89",), GRAPHS[2:]),
        pytest.param("bf16", GPUS, GRAPHS, marks=pytest.mark.slow),
    ],
    ids=["fp16", "bf16-denoiser", "bf16"],
)
def test_engines_of_tiny(
    precision: str,
    capabilities: tuple[str, ...],
    names: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    monkeypatch.setattr(
        folder, "graphs_of", lambda pipe: [g for g in graphs_of(pipe) if g.name in names]
    )
    target = tmp_path / "engines"
    options = ["--no-check", "--precision", precision, "--trt-rtx", "--sm", ",".join(capabilities)]
    # Builders take twice as long for sides to 512.
    sizes = ["--sizes", "64x64,256x256"]
    assert main(["tiny", "--out", str(target), *options, *sizes]) == 0
    engines = verify(target)["engines"]["tensorrt_rtx"]
    assert set(engines) == set(names)
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    malformed = int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    reports: list[str] = []
    for name, entry in engines.items():
        assert entry["key"]["capabilities"] == [*capabilities]
        low, usual, high = entry["key"]["profile"]["z_lq"]
        # Batches and both sides vary, in the engine, too.
        assert all(low[i] < high[i] and low[i] <= usual[i] <= high[i] for i in (0, 2, 3))
        layers = json.loads((target / entry["report"]).read_text())["Layers"]
        (damaged,) = (line for line in layers if line.strip().startswith("Name: z_lq,"))
        assert "Dimensions: [-1,48,-1,-1]" in damaged
        reports += layers
        data = (target / entry["file"]).read_bytes()
        # One engine holds the weights of its graph, whatever it is for.
        assert len(data) > (target / f"{name}.onnx").stat().st_size / 2
        assert not runtime.get_engine_validity(data)[1] & malformed
    assert any(re.search(KINDS[precision], line) for line in reports)
