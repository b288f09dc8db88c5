import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from bench import ablation
from bench.inputs import make_inputs
from bench.launches import launches_of
from mimdit.loading import assemble
from mimdit.presets import build


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    command = ["--model", "debug", "--size", "64", "--steps", "2", "--runs", "1", "--warmup", "0"]
    assert (
        ablation.main([*command, "--device", "cpu", "--precision", "fp32", "--out", str(out)]) == 0
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["variant"] for row in rows}) == len(rows) == 10
    assert all(row["parity"] and row["picture_p50_s"] > 0 for row in rows)
    assert "CUDA graph: left out, it needs a GPU" in capsys.readouterr().out


@torch.no_grad()
def test_each_switch_brings_its_work_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a variant does more than the engine: products, attentions and concatenations."""
    model = build("debug", pooled_condition=False).randomize_(0).requires_grad_(False).eval()
    given = make_inputs(assemble(model), 64, 1)
    calls: list[str] = []
    for place, name in ((F, "linear"), (F, "scaled_dot_product_attention"), (torch, "cat")):
        plain = getattr(place, name)

        def counted(*args: object, name: str = name, plain: object = plain, **kw: object) -> object:
            calls.append(name)
            return plain(*args, **kw)  # pyright: ignore

        monkeypatch.setattr(place, name, counted)
    done: dict[str, list[int]] = {}
    for variant in ablation.ablations(model, given.z)[0]:
        calls.clear()
        condition = variant.encode(given.z)
        encoded = len(calls)
        with variant.sampling(given.t):
            calls.clear()
            variant.step(given.seen, given.t, condition)
        names = ("linear", "scaled_dot_product_attention", "cat")
        done[variant.name] = [calls.count(name) for name in names] + [encoded]
    engine, blocks = done["engine"], 2
    more = {name: [a - b for a, b in zip(n, engine, strict=True)] for name, n in done.items()}
    # When encoding, two products in each block instead of a stacked one, which is no `linear`.
    assert more["keys and values block by block"] == [0, 0, 0, 2 * blocks]
    # Two products of keys and values, or of queries and outputs, in each block.
    assert more["keys and values in every step"] == [2 * blocks, 0, 0, 2 * blocks]
    assert more["queries of conditioning tokens"] == [2 * blocks, blocks, 0, 2 * blocks]
    assert more["concatenation, no joint buffers"][2] >= 2 * blocks
    # Of time and pooled text two layers each, and all modulations.
    assert more["no table of modulations"][0] == 5
    assert more["mixtures layer by layer"][3] > 0
    # Image, text and the second attention of one block: one product instead of three.
    assert more["q, k and v one by one"][0] == 2 * (2 * blocks + 1)


def test_launches_of_a_step() -> None:
    with torch.device("meta"):
        model = build("debug", torch.bfloat16, pooled_condition=False).eval()
    names = ["reference", "reference-cached", "engine-no-graph", "backbone-eager"]
    found = launches_of(model, (16, 16), 1, names)
    step = found["engine-no-graph"]["step"]
    # q, k, v and the output of both streams (the last block has none of text) and of the dual one.
    products = (4 + 3) + 2
    # Two layers of every MLP; the output; patches are a convolution; the text.
    products += 3 * 2 + 1 + 1
    assert step["addmm"] == products and step["convolution"] == 1
    assert step["attention"] == 3 and step["gelu"] == 3
    # joint_qkv thrice; LayerNorms: two to begin with, two behind each of three sub-blocks.
    own = sum(n for name, n in step.items() if name.endswith(("kernel", "write")))
    assert own >= 3 + 2 + 2 * 3
    totals = {name: parts["step"].total() for name, parts in found.items()}
    assert totals["engine-no-graph"] * 3 < totals["backbone-eager"] < totals["reference"]
