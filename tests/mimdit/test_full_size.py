"""The paper's model at its full size, with random weights."""

import resource
import time

import pytest
import torch

from mimdit.presets import build


@pytest.mark.slow
def test_one_step_of_sd35_medium_at_512(capsys: pytest.CaptureFixture[str]) -> None:
    """bfloat16 on the CPU, 512×512 pixels: 64×64 latents, 1,024 tokens."""
    began = time.perf_counter()
    model = build("sd35-medium", torch.bfloat16).eval()
    built = time.perf_counter()
    x, z = torch.randn(2, 1, 16, 64, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        condition = model.encode_condition(z)
        encoded = time.perf_counter()
        v = model(x, torch.tensor([1000.0]), condition).sample
    done = time.perf_counter()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    with capsys.disabled():
        print(
            f"\nsd35-medium, 512×512, bf16, {torch.get_num_threads()} threads: "
            f"build {built - began:.1f} s, condition {encoded - built:.1f} s, "
            f"step {done - encoded:.1f} s, peak {peak:.1f} GB"
        )
    assert v.shape == x.shape
    assert v.isfinite().all()
    assert peak < 24
