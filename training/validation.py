"""What the averaged weights do to pictures that are never trained on, while a run goes on."""

import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimdit.image_io import read_picture
from mimdit.metrics import SSIM_WINDOW, scorer
from mimdit.pipeline import MiMDiTPipeline
from training.config import Settings
from training.data import folder, held_out
from training.degrade import KINDS, degrade
from training.reports import keep_until

# Pictures of a user's folder that are looked at.
_PICTURES = 4
Figures = dict[str, dict[str, float]]


class Validator:
    """Restores pictures with every kind of damage, always the same ones, with the same noise.

    The pictures are the held-out photographs, or the first of `validation_data` (a folder). Writes
    `validation.jsonl` and `validation/step-N.png` (rows: damaged, restored, original).

    Raises ValueError where there are no pictures.
    """

    def __init__(self, pipe: MiMDiTPipeline, settings: Settings) -> None:
        self.pipe, self.settings = pipe, settings
        self.out = Path(settings.output)
        if settings.validation_size < SSIM_WINDOW:
            raise ValueError(
                f"validation_size: expected at least {SSIM_WINDOW} pixels, the window of SSIM, got "
                f"{settings.validation_size}"
            )
        self.score = scorer(())
        if settings.validation_data is None:
            arrays = [array.astype(np.float32) / 255 for array in held_out().values()]
        else:
            files = folder(settings.validation_data)[:_PICTURES]
            arrays = [read_picture(path).rgb for path in files]
        if not arrays:
            raise ValueError(
                "validation: expected pictures, got none; name a folder with --validation-data or "
                "pip install scikit-image scikit-learn"
            )
        self.pairs: list[tuple[str, np.ndarray, np.ndarray]] = []
        for kind in KINDS:
            for i, array in enumerate(arrays):
                clean = centre_square(array, settings.validation_size)
                damaged, _ = degrade(clean, (kind,), np.random.default_rng(i))
                self.pairs.append((kind, np.round(damaged * 255) / np.float32(255), clean))

    def begin(self, step: int) -> None:
        """Remove figures beyond the step that a run goes on from."""
        keep_until(self.out / "validation.jsonl", step)

    def has(self, step: int) -> bool:
        """Whether a step's figures are written."""
        log = self.out / "validation.jsonl"
        rows = log.read_text().splitlines() if log.is_file() else []
        return any(json.loads(row)["step"] == step for row in rows)

    @torch.no_grad()
    def __call__(self, step: int, write: bool = True) -> tuple[Figures, Tensor]:
        """Mean figures by damage, and a sheet [3,H,W] in [0,1] of the first picture of each."""
        model = self.pipe.transformer
        figures: dict[str, list[dict[str, float]]] = defaultdict(list)
        columns: dict[str, np.ndarray] = {}
        model.eval()
        hidden = dict(getattr(self.pipe, "_progress_bar_config", {}))
        self.pipe.set_progress_bar_config(disable=True)
        bf16 = self.settings.mixed_precision == "bf16"
        for kind, damaged, clean in self.pairs:
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                found = self.pipe(
                    damaged, generator=torch.Generator().manual_seed(0), output_type="np"
                )
            restored = np.round(found.images[0] * 255) / np.float32(255)
            a, b = (torch.from_numpy(x).movedim(-1, 0) for x in (restored, clean))
            figures[kind].append(self.score(a, b))
            columns.setdefault(kind, np.concatenate([damaged, restored, clean]))
        self.pipe.set_progress_bar_config(**hidden)
        means = {
            kind: {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
            for kind, rows in figures.items()
        }
        sheet = np.concatenate(list(columns.values()), axis=1)
        if write:
            path = self.out / "validation" / f"step-{step}.png"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.round(sheet * 255).astype(np.uint8)).save(path)
            with (self.out / "validation.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, "figures": means}) + "\n")
        return means, torch.from_numpy(sheet).movedim(-1, 0)


def centre_square(image: np.ndarray, size: int) -> np.ndarray:
    """The central square of [H,W,3] in [0,1], as float32 [size,size,3] of 8-bit values."""
    side = min(image.shape[:2])
    top, left = ((n - side) // 2 for n in image.shape[:2])
    square = np.round(image[top : top + side, left : left + side] * 255).astype(np.uint8)
    small = Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.float32) / 255
