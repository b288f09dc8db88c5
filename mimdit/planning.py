"""What a picture will take, before it is started: tiles, passes and memory."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from mimdit.codec import Codec, codec_factor
from mimdit.engine.plan import plan
from mimdit.memory import free_memory
from mimdit.tiled_codec import LEAST_CODEC_TILE, codec_bytes, codec_tile
from mimdit.tiling import Tiling, pixel_tiles
from mimdit.transformer import MiMDiTTransformer2DModel

# Smaller pictures are padded up to this many tokens a side: no model saw such small grids.
MIN_TOKENS = 16
# Tokens along the smallest tile that is tried.
_LEAST_TILE = 8
# Of a GPU's free memory, so much may be planned for; the rest is for fragments and other programs.
_USABLE = 0.7
# Tokens in a pass beyond which more of them make no GPU faster.
_FULL = 2**14
# Latents beyond this many bytes a plane stay in main memory, and tiles travel.
_RESIDENT = 2**26
# Bytes of conditions that are kept for later steps on a CPU.
_KEPT = 2**30


@dataclass(frozen=True)
class Wish:
    """What a call asks for; tile and overlap in pixels, tile and batch 0 where left to the plan."""

    steps: int
    shifts: int
    tile: int
    overlap: int
    batch: int


@dataclass(frozen=True)
class PicturePlan:
    """Of `pictures` pictures of height × width pixels, restored together.

    tiling: on the latent plane, of `factor` pixels a step. tile: pixels along a tile's longer side;
    least_tile: of the smallest that is tried where memory runs out. batch: tiles a forward pass.
    device: where the model runs. free: bytes it had left, if known. needed: an estimate of what a
    pass holds there, without weights and codec. keep: bytes of conditions that may be kept there
    for later steps. home: where whole latents lie. host: bytes of main memory for whole pictures
    and latents, at most at once. codec_tile: pixels, 0 for none.
    """

    height: int
    width: int
    pictures: int
    tiling: Tiling
    factor: int
    tile: int
    least_tile: int
    batch: int
    device: torch.device
    free: int | None
    needed: int
    keep: int
    home: torch.device
    host: int
    codec_tile: int

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def passes(self) -> int:
        """Forward passes of one step on one grid of patches."""
        return len(self.tiling.chunks(self.batch))

    def __str__(self) -> str:
        rows, columns = (side * self.factor for side in self.tiling.size)
        tiles = len(self.tiling.corners)
        kind = "tile" if tiles == 1 else "tiles"
        free = "" if self.free is None else f" of {self.free / 1e9:.1f} GB free"
        text = (
            f"{self.width}×{self.height} pixels: {tiles} {kind} of {columns}×{rows}, "
            f"{self.batch} in a forward pass; about {self.needed / 1e9:.2f} GB{free} on "
            f"{self.device}, {self.host / 1e9:.2f} GB for whole pictures"
        )
        return f"{text}; codec in tiles of {self.codec_tile}" if self.codec_tile else text


class Fits:
    """Tiles that a pass may have: what memory held when first asked, or has left after it ran out.

    Later an engine's buffers, which serve the next picture, too, would look like memory that is
    gone.
    """

    def __init__(self) -> None:
        self._found: dict[Any, int] = {}
        # Latents along height times width, in all tiles of a pass.
        self._most: int | None = None

    def tiles(
        self,
        model: MiMDiTTransformer2DModel,
        pictures: int,
        size: tuple[int, int],
        device: torch.device,
        release: Callable[[], None],
    ) -> int:
        """Of `size` latents, each with that many pictures; what `release` gives back counts."""
        key = (pictures, size, model.dtype)
        if key not in self._found:
            self._found[key] = fitting(model, pictures, size, free_memory(device))
            if self._found[key] < 1:
                release()
                self._found[key] = fitting(model, pictures, size, free_memory(device))
        found = self._found[key]
        return found if self._most is None else min(found, self._most // _cells(pictures, size))

    def ran_out(self, plan: PicturePlan) -> None:
        """Memory did not hold this plan: later passes have at most half of its latents."""
        self._most = plan.batch * _cells(plan.pictures, plan.tiling.size) // 2


def _cells(pictures: int, size: tuple[int, int]) -> int:
    return pictures * size[0] * size[1]


def make_plan(
    model: MiMDiTTransformer2DModel,
    codec: Codec,
    device: torch.device,
    size: tuple[int, int],
    pictures: int,
    wish: Wish,
    fits: Fits,
    reduced: tuple[int, int] | None = None,
    release: Callable[[], None] = lambda: None,
) -> PicturePlan:
    """The plan of pictures of `size` (height, width) pixels on a device.

    fits: of all pictures of the pipeline. reduced: tile and batch after memory ran out. release:
    gives back what an engine keeps of other sizes, before tiles get smaller.
    Raises ValueError for a tile that the model cannot have, or an overlap that is no smaller.
    """
    factor, patch = codec_factor(codec), model.config["patch_size"]
    token = factor * patch
    plane = tuple(max(-(-n // token), MIN_TOKENS) * patch for n in size)
    wanted = wish.batch
    trained = max(model.config["sample_size"] * factor, token)
    tile = wish.tile or min(trained, model.config["pos_embed_max_size"] * token)
    if reduced is not None:
        tile, wanted = reduced
    least = min(tile, _LEAST_TILE * token)
    while True:
        tiling = _tiling(model, (plane[0], plane[1]), factor, tile, wish)
        room = fits.tiles(model, pictures, tiling.size, device, release)
        # Only a tile that nobody asked for is made smaller.
        if room >= 1 or wish.tile or wanted or tile // 2 < least:
            break
        tile //= 2
    free = free_memory(device)
    tokens = pictures * tiling.size[0] * tiling.size[1] // patch**2
    batch = wanted or pick_batch(tiling, tokens, room, device)
    batch = tiling.even(batch) if wanted else batch
    needed = pass_bytes(model, batch * pictures, tiling.size)
    latents = 4 * pictures * model.config["in_channels"] * plane[0] * plane[1]
    home = home_of(latents, device)
    whole = 4 * 3 * pictures * size[0] * size[1]
    # The picture, what earlier grids gave, and latents: damaged, noise, velocity, and after the
    # first step those that it gave. At the end, the result and two copies of it.
    planes = 3 + (wish.steps > 1) if home.type == "cpu" else 0
    denoising = whole * (1 + (wish.shifts > 1)) + planes * latents
    return PicturePlan(
        *size,
        pictures,
        tiling,
        factor,
        max(tiling.size) * factor,
        least,
        batch,
        device,
        free,
        needed,
        kept_bytes(device, needed, free, wish.steps),
        home,
        max(denoising, 4 * whole),
        _codec_tile(codec, free),
    )


def _tiling(
    model: MiMDiTTransformer2DModel, plane: tuple[int, int], factor: int, tile: int, wish: Wish
) -> Tiling:
    patch = model.config["patch_size"]
    sides = (patch, model.config["pos_embed_max_size"] * patch)
    least = None if wish.tile else MIN_TOKENS * patch
    return pixel_tiles(plane, tile, wish.overlap, factor, patch, sides, least)


def _codec_tile(codec: Codec, free: int | None) -> int:
    """Pixels along a tile of the codec, halved until memory holds it; 0 for the pixel codec."""
    tile = codec_tile(codec)
    while (
        free is not None
        and tile // 2 >= LEAST_CODEC_TILE
        and (codec_bytes(codec, tile) > free * _USABLE)
    ):
        tile //= 2
    return tile


def pass_bytes(model: MiMDiTTransformer2DModel, pictures: int, size: tuple[int, int]) -> int:
    """An estimate of what one pass over tiles of `size` latents holds, without weights."""
    made = plan(model, (pictures, model.config["in_channels"], *size))
    mim, tokens = model.mim, made.grid[0] * made.grid[1] * pictures
    # Queries, keys and values of the chosen sub-experts of one group, in as many blocks as go
    # through together: before and after their convolution, and in float32.
    wide = tokens * mim.top_k * 3 * mim.down_bias.shape[1] * mim.together(tokens)
    mixtures = 4 * model.dtype.itemsize * wide
    return made.buffers + made.condition + max(made.activations, mixtures)


def fitting(
    model: MiMDiTTransformer2DModel, pictures: int, size: tuple[int, int], free: int | None
) -> int:
    """Tiles of `size` latents that a pass may have in `free` bytes; one where that is unknown."""
    if free is None:
        return 1
    return int(free * _USABLE) // max(pass_bytes(model, pictures, size), 1)


def pick_batch(tiling: Tiling, tokens: int, fits: int, device: torch.device) -> int:
    """Tiles a pass, of `tokens` tokens each: all that fit, as far as they make it faster.

    One on a CPU, where more are no faster. On a GPU all of a picture, or a power of two, so that
    pictures of many sizes share one shape; the one that leaves the fewest places empty.
    """
    count = len(tiling.corners)
    most = min(fits, _FULL // tokens, count)
    if device.type == "cpu" or most <= 1 or most == count:
        return 1 if device.type == "cpu" else max(most, 1)
    largest = 1 << (most.bit_length() - 1)
    choices = [batch for batch in (largest, largest // 2, largest // 4) if batch]
    return min(choices, key=lambda batch: len(tiling.chunks(batch)) * batch)


def home_of(planes: int, device: torch.device) -> torch.device:
    """Where latents of so many bytes lie while their tiles are computed on `device`."""
    return device if planes <= _RESIDENT else torch.device("cpu")


def kept_bytes(device: torch.device, needed: int, free: int | None, steps: int) -> int:
    """Room for conditions that later steps use again."""
    if steps == 1:
        return 0
    if device.type == "cpu" or free is None:
        return _KEPT
    return max(0, int(free * _USABLE) - needed)
