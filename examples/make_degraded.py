"""Make the example pictures: five crops of photographs that training never sees, one damage each.

`python examples/make_degraded.py` writes `examples/degraded/` and `examples/clean/`; it needs the
`train` extra, which brings the photographs.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from training.data import held_out
from training.degrade import degrade

# picture, left, top, side of the crop; it is scaled to SIDE pixels.
EXAMPLES = {
    "blur": ("motorcycle_right", 60, 20, 460, {"model": "gaussian", "sigma": 1.8, "ratio": 1.0}),
    "haze": ("china", 60, 0, 420, {"beta": 1.4, "airlight": 0.85}),
    "low_light": ("coffee", 100, 0, 400, {}),
    "noise": ("motorcycle_left", 120, 20, 460, {"model": "gaussian", "sigma": 25 / 255, "gray": 0}),
    "rain": ("china", 220, 7, 420, {"length": 17.0, "width": 1.0, "strength": 0.75, "veil": 0.25}),
}
SIDE = 384


def main() -> None:
    folder, pictures = Path(__file__).parent, held_out()
    for kind, (name, left, top, side, parameters) in EXAMPLES.items():
        crop = Image.fromarray(pictures[name]).crop((left, top, left + side, top + side))
        crop = crop.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        clean = np.asarray(crop, dtype=np.float32) / 255
        damaged, label = degrade(clean, (kind,), np.random.default_rng(3), **{kind: parameters})
        crop.save(folder / "clean" / f"{kind}.png")
        stored = np.round(damaged * 255).astype(np.uint8)
        Image.fromarray(stored).save(folder / "degraded" / f"{kind}.png")
        print(label.as_dict())


if __name__ == "__main__":
    main()
