"""Shared fixtures; Triton's interpreter where there is no GPU."""

import os
import signal
from collections.abc import Iterator

import pytest
import torch

# Triton reads it when it is first imported, which the libraries below do.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from mimdit.presets import build
from mimdit.transformer import MiMDiTTransformer2DModel


@pytest.fixture(scope="session")
def debug_model() -> MiMDiTTransformer2DModel:
    """Evaluation mode, every parameter drawn so that no zeros hide a fault; tests must not change
    it.
    """
    torch.manual_seed(0)
    return build("debug").randomize_(0).eval()


@pytest.fixture(scope="session", autouse=True)
def _as_in_a_terminal() -> None:
    """Ctrl-C reaches tests and what they start, also where all of it runs in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums in the order of a process with OMP_NUM_THREADS=1."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
