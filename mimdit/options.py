"""What may be asked of a restoration, whatever runs it."""

from collections.abc import Sequence
from typing import Any

from mimdit.color import COLOR_FIXES

# What one routing is computed from.
ROUTINGS = ("picture", "tile")
# Places of a patch grid, in patches: a lattice as even as four points allow, that differs from
# halves of a patch by quarters, too.
_PLACES = ((0.0, 0.0), (0.75, 0.25), (0.25, 0.5), (0.5, 0.75))
SHIFTS = (1, 2, 4)


def grid_places(shifts: int, patch: int) -> list[tuple[int, int]]:
    """(down, right) of the first `shifts` grids in pixels, for patches of `patch` pixels."""
    return [(int(y * patch), int(x * patch)) for y, x in _PLACES[:shifts]]


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


def check_generators(given: int, pictures: int) -> None:
    """ValueError unless there is one generator, or one for each picture."""
    if given not in (1, pictures):
        raise ValueError(
            f"generator: expected one, or {pictures} for as many pictures, got {given}"
        )


def callback_tensors(
    callback: Any, asked: Sequence[str], known: Sequence[str] = ("latents",)
) -> Sequence[str]:
    """Names of what a callback gets; ValueError for one that is not known."""
    # Callbacks of diffusers' classes name what they read themselves.
    named = getattr(callback, "tensor_inputs", asked)
    for name in set(named) - set(known):
        expected = ", ".join(known)
        raise ValueError(f"callback_on_step_end_tensor_inputs: expected {expected}, got {name!r}")
    return named
