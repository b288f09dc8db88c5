"""What the averaged weights do to pictures that are never trained on, while a run goes on."""

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimdit.image_io import read_picture
from mimdit.metrics import SSIM_WINDOW, scorer
from mimdit.pipeline import MiMDiTPipeline
from training.config import Settings
from training.data import held_out
from training.datasets import layouts
from training.datasets.pairs import Pair, child
from training.degrade import KINDS, degrade
from training.reports import keep_until

# Pictures of a user's folder that are looked at, or pairs of each row of a data set.
_PICTURES = 4
Figures = dict[str, dict[str, float]]
# A kind of damage or a row of a data set; damaged and clean [H,W,3] in [0,1].
Look = tuple[str, np.ndarray, np.ndarray]


class Validator:
    """Restores the same pictures with the same noise, at every step that is looked at.

    They are the held-out photographs with every kind of damage; or the first of a folder of clean
    ones, `validation_data`; or the first pairs of every row of the data set there, where
    `validation_dataset` names one, of its "val" or "test" split if it has them. Writes
    `validation.jsonl` and `validation/step-N.png` (rows: damaged, restored, original).

    Raises ValueError where there are no pictures, or they cannot be compared.
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
        listing = None
        if settings.validation_data is not None:
            listing = _listed(settings.validation_dataset, settings.validation_data)
        if listing is not None and listing.pairs:
            self.pairs = _stored(listing.pairs, settings.validation_size)
        else:
            files = None if listing is None else listing.singles[:_PICTURES]
            self.pairs = _drawn(files, settings.validation_size)

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
        """Mean figures by damage, and a sheet [3,H,W] in [0,1] of the first picture of each;
        small ones with black beside them."""
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
            room = self.settings.validation_size - len(clean)
            whole = [np.pad(x, ((0, room), (0, room), (0, 0))) for x in (damaged, restored, clean)]
            columns.setdefault(kind, np.concatenate(whole))
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


def _listed(dataset: str, path: str) -> layouts.Listing:
    """What is there to validate with: nothing that is trained on, where the data set tells."""
    part = child(Path(path), "val", "test")
    return layouts.prefer(dataset, path, "test" if part is None else part.name.lower())


def _drawn(files: Sequence[Path] | None, size: int) -> list[Look]:
    """Every kind of damage on squares of pictures scaled to `size`; None: held-out ones."""
    if files is None:
        arrays = [array.astype(np.float32) / 255 for array in held_out().values()]
    else:
        arrays = [read_picture(path).rgb for path in files]
    if not arrays:
        raise ValueError(
            "validation: expected pictures, got none; name a folder with --validation-data or "
            "pip install scikit-image scikit-learn"
        )
    found = []
    for kind in KINDS:
        for i, array in enumerate(arrays):
            clean = centre_square(array, size)
            damaged, _ = degrade(clean, (kind,), np.random.default_rng(i))
            found.append((kind, np.round(damaged * 255) / np.float32(255), clean))
    return found


def _stored(pairs: Sequence[Pair], size: int) -> list[Look]:
    """Central squares of the first pairs of every row, unscaled: noise and streaks keep theirs."""
    found, taken = [], defaultdict[str, int](int)
    for pair in pairs:
        if taken[pair.group] == _PICTURES:
            continue
        if pair.clean is None:
            raise ValueError(f"validation: expected an original of {pair.damaged}, found none")
        taken[pair.group] += 1
        damaged, clean = (read_picture(path).rgb for path in (pair.damaged, pair.clean))
        if damaged.shape != clean.shape:
            (h, w), (h0, w0) = damaged.shape[:2], clean.shape[:2]
            raise ValueError(
                f"validation: expected {pair.damaged} in the size of its original, {w0}×{h0}, got "
                f"{w}×{h}"
            )
        side = min(size, *clean.shape[:2])
        if side < SSIM_WINDOW:
            raise ValueError(
                f"validation: expected at least {SSIM_WINDOW}×{SSIM_WINDOW} pixels, the window of "
                f"SSIM, got {pair.damaged} of {damaged.shape[1]}×{damaged.shape[0]}"
            )
        found.append((pair.group, _middle(damaged, side), _middle(clean, side)))
    return found


def centre_square(image: np.ndarray, size: int) -> np.ndarray:
    """The central square of [H,W,3] in [0,1], as float32 [size,size,3] of 8-bit values."""
    square = np.round(_middle(image, min(image.shape[:2])) * 255).astype(np.uint8)
    small = Image.fromarray(square).resize((size, size), Image.Resampling.LANCZOS)
    return np.asarray(small, dtype=np.float32) / 255


def _middle(image: np.ndarray, side: int) -> np.ndarray:
    """The central square [side,side,3] of [H,W,3]."""
    top, left = ((n - side) // 2 for n in image.shape[:2])
    return image[top : top + side, left : left + side]
