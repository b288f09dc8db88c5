"""Shared fixtures: the debug preset with every parameter drawn, so that no zeros hide a fault."""

import pytest
import torch

from mimdit.presets import build
from mimdit.transformer import MiMDiTTransformer2DModel


@pytest.fixture(scope="session")
def debug_model() -> MiMDiTTransformer2DModel:
    """Evaluation mode, randomised; tests must not change it."""
    torch.manual_seed(0)
    return build("debug").randomize_(0).eval()
