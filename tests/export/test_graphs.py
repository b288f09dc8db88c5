"""The graphs' modules against the model: every ablation, number type and codec, without tracing."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from export import folder, locate
from export.checks import GATES
from export.folder import Settings, export_folder
from export.graphs import Graph, graphs_of, traceable
from export.libraries import ExportError
from export.limits import Limits, graph_limits, tracing
from export.locate import Locator
from export.onnx_export import Written, translate
from export.optimizer import optimize
from export.parity import check_graphs
from mimdit import mim
from mimdit.loading import PRECISIONS
from mimdit.metrics import psnr
from mimdit.spectrum import reshape_spectrum
from tests.export.conftest import pipeline, sd35
from tests.export.eager import EagerGraph, eager_graphs, eager_runtime

PLAIN = {"out_channels": 48}
ABLATIONS: list[dict[str, Any]] = [
    {"groups": ("se", "se"), "experts": 1, "top_k": 1},
    {"groups": ("swin",), "top_k": 4, "patch_size": 1, "sample_size": 16, **PLAIN}
    | {"prediction_type": "residual"},
    {"groups": ("channel", "spatial", "spatial"), "inter": "sparse", "renormalize": True},
    {"inter": "sparse", "intra": "dense", "out_channels": 51},
    {"pooled_condition": False, "prediction_type": "velocity", **PLAIN},
    {"pooled_condition": False, "renormalize": True, "prediction_type": "sample", **PLAIN},
]


@pytest.mark.parametrize("settings", ABLATIONS, ids=lambda s: " ".join(map(str, s.values())))
def test_ablations(settings: dict[str, Any]) -> None:
    pipe = pipeline(**settings)
    checks = check_graphs(pipe, eager_graphs(pipe), "fp32", [(2, 9, 12)])
    assert {c.graph for c in checks} == {"pool", "conditioner", "denoiser"}
    assert [c for c in checks if not c.passed] == []


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_has_gates_of_its_own(precision: str) -> None:
    """The stated ones, and as near to float32 as the model itself in the same type."""
    wide = pipeline()
    pipe = copy.deepcopy(wide).to(PRECISIONS[precision])
    wide.transformer.load_state_dict(pipe.transformer.state_dict())
    graphs = eager_graphs(pipe)
    checks = check_graphs(pipe, graphs, precision, [(2, 9, 12)], wide)
    assert [c for c in checks if not c.passed] == []
    assert {"tokens to fp32", "output to fp32"} <= {c.output for c in checks}
    gates = {c.gate for c in checks if c.output == "output"}
    assert gates == {GATES[precision]} == {{"fp16": 5e-3, "bf16": 2e-2}[precision]}

    class Off(EagerGraph):
        def __call__(self, **inputs: Any) -> dict[str, np.ndarray]:
            return {
                k: x * (1 + 1.5 * GATES[precision]) for k, x in super().__call__(**inputs).items()
            }

    graphs["denoiser"] = Off(pipe, graphs["denoiser"].graph)
    failed = [c for c in check_graphs(pipe, graphs, precision, [(1, 9, 12)]) if not c.passed]
    assert {(c.graph, c.output) for c in failed} == {("denoiser", "output")}


def test_blocks_go_through_one_by_one_where_scores_would_fill_memory() -> None:
    pipe = pipeline()
    graph = next(graph for graph in graphs_of(pipe) if graph.name == "conditioner")
    inputs, found = graph.example(2, 9, 12), []
    for tokens, batch, together in ((4 * 32**2, 4, 2), (4 * 64**2, 4, 2), (2 * 128**2, 2, 1)):
        with traceable(pipe, tokens, batch):
            assert pipe.transformer.mim.together(0) == together
            found.append(graph(**inputs)[0])
    assert torch.allclose(found[0], found[2], atol=1e-5)


def test_faults_are_looked_for_in_the_graph_that_was_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks taken together and sizes as at the export, or the values' names would not agree."""
    pipe, limits = sd35(side=64), Limits((1, 3), (8, 24))
    traced: list[tuple[str, Limits, int]] = []

    def export_onnx(graph: Graph, work: Path, takes: Limits, opset: int) -> Written:
        traced.append((graph.name, takes, pipe.transformer.mim.together(0)))
        (work / f"{graph.name}.onnx").write_bytes(b"")
        return Written(graph.name, f"{graph.name}.onnx", 1, 0.0)

    def translate(graph: Graph, takes: Limits, opset: int) -> Any:
        traced.append((graph.name, takes, pipe.transformer.mim.together(0)))
        raise ValueError("that is enough")

    # Two blocks at the trained size, one at the largest.
    one = 3 * 8**2 * 2 * 3 * 64
    monkeypatch.setattr(mim, "_TOGETHER", 2 * one)
    monkeypatch.setattr(folder, "export_onnx", export_onnx)
    monkeypatch.setattr(locate, "translate", translate)
    export_folder(pipe, tmp_path / "out", Settings(limits, [], check=False))
    exported, locator = traced[:], Locator(pipe, tmp_path, limits, 18, 1e-5)
    traced.clear()
    assert [locator(name, {}, False) for name, *_ in exported] == [
        "no place found (that is enough)"
    ] * 5
    assert traced == exported
    assert {together for *_, together in traced} == {2}
    # The codec takes tiles of 4×4 patches.
    assert traced[3:] == [
        (name, Limits((1, 3), (4, 4)), 2) for name in ("vae_encoder", "vae_decoder")
    ]


