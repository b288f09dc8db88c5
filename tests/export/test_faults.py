"""Faults put into graphs before their hashes are taken: the comparison finds and names them."""

import json
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnxruntime")

from export import cli, folder
from export.graphs import graphs_of
from export.inputs import random_latents
from export.libraries import ExportError
from export.locate import first_difference
from export.manifest import MANIFEST, verify, write_manifest
from export.parity import check_graphs
from export.runtime import ExportedPipeline
from export.weights import drawn_session, drawn_weights
from mimdit.loading import assemble, load_pipeline
from mimdit.presets import build
from tests.export import damage
from tests.export.conftest import Exported, reuse

# Graphs of one size are compared quickly.
SMALL = ["--sizes", "64x64", "--batch", "1..3"]
DEEP = "model.transformer_blocks.1.attn.to_q.weight"
DOWN = "model.mim.down_weight"


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of one step."""
    monkeypatch.setattr("export.plan.STEPS", 1)


def failures(folder: Path) -> list[dict[str, Any]]:
    report = json.loads((folder / "parity.json").read_text())
    assert not report["passed"]
    return [check for check in report["checks"] if not check["passed"]]


@pytest.mark.parametrize(
    ("change", "graph", "notes", "place"),
    [
        (
            damage.weight("denoiser", DEEP),
            "denoiser",
            {"weights": f"first that differs: {DEEP}$"},
            r"first difference: block 1, \w+ \w+ in \S+\.attn\.to_q, error",
        ),
        (
            damage.weight("conditioner", DOWN),
            "conditioner",
            {
                "weights": f"first that differs: {DOWN}$",
                "tokens": "first block over the gate: 1$",
            },
            r"first difference: \w+ \w+ in model\.mim, error",
        ),
        (
            damage.swapped_gate,
            "conditioner",
            {"tokens": "first block over the gate: 0$"},
            r"first difference: Mul \w+ in model\.mim, error",
        ),
        (
            damage.later_experts,
            "conditioner",
            {"routing": "picks differ, first in block 0$", "tokens": "first block over the gate"},
            r"first difference: (Slice|Cast) \w+",
        ),
    ],
    ids=["weight", "expert-weight", "swapped-gate", "off-by-one-top-k"],
)
def test_faults_are_found_and_named(
    exported: Exported,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
    change: damage.Change,
    graph: str,
    notes: dict[str, str],
    place: str,
) -> None:
    monkeypatch.setattr(folder, "export_onnx", reuse(exported, change))
    target = tmp_path / "out"
    assert cli.main([str(exported.model), "--out", str(target), *SMALL]) == 1
    found = failures(tmp_path / "out.failed")
    assert {check["graph"] for check in found} - {"picture"} == {graph}
    for output, note in notes.items():
        texts = [check["note"] for check in found if check["output"] == output]
        assert any(re.search(note, text) for text in texts), texts
    places = [check["place"] for check in found if check["place"]]
    assert re.match(place, places[0]), places
    # What a person reads says it, too.
    out = capsys.readouterr().out
    assert "FAILED" in out and places[0] in out


def test_a_sound_graph_differs_nowhere(exported: Exported) -> None:
    for graph in graphs_of(exported.pipe):
        inputs = {name: x.detach() for name, x in graph.example(2, 9, 12).items()}
        path = exported.folder / f"{graph.name}.onnx"
        assert first_difference(path, exported.programs[graph.name], inputs, 1e-5) is None


def test_a_fresh_model_hides_nothing(
    tmp_path: Path, exported: Exported, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its ZeroLinear is zero, so no output of its own weights shows what the experts do."""
    torch.manual_seed(3)
    config = exported.pipe.transformer.config
    own = {name: config[name] for name in ("pos_embed_max_size", "prompts")}
    fresh = assemble(build("debug", **own).eval(), default_steps=2)
    fresh.save_pretrained(tmp_path / "model")
    weights = damage.other_weights(fresh.transformer)
    faults = damage.both(weights, damage.swapped_gate, damage.weight("conditioner", DOWN))
    for change, code in ((weights, 0), (faults, 1)):
        monkeypatch.setattr(folder, "export_onnx", reuse(exported, change))
        options = ["--out", str(tmp_path / "out"), *SMALL]
        assert cli.main([str(tmp_path / "model"), *options]) == code, capsys.readouterr()
    found = failures(tmp_path / "out.failed")
    assert {(c["output"], c["weights"]) for c in found} == {("weights", "own"), ("tokens", "drawn")}
    assert f"first that differs: {DOWN}" in capsys.readouterr().out


