"""What may be asked of a restoration."""

from mimdit.color import COLOR_FIXES
from mimdit.sampling import SHIFTS

# What one routing is computed from.
ROUTINGS = ("picture", "tile")


def check_options(
    steps: int,
    shifts: int,
    strength: float,
    fix: str,
    tile: int,
    tile_overlap: int,
    tile_batch: int | None,
    routing: str,
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
    if tile_overlap < 0:
        raise ValueError(f"tile_overlap: expected at least 0, got {tile_overlap}")
    if tile_batch is not None and tile_batch < 0:
        raise ValueError(f"tile_batch: expected 0 (automatic) or more, got {tile_batch}")
    if routing not in ROUTINGS:
        raise ValueError(f"routing: expected one of {', '.join(ROUTINGS)}, got {routing!r}")
    if fix not in COLOR_FIXES:
        raise ValueError(f"color_fix: expected one of {', '.join(COLOR_FIXES)}, got {fix!r}")
    if output_type not in ("pil", "np", "pt", "latent"):
        raise ValueError(f"output_type: expected pil, np, pt or latent, got {output_type!r}")
