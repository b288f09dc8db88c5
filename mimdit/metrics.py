"""Image quality figures; training, evaluation and tests use these.

Pictures are tensors [3,H,W] or [B,3,H,W] with values in [0,1].
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mimdit.errors import first_line

# Of pyiqa, those that need no downloaded weights; the last two need no original.
OFFLINE = ("ms_ssim", "vif", "gmsd", "fsim", "nlpd", "cw_ssim", "piqe", "entropy")
_LUMA = (0.299, 0.587, 0.114)


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over all RGB values, data range 1; any equal shapes."""
    if a.shape != b.shape:
        raise ValueError(f"psnr: expected equal shapes, got {tuple(a.shape)} and {tuple(b.shape)}")
    error = torch.mean((a.double() - b.double()) ** 2).item()
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of the luma (BT.601) of two pictures [3,H,W], by scikit-image.

    Gaussian window of σ = 1.5, as in Wang et al. (2004). Raises ValueError below 11×11 pixels.
    """
    try:
        from skimage.metrics import structural_similarity
    except ImportError as error:
        raise ImportError("ssim needs scikit-image: pip install 'mimdit[eval]'") from error
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[1:]) < 11:
        raise ValueError(
            "ssim: expected two pictures [3,H,W] of at least 11×11 pixels, "
            f"got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    weights = torch.tensor(_LUMA, dtype=torch.float64)
    luma = [torch.einsum("c,chw->hw", weights, x.double().cpu()).numpy() for x in (a, b)]
    score: Any = structural_similarity(
        *luma, data_range=1.0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    return float(score)


def scorer(names: Sequence[str] = OFFLINE, device: str = "cpu") -> Callable[..., dict[str, float]]:
    """A function (restored, clean) → all figures: PSNR, SSIM, and pyiqa's `names`.

    pyiqa is optional (`pip install mimdit[eval]`) and of a non-commercial licence. The attribute
    `missing` of the function says why a metric cannot be computed here.
    """
    metrics: dict[str, Any] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            import pyiqa  # pyright: ignore[reportMissingImports]

            metrics[name] = pyiqa.create_metric(name, device=torch.device(device))
        # Weights that cannot be downloaded, packages that are not there: many kinds of error.
        except Exception as error:
            missing[name] = first_line(error)

    def score(restored: Tensor, clean: Tensor) -> dict[str, float]:
        found = {"psnr": psnr(restored, clean), "ssim": ssim(restored, clean)}
        a, b = (x[None].float().to(device) for x in (restored, clean))
        for name, metric in metrics.items():
            with torch.no_grad():
                value = metric(a, b) if metric.metric_mode == "FR" else metric(a)
            found[name] = float(value)
        return found

    score.missing = missing  # pyright: ignore[reportFunctionMemberAccess]
    return score
