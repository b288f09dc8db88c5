"""The arguments of `mimdit-restore`, and those that commands share."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mimdit import __version__
from mimdit.cli.ranges import device, experts, number, output, place, suffix

_EPILOG = """examples:
  mimdit-restore -i photo.jpg -o restored.png
  mimdit-restore -i photos/ -o restored/ --compare --report
  mimdit-restore -i "photos/*.png" -o restored/ -t 512 --device cuda --precision bf16 --resume
  mimdit-restore -i s3://bucket/photos -o s3://bucket/restored --ray

exit code: 0 all pictures restored, 1 some failed (listed at the end), 2 wrong arguments, 130 Ctrl-C
"""
# Of seeds, as torch takes them.
_LARGEST = 2**63 - 1


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mimdit-restore`."""
    parser = new_parser(
        "mimdit-restore",
        "Restore pictures: noise, blur, rain, haze, low light and mixtures of them.",
        _EPILOG,
    )
    files = parser.add_argument_group("pictures")
    add = files.add_argument
    add(
        "-i",
        "--input",
        nargs="+",
        type=place,
        required=True,
        metavar="PATH",
        help="files, folders (with subfolders), quoted globs, or URLs that fsspec opens",
    )
    add(
        "-o",
        "--output",
        type=output,
        default="restored",
        metavar="PATH",
        help="folder, or a file name when there is one picture; subfolders are mirrored "
        "(default: restored)",
    )
    add(
        "--suffix",
        type=suffix,
        default="",
        metavar="TEXT",
        help="appended to the name: photo.png becomes photoTEXT.png",
    )
    add(
        "--ext",
        choices=("auto", "png", "jpg", "webp"),
        default="auto",
        help="type of the output; auto: that of the input",
    )
    add(
        "--report",
        action="store_true",
        help="write which experts were chosen: NAME.json, and NAME_experts.png to look at",
    )
    add(
        "--compare",
        action="store_true",
        help="write before and after: NAME_compare.html with a slider, NAME_compare.png side by "
        "side, and for several pictures a list of all, compare.html",
    )
    existing = files.add_mutually_exclusive_group()
    existing.add_argument(
        "--resume", action="store_true", help="write only what is not there yet, keep the rest"
    )
    existing.add_argument(
        "--overwrite",
        action="store_true",
        help="replace files that exist, a picture's own input too",
    )

    add = parser.add_argument_group("restoration").add_argument
    add_model(add)
    add(
        "--steps",
        type=number(int, 1, 1000),
        metavar="N",
        help="denoising steps (default: what the model recommends)",
    )
    add(
        "--shifts",
        type=int,
        choices=(1, 2, 4),
        help="average over this many shifted patch grids, against visible blocks; the time "
        "multiplies (default: what the model recommends, or 1 with --steps)",
    )
    add(
        "--guidance-scale",
        type=number(float, 0, 100),
        default=1.0,
        metavar="G",
        help="classifier-free guidance; 1 turns it off (default: 1)",
    )
    add(
        "--strength",
        type=number(float, 0, 1),
        default=1.0,
        metavar="S",
        help="0 keeps the input, 1 restores in full (default: 1)",
    )
    add(
        "--color-fix",
        choices=("none", "adain", "wavelet"),
        default="none",
        help="take the colours of the input (default: none)",
    )
    add_seed(add, "start of the noise, the same for every picture")
    add(
        "--experts",
        type=experts,
        metavar="GROUP=WEIGHT,…",
        help="weights of expert groups instead of the router's, such as spatial=0.5,channel=0.2; "
        "the others share the rest",
    )
    add(
        "--routing",
        choices=("picture", "tile"),
        help="what experts are chosen for: the whole picture, or each tile (default: picture)",
    )

    add = parser.add_argument_group("device and memory").add_argument
    add_device(add)
    add(
        "-t",
        "--tile",
        type=number(int, 0),
        default=0,
        metavar="PIXELS",
        help="tile side; 0 leaves it to the model (default: 0)",
    )
    add(
        "--tile-overlap",
        type=number(int, 0),
        default=64,
        metavar="PIXELS",
        help="overlap of neighbouring tiles; without -t at most half a tile (default: 64)",
    )
    add(
        "--batch-size",
        type=number(int, 1),
        metavar="N",
        help="tiles in one forward pass (default: what free memory holds)",
    )
    add(
        "--engine",
        type=Path,
        metavar="DIR",
        help="a folder written by mimdit-export, instead of --model; it has its own --precision",
    )
    add(
        "--no-accelerate",
        dest="accelerate",
        action="store_false",
        help="run the plain reference model; results agree up to rounding",
    )

    add = parser.add_argument_group(
        "several GPUs or hosts (pip install 'mimdit[ray]')"
    ).add_argument
    add(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="restore on a Ray cluster, such as host:6379 or auto; without an address on the one "
        "that runs here, or on this machine",
    )
    add(
        "--ray-workers",
        type=number(int, 1),
        metavar="N",
        help="models at work at once (default: one for each GPU, or else each host)",
    )
    return parser


def new_parser(prog: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A command's parser with what all have: --help, --version and --debug."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"mimdit {__version__}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks and warnings")
    return parser


def add_model(add: Callable[..., Any]) -> None:
    """--model; add: `add_argument` of a parser or group."""
    add(
        "--model",
        default="tiny",
        metavar="NAME",
        help="shipped model, folder or hub id (default: tiny)",
    )


def add_device(add: Callable[..., Any]) -> None:
    """--device and --precision."""
    add(
        "--device",
        type=device,
        default="auto",
        metavar="auto|cuda|cpu|mps",
        help="where to run; cuda:1 is the second GPU (default: auto)",
    )
    add_precision(add)


def add_precision(add: Callable[..., Any], default: str | None = None) -> None:
    """--precision; without a default, programs take fp32."""
    add(
        "--precision",
        choices=("fp32", "bf16", "fp16"),
        default=default,
        help=f"number type (default: {default or 'fp32'})",
    )


def add_seed(add: Callable[..., Any], what: str) -> None:
    """--seed; what: it starts."""
    add(
        "--seed",
        type=number(int, 0, _LARGEST),
        default=0,
        metavar="N",
        help=f"{what} (default: 0)",
    )
