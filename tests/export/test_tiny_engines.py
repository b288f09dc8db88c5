"""TensorRT-RTX engines of the shipped model, built for real: all kinds of GPUs, any size."""

import json
import re

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from export.manifest import verify
from tests.export.tiny_engines import CASES, Exports

# As the library calls them.
KINDS = {"fp16": "Half", "bf16": "BFloat16|BF16"}


@pytest.mark.parametrize(
    "name", ["fp16", "bf16-denoiser", pytest.param("bf16", marks=pytest.mark.slow)]
)
def test_engines_of_tiny(name: str, tiny_exports: Exports) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    case, target = CASES[name], tiny_exports.folder(name)
    engines = verify(target)["engines"]["tensorrt_rtx"]
    assert set(engines) == set(case.graphs)
    runtime = trt.Runtime(trt.Logger(trt.Logger.INTERNAL_ERROR))
    malformed = int(trt.EngineInvalidityDiagnostics.MALFORMED_ENGINE)
    reports: list[str] = []
    for graph, entry in engines.items():
        assert entry["key"]["capabilities"] == [*case.capabilities]
        low, usual, high = entry["key"]["profile"]["z_lq"]
        # Batches and both sides vary, in the engine, too.
        assert all(low[i] < high[i] and low[i] <= usual[i] <= high[i] for i in (0, 2, 3))
        layers = json.loads((target / entry["report"]).read_text())["Layers"]
        (damaged,) = (line for line in layers if line.strip().startswith("Name: z_lq,"))
        assert "Dimensions: [-1,48,-1,-1]" in damaged
        reports += layers
        data = (target / entry["file"]).read_bytes()
        # One engine holds the weights of its graph, whatever it is for.
        assert len(data) > (target / f"{graph}.onnx").stat().st_size / 2
        assert not runtime.get_engine_validity(data)[1] & malformed
    assert any(re.search(KINDS[case.precision], line) for line in reports)
