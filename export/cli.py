"""`mimdit-export`: a model as a folder of graphs that restores pictures without it."""

import argparse
import os
import re
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from export.libraries import ExportError, library
from mimdit import __version__
from mimdit.errors import first_line

if TYPE_CHECKING:
    from export.folder import Export, Settings

_EPILOG = """examples:
  mimdit-export --out tiny-onnx
  mimdit-export my-model/ --out my-onnx --precision fp16 --sizes 512x512,1024x1024 --batch 1..2

exit code: 0 exported and all checks held, 1 failed, 2 wrong arguments
"""
# Tokens along the shortest side of graphs without --sizes; the largest side is the model's.
_LEAST = 8


def main(argv: Sequence[str] | None = None) -> int:
    """Run `mimdit-export`; returns the exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    try:
        for name in ("onnx", "onnxscript", "onnxruntime", *["tensorrt_rtx"] * args.trt_rtx):
            library(name)
        with warnings.catch_warnings(), _Stages() as stages:
            if not args.debug:
                warnings.simplefilter("ignore")
            stages(f"loading {args.model}")
            pipe = load(args.model, args.precision)
            settings = plan(pipe, args)
            from export.folder import export_folder

            done = export_folder(pipe, args.out, settings, args.model, stages)
    except KeyboardInterrupt:
        print("mimdit-export: stopped; nothing was written", file=sys.stderr)
        return 130
    # Models fail in many ways: ExportError, ValueError, OSError, errors of torch's tracing ...
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"mimdit-export: {first_line(error)}", file=sys.stderr)
        return 1
    print(table(done))
    if not done.passed:
        print(f"mimdit-export: a gate failed; the files are in {done.folder}", file=sys.stderr)
        return 1
    print(f"wrote {done.folder}{'' if done.checks else ', not checked'}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    """The arguments of `mimdit-export`."""
    parser = argparse.ArgumentParser(
        prog="mimdit-export",
        description="Export a model to ONNX and check that it computes the same.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--version", action="version", version=f"mimdit {__version__}")
    add("--debug", action="store_true", help="show tracebacks and warnings")
    add(
        "model",
        nargs="?",
        default="tiny",
        metavar="MODEL",
        help="shipped model, folder, hub id, or the preset debug (default: tiny)",
    )
    add("--out", type=Path, required=True, metavar="DIR", help="folder to write or replace")
    add("--onnx", action="store_true", help="write ONNX graphs (always done)")
    add(
        "--trt-rtx",
        action="store_true",
        help="also build TensorRT-RTX engines; needs no GPU, but only a GPU can run or check them",
    )
    add(
        "--sm",
        type=lambda text: tuple(text.split(",")),
        default=("89",),
        metavar="SM,…",
        help="compute capabilities of the engines' GPUs, such as 80,89,120 (default: 89)",
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
        "--dynamic", action="store_true", help="all sides that the model takes (the default)"
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
        default=True,
        help="compare with the model (default: yes)",
    )
    add(
        "--device",
        choices=("cpu", "cuda"),
        default="cpu",
        help="where ONNX Runtime runs for the check (default: cpu)",
    )
    return parser


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


def load(name: str, precision: str) -> Any:
    """The pipeline on the CPU; `debug` has drawn weights."""
    for variable in ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY"):
        os.environ.setdefault(variable, "error")
    from diffusers.utils import logging

    from mimdit.loading import PRECISIONS, WEIGHTS, assemble, load_pipeline
    from mimdit.presets import PRESETS, build

    logging.disable_progress_bar()
    if name != "debug":
        if name in PRESETS and not (WEIGHTS / name).is_dir():
            raise ExportError(
                f"{name} ships without weights; make a folder with mimdit-init, and name that"
            )
        return load_pipeline(name, precision=precision)
    import torch

    torch.manual_seed(0)
    # Drawn weights drift off over many steps.
    pipe = assemble(build(name).randomize_(0).eval(), default_steps=3)
    return pipe.to(PRECISIONS[precision])


def plan(pipe: Any, args: argparse.Namespace) -> "Settings":
    """Sizes that the graphs take, and those that are checked: with one that nothing else names.

    Raises:
        ValueError: sizes that do not fit the model.
    """
    from export.folder import Settings
    from export.onnx_export import Limits
    from export.parity import Picture
    from mimdit.codec import PixelCodec, codec_factor

    config, factor = pipe.transformer.config, codec_factor(pipe.vae)
    patch, largest = factor * config["patch_size"], config["pos_embed_max_size"]
    trained = min(config["sample_size"] // config["patch_size"], largest)
    asked = [(h // patch, w // patch) for h, w in args.sizes or []]
    for h, w in args.sizes or []:
        if h % patch or w % patch or max(h, w) > largest * patch:
            raise ValueError(
                f"--sizes: expected multiples of {patch} up to {largest * patch}, got {h}x{w}"
            )
    sides = {n for size in asked for n in size} or {min(_LEAST, largest), largest}
    low, high = min(sides), max(sides)
    limits = Limits(args.batch, (low, high))
    unseen = (min(args.batch[1], 3), min(low + 9, high), min(low + 4, high))
    checked = [(1, *size) for size in asked or [(trained, trained)]]
    checked = list(dict.fromkeys([limits.traced(), *checked, unseen]))
    tile, steps = max(low, min(trained, high)) * patch, pipe.config["default_steps"]
    if isinstance(pipe.vae, PixelCodec):
        # A little more than one tile, so that there are several.
        picture = Picture(tile + 24, tile, steps)
    else:
        side = max(16, low) * patch
        # Shifted grids add a patch; larger pictures the pipeline encodes in tiles.
        small = side + patch <= pipe.vae.tile_sample_min_size
        picture = Picture(side, tile, min(4, steps)) if small else None
    sm = args.sm if args.trt_rtx else ()
    return Settings(
        limits,
        checked,
        precision=args.precision,
        opset=args.opset,
        check=args.check,
        device=args.device,
        picture=picture,
        capabilities=sm,
    )


def table(done: "Export") -> str:
    """One line for every graph and output: its worst error over all sizes."""
    head = f"{'graph':<12}{'nodes':>7}{'MB':>9}{'s':>7}  {'output':<17}{'error':>9}{'gate':>9}  "
    lines = [f"{head}verdict"]
    about = {
        g.graph: f"{g.graph:<12}{g.nodes:>7}{done.megabytes[g.file]:>9.1f}{g.seconds:>7.1f}"
        for g in done.graphs
    }
    worst: dict[tuple[str, str], Any] = {}
    for check in done.checks:
        key = (check.graph, check.output)
        # A failure outweighs any error, NaN too.
        if key not in worst or (not check.passed, check.error) > (
            not worst[key].passed,
            worst[key].error,
        ):
            worst[key] = check
    named: set[str] = set()
    for (graph, output), check in worst.items():
        start = about.get(graph, f"{graph:<12}{'':>23}") if graph not in named else f"{'':<35}"
        named.add(graph)
        gate = "" if check.gate is None else f"{check.gate:.1e}"
        verdict = "FAILED" if not check.passed else "ok" if check.gate is not None else "reported"
        note = f" ({check.note})" if check.note else ""
        lines.append(f"{start}  {output:<17}{check.error:>9.1e}{gate:>9}  {verdict}{note}")
    lines += [f"{text}  not checked" for graph, text in about.items() if graph not in named]
    for engine in done.engines:
        size = f"{done.megabytes[engine.file]:>9.1f}{engine.seconds:>7.1f}"
        lines.append(f"{engine.graph:<12}{'':>7}{size}  engine built, not run")
    return "\n".join(lines)


class _Stages:
    """Says on stderr what goes on; on a terminal with the seconds so far."""

    def __init__(self) -> None:
        self._text, self._start, self._done = "", time.perf_counter(), threading.Event()
        self._thread = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> "_Stages":
        if sys.stderr.isatty():
            self._thread.start()
        return self

    def __call__(self, text: str) -> None:
        self._close()
        self._text, self._start = text, time.perf_counter()
        print(f"{text} …", end="", file=sys.stderr, flush=True)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()
        self._close()

    def _tick(self) -> None:
        while not self._done.wait(1.0):
            line = f"\r{self._text} … {time.perf_counter() - self._start:.0f} s"
            print(line, end="", file=sys.stderr, flush=True)

    def _close(self) -> None:
        """End the line of the last stage."""
        if self._text:
            start = f"\r{self._text} …" if sys.stderr.isatty() else ""
            seconds = time.perf_counter() - self._start
            print(f"{start} {seconds:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
