import json

import numpy as np
import pytest
import torch
from PIL import Image

from mimdit.cli.restore import main
from mimdit.mim import Routing
from mimdit.report import expert_names, heat_map, summary, weights

GROUPS = ("spatial", "channel", "swin", "se")


def routing(layers: int, pictures: int = 1, groups: int = 4, experts: int = 4, k: int = 2):
    """Of random routers, as the model gives it."""
    torch.manual_seed(layers)
    shares = torch.randn(layers, pictures, groups, experts).softmax(-1)
    intra, index = shares.topk(k)
    inter = torch.randn(layers, pictures, groups).softmax(-1)
    return Routing(inter, intra, index, torch.zeros(layers, pictures, 2)).as_dict()


def test_weights_against_loops() -> None:
    taken = routing(3, pictures=2, experts=5)
    inter, shares = weights(taken, 5)
    for layer in range(3):
        for group in range(4):
            own = [taken["inter"][layer][b][group] for b in range(2)]
            assert inter[layer, group] == pytest.approx(np.mean(own))
            for expert in range(5):
                parts = [
                    own[b] * taken["intra"][layer][b][group][slot] / 2
                    for b in range(2)
                    for slot in range(2)
                    if taken["index"][layer][b][group][slot] == expert
                ]
                got = shares[layer, group, expert]
                assert np.isnan(got) if not parts else got == pytest.approx(sum(parts))


def test_summary() -> None:
    taken = routing(6)
    found = summary(taken, GROUPS, 4)
    assert sum(found["inter_mean"].values()) == pytest.approx(1, abs=1e-3)
    # Two of four in each of six blocks.
    assert all(sum(picks) == 12 for picks in found["picks"].values())


def test_names_of_equal_groups_differ(debug_model) -> None:
    class Pipe:
        transformer = debug_model

    names, experts = expert_names(Pipe(), routing(2))
    assert len(set(names)) == len(debug_model.mim.groups) and experts == debug_model.mim.experts
    names, experts = expert_names(object(), routing(2, experts=3))
    assert names == ("group 1", "group 2", "group 3", "group 4") and experts == 3


@pytest.mark.parametrize(("layers", "groups", "experts"), [(1, 1, 1), (4, 4, 4), (38, 4, 8)])
def test_every_choice_is_a_coloured_cell(layers: int, groups: int, experts: int) -> None:
    taken = routing(layers, groups=groups, experts=experts, k=min(2, experts))
    sheet = np.asarray(heat_map(taken, GROUPS[:groups], experts, "a name\n" * 40))
    empty = np.asarray(heat_map(routing(layers, groups=groups, k=4), GROUPS[:groups], 4, ""))
    assert sheet.ndim == 3 and empty.ndim == 3
    # Colours of cells are blue: more so than texts, which are gray.
    blue = (sheet[..., 2].astype(int) - sheet[..., 0] > 40).any(0)
    assert blue[: sheet.shape[1] // 2].sum() > 0


def test_a_larger_weight_is_darker() -> None:
    taken = {
        "inter": [[[1.0, 0.0]], [[0.5, 0.5]]],
        "intra": [[[[1.0], [1.0]]]] * 2,
        "index": [[[[0], [0]]]] * 2,
    }
    sheet = np.asarray(heat_map(taken, ("a", "b"), 2, "t").convert("L")).astype(int)
    row = sheet[190 + 6]
    # The first row, away from its texts: block 0 with weight 1, block 1 with 0.5.
    cells = row[250 : 250 + 2 * 138]
    assert cells[20] < cells[138 + 20] < 255


def test_shipped_model_names_its_groups(tmp_path) -> None:
    Image.new("RGB", (40, 32), (90, 60, 30)).save(tmp_path / "a.png")
    flags = ["--steps", "1", "--report", "--experts", "spatial=0.5", "--device", "cpu"]
    assert main(["-i", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), *flags]) == 0
    report = json.loads((tmp_path / "out/a.json").read_text())
    assert set(report["inter_mean"]) == set(GROUPS)
    assert report["inter_mean"]["spatial"] == 0.5 and report["experts"] == {"spatial": 0.5}
    assert report["sub_experts"] == 4


def test_a_wrong_group_stops_the_run_with_the_names(tmp_path, capsys) -> None:
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 32)).save(tmp_path / name)
    flags = ["--experts", "spatiall=0.5", "--device", "cpu"]
    assert main(["-i", str(tmp_path), "-o", str(tmp_path / "out"), *flags]) == 1
    err = capsys.readouterr().err
    assert "mimdit-restore: --experts: expected groups of this model (spatial, channel" in err
    assert not list((tmp_path / "out").iterdir())


def test_a_picture_of_many_tiles_says_its_plan(tmp_path, capsys) -> None:
    Image.new("RGB", (600, 90), (90, 60, 30)).save(tmp_path / "a.png")
    flags = ["--steps", "1", "--device", "cpu", "-t", "256"]
    assert main(["-i", str(tmp_path / "a.png"), "-o", str(tmp_path / "out"), *flags]) == 0
    assert "plan: 600×90 pixels: " in capsys.readouterr().err
