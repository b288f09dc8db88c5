import math

import numpy as np
import pytest
import torch

from mimdit.metrics import psnr, scorer, ssim


def pair(sigma: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(0)
    clean = torch.from_numpy(rng.random((3, 40, 48))) * 0.5 + 0.25
    return (clean + sigma * torch.from_numpy(rng.standard_normal((3, 40, 48)))).clamp(0, 1), clean


def test_psnr_is_its_definition() -> None:
    a, b = pair()
    assert psnr(a, b) == pytest.approx(-10 * math.log10(((a - b) ** 2).mean().item()))
    assert psnr(a, a) == math.inf
    with pytest.raises(ValueError, match="equal shapes"):
        psnr(a, b[:, 1:])


def test_ssim_is_one_for_equal_pictures_and_falls_with_noise() -> None:
    scores = [ssim(*pair(sigma)) for sigma in (0.0, 0.02, 0.1)]
    assert scores[0] == pytest.approx(1)
    assert scores[0] > scores[1] > scores[2] > 0
    with pytest.raises(ValueError, match="at least 11×11"):
        ssim(torch.zeros(3, 8, 20), torch.zeros(3, 8, 20))


def test_scorer_says_what_it_cannot_measure() -> None:
    score = scorer(["no_such_metric"])
    assert set(score(*pair())) == {"psnr", "ssim"}
    assert list(score.missing) == ["no_such_metric"]
