"""The arguments of `mimdit-export`."""

import argparse
import re
from pathlib import Path

from mimdit.cli.arguments import new_parser
from mimdit.cli.ranges import number

_EPILOG = """examples:
  mimdit-export --out tiny-onnx
  mimdit-export my-model/ --out my-onnx --precision fp16 --sizes 512x512,1024x1024 --batch 1..2
  mimdit-export --check tiny-onnx

exit code: 0 exported and all checks held, 1 failed, 2 wrong arguments
"""
# Arguments that say what is written.
_WRITTEN = (
    *("onnx", "trt", "trt_rtx", "sm", "workspace"),
    *("precision", "sizes", "dynamic", "batch", "opset"),
)


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mimdit-export`."""
    does = "Export a model to ONNX and TensorRT and check that it computes the same."
    parser = new_parser("mimdit-export", does, _EPILOG)
    add = parser.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="shipped model, folder, hub id, or the preset debug (default: tiny)",
    )
    add("--out", type=Path, metavar="DIR", help="folder to write or replace")
    add("--onnx", action="store_true", help="write ONNX graphs (always done)")
    add(
        "--trt",
        action="store_true",
        help="also build TensorRT engines, for the GPU of this machine",
    )
    add(
        "--trt-rtx",
        action="store_true",
        help="also build TensorRT-RTX engines; needs no GPU, but only a GPU can run or check them",
    )
    add(
        "--sm",
        type=lambda text: tuple(text.split(",")),
        metavar="SM,…",
        help="compute capabilities of the GPUs of --trt-rtx, such as 80,86,89,120 (default: that "
        "of this machine's GPU, or 89 without one)",
    )
    add(
        "--workspace",
        type=number(float, 0),
        metavar="GB",
        help="GPU memory that a layer of an engine may use (default: the library's own limit)",
    )
    add("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="default: fp32")
    shapes = parser.add_mutually_exclusive_group()
    shapes.add_argument(
        "--sizes",
        type=sizes,
        metavar="HxW,…",
        help="tiles in pixels: the graphs take sides from the smallest to the largest of them; a "
        "single square gives fixed graphs",
    )
    shapes.add_argument(
        "--dynamic",
        action="store_true",
        help="all sides that the model takes (the default; of engines only up to the tile that it "
        "was trained with, as they reserve memory for the largest)",
    )
    add(
        "--batch",
        type=batch,
        default=(1, 4),
        metavar="1..N",
        help="pictures or tiles at once; 1 fixes it (default: 1..4)",
    )
    add("--opset", type=int, choices=(18, 20, 23), default=18, help="of ONNX (default: 18)")
    add(
        "--check",
        action=argparse.BooleanOptionalAction,
        help="compare with the model (default: yes); without --out compare the exported folder "
        "MODEL again",
    )
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where ONNX Runtime runs for the check (default: cpu)",
    )
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit with a sentence where an argument would have no effect."""
    if args.out is None and not (args.check and args.model):
        parser.error("expected --out DIR, or --check with the folder of an earlier export")
    engines = args.trt or args.trt_rtx
    without = dict.fromkeys(_WRITTEN, "--out: a check is of what the folder holds")
    needs = without if args.out is None else {}
    needs |= {} if args.trt_rtx else {"sm": "--trt-rtx"}
    needs |= {} if engines else {"workspace": "--trt or --trt-rtx"}
    needs |= {"device": "a check, but --no-check leaves it out"} if args.check is False else {}
    for name, wanted in needs.items():
        if getattr(args, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} needs {wanted}")


def sizes(text: str) -> list[tuple[int, int]]:
    """An argparse type: heights and widths in pixels, such as 512x512,768x1024."""
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"expected HxW or HxW,HxW,…, got {text!r}")
    pairs = (part.split("x") for part in text.split(","))
    return [(int(height), int(width)) for height, width in pairs]


def batch(text: str) -> tuple[int, int]:
    """An argparse type: 1 or 1..N."""
    found = re.fullmatch(r"1(?:\.\.([1-9]\d*))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected 1 or 1..N, got {text!r}")
    return 1, int(found[1] or 1)