@pytest.mark.parametrize("side", [192, 1024])
def test_codecs_take_pictures_of_any_size_in_tiles(
    side: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the pipeline takes them, beyond what the codec was trained for, too."""
    pipe, limits = sd35(side=side), Limits((1, 2), (8, 24))
    runtime = eager_runtime(pipe, tmp_path / "out", limits, monkeypatch)
    sizes = []
    for name in ("vae_encoder", "vae_decoder"):
        graph = runtime.graphs[name]
        assert isinstance(graph, EagerGraph)
        assert graph_limits(pipe, graph.graph, limits).side == (8, side // 16)
        graph.graph.register_forward_pre_hook(
            lambda _, a, k: sizes.extend(k.values()), with_kwargs=True
        )
    picture = np.random.default_rng(0).random((1, 270, 330, 3), dtype=np.float32)
    options: dict[str, Any] = {"guidance_scale": 2.0, "tile": 256, "output_type": "np"}
    ours, theirs = (
        call(picture, 1, generator=torch.Generator().manual_seed(0), **options)
        for call in (runtime, pipe)
    )
    assert psnr(torch.from_numpy(ours.images), torch.from_numpy(theirs.images)) > 60
    assert max(max(x.shape[-2:]) for x in sizes) == min(side, 336)
    checks = check_graphs(pipe, runtime.graphs, "fp32", [(1, 13, 16)], kinds=["random"])
    assert [c for c in checks if not c.passed] == []
    assert {c.size for c in checks if "vae" in c.graph} == {"1×12×12" if side == 192 else "1×13×16"}


class _Shaped(torch.nn.Module):
    def forward(self, pixels: torch.Tensor, controls: torch.Tensor) -> torch.Tensor:
        return reshape_spectrum(pixels, controls, torch.ones(1, 1, 1, 1))


def test_blocks_of_one_colour_stay_numbers(tmp_path: Path) -> None:
    """Whose coefficients are zero, and so are their thresholds; an optimiser drops small sums."""
    ort = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    given = {"pixels": torch.ones(1, 3, 16, 16), "controls": torch.zeros(1, 96, 4, 4)}
    program: Any = torch.onnx.export(
        _Shaped().eval(), tuple(given.values()), input_names=[*given], dynamo=True, optimize=False,
        verbose=False,
    )  # fmt: skip
    optimize(program.model, ["out"])
    program.save(tmp_path / "shaped.onnx")
    session = ort.InferenceSession(tmp_path / "shaped.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: x.numpy() for name, x in given.items()})
    np.testing.assert_allclose(found, given["pixels"].numpy(), atol=1e-6)


def test_sizes_that_torch_cannot_trace() -> None:
    pipe = pipeline(**ABLATIONS[1])
    limits = Limits((1, 1), (8, 24))
    graph = graphs_of(pipe)[1]
    with (
        tracing(pipe, limits),
        pytest.raises(ExportError, match=r"conditioner: torch.export .*; give one size \(--sizes"),
    ):
        translate(graph, graph_limits(pipe, graph, limits), 20)
