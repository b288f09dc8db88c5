"""Restored pictures in the form that the caller wants."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mimdit.color import color_fix
from mimdit.encoding import quantised


def finished(
    restored: Tensor, damaged: Tensor, strength: float, color: str, output_type: str, refusal: str
) -> Tensor | np.ndarray | list[Image.Image]:
    """restored [B,3,H,W], which is changed in place, as `output_type` of a pipeline says.

    strength, color: its options. refusal: the ValueError's text where a value is not finite.
    """
    # Extremes are NaN where any value is, and need no copy.
    if not all(torch.isfinite(x) for x in restored.aminmax()):
        raise ValueError(refusal)
    restored = color_fix(color, restored, damaged)
    if strength < 1:
        restored = torch.lerp(damaged, restored, strength)
    restored = restored.clamp_(0, 1)
    if output_type == "pt":
        return restored
    pictures = restored.movedim(1, -1).numpy()
    if output_type == "np":
        return pictures
    return [Image.fromarray(quantised(picture, 255, np.uint8)) for picture in pictures]
