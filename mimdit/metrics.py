"""Image quality figures; training, evaluation and tests use these.

Pictures are tensors [3,H,W] or [B,3,H,W] with values in [0,1].
"""

import contextlib
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mimdit.errors import first_line

# Of pyiqa, those that need no downloaded weights; the last two need no original.
OFFLINE = ("ms_ssim", "vif", "gmsd", "fsim", "nlpd", "cw_ssim", "piqe", "entropy")
# Of pyiqa, what all-in-one restoration is compared by; most download weights at their first use.
STANDARD = ("psnr", "ssim", "lpips", "fid", "niqe", "liqe", "musiq", "clipiqa")
STANDARD += ("clipiqa+_vitL14_512",)
# Pixels along the side of its Gaussian.
SSIM_WINDOW = 11
# What pyiqa computes under these names (its default configurations).
_VARIANTS = {
    "psnr": "RGB, data range 1",
    "ssim": "Y of YCbCr, 11×11 Gaussian, no downsampling",
    "lpips": "AlexNet, v0.1",
    "fid": "clean-fid resizing, Inception v3",
    "niqe": "Y of YCbCr",
    "liqe": "KonIQ-10k",
    "musiq": "KonIQ-10k",
    "clipiqa": "CLIP RN50, two prompts",
    "clipiqa+_vitL14_512": "CLIP-IQA+, ViT-L/14, 512 pixels",
}
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
    if a.shape != b.shape or a.ndim != 3 or min(a.shape[1:]) < SSIM_WINDOW:
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


@dataclass(frozen=True)
class Metric:
    """A metric of pyiqa.

    Attributes:
        variant: in words, what exactly is computed.
        lower_is_better, needs_original: as they say.
        of_folders: it compares two sets of pictures (FID) and has no value for one picture.
        network: pyiqa's module.
    """

    name: str
    variant: str
    lower_is_better: bool
    needs_original: bool
    of_folders: bool
    network: Any

    def __call__(self, restored: Tensor, clean: Tensor | None = None) -> float:
        """The value for one picture [3,H,W] in [0,1]; `clean` where it needs the original."""
        pictures = [x[None].float() for x in (restored, clean) if x is not None]
        with torch.no_grad():
            return float(self.network(*pictures[: 2 if self.needs_original else 1]))

    def compare_folders(self, restored: Path, clean: Path) -> float:
        """The value for the pictures in one folder against those in another."""
        with torch.no_grad():
            value = self.network(str(restored), str(clean), num_workers=0, verbose=False)
        return float(value)


def load_metrics(
    names: Sequence[str], device: str = "cpu"
) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics of pyiqa that can be had here, and for the others one sentence why not.

    pyiqa is optional (`pip install mimdit[eval]`) and of a non-commercial licence.
    """
    metrics: dict[str, Metric] = {}
    missing: dict[str, str] = {}
    for name in names:
        try:
            import pyiqa  # pyright: ignore[reportMissingImports]

            # Its notices of downloads would mix with tables.
            with contextlib.redirect_stdout(sys.stderr):
                network = pyiqa.create_metric(name, device=torch.device(device))
        # Weights that cannot be downloaded, packages that are not there: many kinds of error.
        except Exception as error:
            what = "its weights cannot be had here: " if isinstance(error, OSError) else ""
            missing[name] = what + first_line(error)
            continue
        of_folders = "fid" in name
        metrics[name] = Metric(
            name,
            _VARIANTS.get(name, "pyiqa's default"),
            bool(network.lower_better),
            network.metric_mode == "FR" or of_folders,
            of_folders,
            network,
        )
    return metrics, missing


def scorer(names: Sequence[str] = OFFLINE, device: str = "cpu") -> Callable[..., dict[str, float]]:
    """A function (restored, clean) → all figures: PSNR, SSIM, and pyiqa's `names`.

    The attribute `missing` of the function says why a metric cannot be computed here.
    """
    metrics, missing = load_metrics(names, device)

    def score(restored: Tensor, clean: Tensor) -> dict[str, float]:
        found = {"psnr": psnr(restored, clean), "ssim": ssim(restored, clean)}
        a, b = restored.to(device), clean.to(device)
        return found | {name: metric(a, b) for name, metric in metrics.items()}

    score.missing = missing  # pyright: ignore[reportFunctionMemberAccess]
    return score
