"""Arguments of `mimdit-restore` that do not go together, refused before any work."""

import argparse
from collections.abc import Sequence

# Arguments that an exported folder cannot follow, by flag, and why.
_FIXED = {
    "model": "an exported folder is a model of its own",
    "precision": "an exported folder has the number type that it was exported with",
    "no-accelerate": "an exported folder has one way to run",
    "experts": "an exported router is fixed",
}


def check(
    parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str] | None
) -> None:
    """Exit with a sentence where an argument would have no effect, or contradicts another one.

    argv: what `args` was parsed from; what is left out may have any default.
    """
    given = _given(parser, args, argv)
    if args.tile and args.tile_overlap >= args.tile:
        parser.error(
            f"--tile-overlap: expected less than --tile ({args.tile}), got {args.tile_overlap}"
        )
    for flag, why in _FIXED.items():
        # --no-accelerate is stored as what it turns off.
        if args.engine is not None and flag.removeprefix("no-") in given:
            parser.error(f"--{flag} does not go with --engine: {why}")
    if args.ray_workers is not None and args.ray is None:
        parser.error("--ray-workers needs --ray")
    if args.ray is not None and args.device.startswith("cuda:"):
        parser.error("--device cuda:N does not go with --ray, which hands GPUs out; use cuda")


def _given(
    parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str] | None
) -> set[str]:
    """The names of arguments that were written, also with the value of their default."""
    # argparse fills in no default where a name is taken.
    blank = object()
    written = argparse.Namespace(**dict.fromkeys(vars(args), blank))
    parser.parse_args(argv, written)
    return {name for name, value in vars(written).items() if value is not blank}
