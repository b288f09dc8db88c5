"""`explain` and the costs that it rests on."""

import json
import os
import subprocess
import sys

import pytest
import torch

from mimkernels import expert_combine, expert_depthwise3x3, expert_linear, image_gate
from mimkernels.costs import cost
from mimkernels.devices import DEVICES, find_device, resident_blocks
from mimkernels.explain import explain

SCRIPT = """
import json
from dataclasses import asdict

import torch
from mimkernels import expert_linear, image_gate
from mimkernels.explain import explain

x = torch.empty(1, 64, 96, dtype=torch.bfloat16)
weight = torch.empty(4, 160, 96, dtype=torch.bfloat16, device="meta")
index = torch.tensor([[3, 1]])
linear = explain(expert_linear, x, weight, index, device="H100")
gate = explain(
    image_gate, torch.empty(2, 70, 96), torch.empty(20, 96), groups=4, experts=4, k=2,
    device="RTX 4090",
)
print(json.dumps([asdict(e) | {"floor": e.floor, "text": str(e)} for e in (linear, gate)]))
"""


def test_of_calls_on_gpus_that_are_not_there() -> None:
    """Compilation and the interpreter exclude each other in one process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    linear, gate = json.loads(done.stdout)

    (kernel,) = linear["kernels"]
    assert kernel["name"] == "forward_kernel" and kernel["matrix"] == "wgmma"
    # 64 tokens are one tile, 160 columns two, for each of the two slots.
    assert kernel["tile"] == {"ROWS": 64, "COLUMNS": 128, "INNER": 64}
    assert kernel["grid"] == [2, 2]
    assert 0 < kernel["registers"] <= 255 and kernel["stack"] == 0 and kernel["shared"] > 0
    assert kernel["blocks"] >= 1
    assert kernel["waves"] == pytest.approx(4 / (132 * kernel["blocks"]))
    # Two products [64,96]·[96,160]; x, two of four experts, two indices and the output.
    products = 2 * 2 * 64 * 96 * 160 / 989.4e12
    memory = (64 * 96 * 2 + 2 * 160 * 96 * 2 + 2 * 8 + 2 * 64 * 160 * 2) / 3.35e12
    assert linear["floor"] == pytest.approx(max(products, memory)) and memory > products
    # The output, and nothing else.
    assert linear["allocated"] == 2 * 64 * 160 * 2 and "allocates 0.041 MB" in linear["text"]
    assert "forward_kernel  2×2   ROWS=64 COLUMNS=128 INNER=64" in linear["text"]

    assert [k["name"] for k in gate["kernels"]] == ["mean_kernel", "gate_kernel"]
    assert gate["dtype"] == "fp32" and gate["device"]["architecture"] == "sm_89"
    assert all(k["registers"] > 0 and k["matrix"] == "none" for k in gate["kernels"])


def test_needs_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="unset TRITON_INTERPRET"):
        explain(expert_linear)


def test_unknown_names() -> None:
    with pytest.raises(ValueError, match=r"device: expected one of A100, .*MI300X, got 'H1000'"):
        find_device("H1000")
    with pytest.raises(ValueError, match=r"op: expected one of image_gate, .*, got relu"):
        cost(torch.relu, torch.empty(1))


def test_costs_by_hand() -> None:
    meta = torch.empty(0, dtype=torch.bfloat16, device="meta")
    index = torch.zeros(2, 3, dtype=torch.int32)
    # Six picks, of a bank of four; all slots of x are one in memory.
    x, weight, bias = meta.new_empty(2, 1, 5, 8).expand(2, 3, 5, 8), (4, 7, 8), (4, 7)
    found = cost(expert_linear, x, meta.new_empty(weight), index, meta.new_empty(bias))
    sizes = {"x": 2 * 5 * 8, "weight": 4 * 7 * 8, "bias": 4 * 7, "out": 2 * 3 * 5 * 7}
    assert found.forward.bytes == 2 * sum(sizes.values()) + 4 * 6
    assert found.forward.flops == 2 * 6 * 5 * 8 * 7
    assert found.backward.flops == 2 * found.forward.flops
    read = 2 * (sizes["x"] + sizes["weight"] + sizes["out"]) + 4 * 6
    written = 2 * (2 * 3 * 5 * 8 + sizes["weight"] + sizes["bias"])
    assert found.backward.bytes == read + written

    one = index[:1, :2]
    x, weight, gate = meta.new_empty(1, 2, 5, 8), meta.new_empty(4, 7, 8), meta.new_empty(1, 2)
    single = cost(expert_combine, x, weight, one, gate)
    assert single.forward.bytes == 2 * (2 * 5 * 8 + 2 * 7 * 8 + 2 + 5 * 7) + 4 * 2
    twice = cost(expert_combine, [x] * 2, [weight] * 2, [one] * 2, [gate] * 2, backend="torch")
    assert twice.forward.flops == 2 * single.forward.flops == 2 * (2 * 2 * 5 * 8 * 7)
    assert twice.forward.bytes == 2 * single.forward.bytes - 2 * 5 * 7

    planes, kernels = meta.new_empty(1, 2, 3, 4, 8), meta.new_empty(4, 8, 3, 3)
    depthwise = cost(expert_depthwise3x3, planes, kernels, one).forward
    assert depthwise.flops == 18 * planes.numel()
    assert depthwise.bytes == 2 * (2 * planes.numel() + 2 * 8 * 9) + 4 * 2

    # Two layers of one picture: 4 + 4·4 routers, and per layer 4 + 4·2 weights and 4·2 indices.
    layers, routers = meta.new_empty(2, 1, 5, 8), meta.new_empty(2, 20, 8)
    routed = cost(image_gate, layers, routers, groups=4, experts=4, k=2).forward
    assert routed.flops == layers.numel() + 2 * 2 * 20 * 8
    assert routed.bytes == 2 * (layers.numel() + routers.numel()) + 2 * 4 * (12 + 8)


def test_blocks_on_a_multiprocessor() -> None:
    # 64 KB and 1 KB of CUDA's own: three in 228 KB. 168 registers: 12 warps in all quarters.
    assert resident_blocks("sm_90", 4, 32, 65_536) == (3, "shared memory")
    assert resident_blocks("sm_90", 4, 168, 0) == (3, "registers")
    assert resident_blocks("sm_90", 8, 32, 0) == (8, "threads")
    assert resident_blocks("sm_89", 1, 32, 0) == (24, "blocks")
    assert resident_blocks("sm_86", 4, 32, 200_000) == (0, "shared memory")
    assert resident_blocks("gfx942", 8, None, 16_384) == (4, "threads")
    assert all(d.bf16 == d.peak(torch.bfloat16) >= d.tf32 >= d.fp32 for d in DEVICES.values())
