"""From the arguments of `mimdit-export` to what is exported and checked."""

import argparse

from export.compare import STEPS
from export.engines import Target, gpu
from export.folder import Settings
from export.limits import Limits, codec_side
from export.pictures import Picture
from mimdit.codec import PixelCodec, codec_factor
from mimdit.pipeline import MiMDiTPipeline
from mimdit.planning import MIN_TOKENS

# Tokens along the shortest side of graphs without --sizes; the largest side is the model's.
_LEAST = 8
# Tokens along a tile of the picture, where the graphs take so few: more prove the same, and take
# CPUs long.
_PICTURE = 32


def plan(pipe: MiMDiTPipeline, args: argparse.Namespace) -> Settings:
    """Sizes that the graphs take, and those that are checked: with two that nothing else names.

    Raises:
        ValueError: sizes that do not fit the model.
    """
    config, factor = pipe.transformer.config, codec_factor(pipe.vae)
    patch, largest = factor * config["patch_size"], config["pos_embed_max_size"]
    trained = min(config["sample_size"] // config["patch_size"], largest)
    asked = [(h // patch, w // patch) for h, w in args.sizes or []]
    for h, w in args.sizes or []:
        if h % patch or w % patch or max(h, w) > largest * patch:
            raise ValueError(
                f"--sizes: expected multiples of {patch} up to {largest * patch}, got {h}x{w}"
            )
    # Engines reserve memory for the largest.
    most = trained if targets(args) and not args.dynamic else largest
    sides = {n for size in asked for n in size} or {min(_LEAST, most), most}
    low, high = min(sides), max(sides)
    limits = Limits(args.batch, (low, high))
    unseen = [
        (min(args.batch[1], 3), min(low + 9, high), min(low + 4, high)),
        (1, min(low + 2, high), min(low + 7, high)),
    ]
    checked = [(1, *size) for size in asked or [(trained, trained)]]
    checked = list(dict.fromkeys([limits.traced(), *checked, *unseen]))
    # CPUs are slow in half precision, and the picture is only reported then.
    tile = (max(low, min(trained, high, _PICTURE)) if args.precision == "fp32" else low) * patch
    if isinstance(pipe.vae, PixelCodec):
        # A little more than one tile, so that there are several.
        picture = Picture(tile + 24, tile, STEPS)
    else:
        side = max(MIN_TOKENS, low)
        # Shifted grids add a patch; a network with a codec takes CPUs long on larger pictures.
        small = side < codec_side(pipe)
        picture = Picture(side * patch, tile, STEPS) if small else None
    return Settings(
        limits,
        checked,
        precision=args.precision,
        opset=args.opset,
        check=args.check is not False,
        device=args.device,
        picture=picture,
        targets=targets(args),
    )


def targets(args: argparse.Namespace) -> list[Target]:
    """What engines the arguments ask for."""
    workspace = None if args.workspace is None else int(args.workspace * 2**30)
    wanted = [Target("tensorrt", (), workspace)] if args.trt else []
    here = gpu()
    capabilities = args.sm or (here["capability"] if here else "89",)
    return wanted + ([Target("tensorrt_rtx", capabilities, workspace)] if args.trt_rtx else [])
