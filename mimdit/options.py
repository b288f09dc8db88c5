"""What may be asked of a restoration."""

from mimdit.color import COLOR_FIXES
from mimdit.sampling import SHIFTS


def check_options(
    steps: int,
    shifts: int,
    strength: float,
    fix: str,
    tile: int,
    tile_batch: int,
    output_type: str,
) -> None:
    """ValueError for the first argument that is out of range."""
    if steps < 1:
        raise ValueError(f"num_inference_steps: expected at least 1, got {steps}")
    if shifts not in SHIFTS:
        raise ValueError(f"shifts: expected one of {', '.join(map(str, SHIFTS))}, got {shifts}")
    if not 0 <= strength <= 1:
        raise ValueError(f"strength: expected 0 to 1, got {strength:g}")
    if tile < 0:
        raise ValueError(f"tile: expected 0 (automatic) or pixels, got {tile}")
    if tile_batch < 1:
        raise ValueError(f"tile_batch: expected at least 1, got {tile_batch}")
    if fix not in COLOR_FIXES:
        raise ValueError(f"color_fix: expected one of {', '.join(COLOR_FIXES)}, got {fix!r}")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type: expected pil, np, pt or latent, got {output_type!r}")