def test_check_alone(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(folder, "export_onnx", reuse(exported))
    target = tmp_path / "out"
    assert cli.main([str(exported.model), "--out", str(target), "--no-check", *SMALL]) == 0
    assert verify(target)["parity"] == "not checked"
    capsys.readouterr()
    assert cli.main(["--check", str(target)]) == 0
    assert f"checked {target}" in capsys.readouterr().out
    manifest = verify(target)
    assert manifest["parity"] == "passed"
    assert json.loads((target / "parity.json").read_text())["passed"]
    # A fault that is as old as its hash.
    damage.weight("denoiser", DEEP)(target / "denoiser.onnx")
    entries = {k: v for k, v in manifest.items() if k not in ("format", "files", "sha256")}
    write_manifest(target, entries)
    with monkeypatch.context() as patch:
        # Tracing anew takes long.
        patch.setattr(
            "export.locate.translate",
            lambda graph, *_: SimpleNamespace(exported_program=exported.programs[graph.name]),
        )
        assert cli.main(["--check", str(target)]) == 1
    captured = capsys.readouterr()
    assert f"first that differs: {DEEP}" in captured.out
    assert "first difference: block 1, " in captured.out
    assert f"a gate failed; the files are in {target}" in captured.err
    with pytest.raises(ExportError, match="parity: expected passed, got failed"):
        ExportedPipeline(target, "cpu")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def unchecked(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Path]:
    """A copy of the model, and an export of it that was not compared."""
    model, target = tmp_path / "model", tmp_path / "out"
    shutil.copytree(exported.model, model)
    monkeypatch.setattr(folder, "export_onnx", reuse(exported))
    assert cli.main([str(model), "--out", str(target), "--no-check", *SMALL]) == 0
    return model, target


def test_check_alone_needs_the_model(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model, target = unchecked(exported, tmp_path, monkeypatch)
    assemble(build("debug").randomize_(1)).save_pretrained(model)
    shutil.rmtree(model / "transformer")
    assert cli.main(["--check", str(target)]) == 1
    assert "model.name: expected the exported model at" in capsys.readouterr().err
    assert cli.main(["--check", str(tmp_path)]) == 1
    assert "not an exported folder, it has no manifest.json" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        cli.main(["--check"])
    assert error.value.code == 2
    (target / MANIFEST).unlink()
    assert cli.main(["--check", str(target)]) == 1


def test_a_model_that_changed_is_refused(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    model, target = unchecked(exported, tmp_path, monkeypatch)
    pipe = load_pipeline(str(model))
    pipe.transformer.randomize_(7)
    pipe.save_pretrained(model)
    assert cli.main(["--check", str(target)]) == 1
    assert "model.weights: expected" in capsys.readouterr().err


def test_flips_inside_the_margin_are_reported(exported: Exported) -> None:
    """Near ties round either way; outputs are compared with the reference's choice."""
    pipe, size = load_pipeline(str(exported.model)), (2, 8, 9)
    mim = pipe.transformer.mim
    with drawn_weights(pipe.transformer, 0), torch.no_grad():
        # The latents that the check will draw.
        z_lq = random_latents(pipe, size, torch.Generator().manual_seed(0))
        dim = mim.running_mean.shape[1]
        mean = pipe.transformer.pool_condition(z_lq)[1, 0, :dim] - mim.running_mean[1]
        along = mean / mean.norm()
        across = torch.randn(dim, generator=torch.Generator().manual_seed(1))
        across -= along * (across @ along)
        across /= across.norm()
        # One certain choice, two that nearly tie for the second place, one that is never taken.
        tie = 1e-6 / mean.norm() * along
        mim.intra_router[1, 2] = torch.stack([along, across + tie, -across, -along])
        graphs: dict[str, Any] = {
            g.name: drawn_session(exported.folder / f"{g.name}.onnx", g, "cpu")
            for g in graphs_of(pipe)
        }
        pool = graphs["pool"]

        def rounded(**inputs: Any) -> dict[str, np.ndarray]:
            means = pool(**inputs)["means"].copy()
            means[1, 0, :dim] -= 2e-6 * across.numpy()
            return {"means": means}

        graphs["pool"] = rounded
        checks = check_graphs(pipe, graphs, "fp32", [size], kinds=["random"])
    routing, forced = (c for c in checks if c.output.startswith("routing"))
    assert 0 < routing.error <= 1e-5 and routing.passed
    assert routing.note == "1 of 16 picks differ, first in block 1"
    assert forced.error == 0 and "16 equal picks" in forced.note
    assert [c for c in checks if not c.passed] == []
