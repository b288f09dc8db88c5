"""`mimdit-init`: a new MiM-DiT around an SD3.5 backbone, ready for training."""

import argparse
import sys
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

from mimdit.cli.arguments import add_precision, add_seed, new_parser, number
from mimdit.cli.interrupts import Interrupts
from mimdit.errors import first_line

_CARD = """---
library_name: diffusers
pipeline_tag: image-to-image
tags: [image-restoration, mim-dit]
---
# MiM-DiT, not yet trained

A MiM-DiT (arXiv 2603.02710) made by `mimdit-init` from {backbone}: the backbone as it is, {mim:.0f}
million parameters of expert mixtures fresh, {total:.0f} million in all. Until it is trained it does
not restore anything. The licence of the backbone applies.

```python
from mimdit import MiMDiTPipeline

pipe = MiMDiTPipeline.from_pretrained("path or hub id of this model")
```
"""


def build_parser() -> argparse.ArgumentParser:
    """Flags; the mixtures' defaults are the project's reading of the paper."""
    parser = new_parser(
        "mimdit-init", "Make a new MiM-DiT around an SD3.5 backbone, ready for training."
    )
    add = parser.add_argument
    add(
        "--backbone",
        required=True,
        metavar="FOLDER",
        help="SD3.5 in diffusers layout (folder or hub id), or one .safetensors file",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="new folder for the model")
    add("--text-encoders", metavar="FOLDER", help="take the text encoders from here instead")
    add("--vae", metavar="FOLDER", help="take the VAE from here instead")
    add("--positive", metavar="TEXT", help="prompt stored for guidance")
    add("--negative", metavar="TEXT", help="prompt stored for guidance away from it")
    add("--keep-text-encoders", action="store_true", help="copy them too, for captions")
    add_precision(add, "bf16")
    add_seed(add, "of the fresh weights")
    count = number(int, 1)
    add = parser.add_argument_group("mixtures of experts").add_argument
    add("--mim-dim", type=count, default=384, metavar="d", help="their width (default: 384)")
    add(
        "--groups",
        nargs="+",
        default=["spatial", "channel", "swin", "se"],
        choices=("spatial", "channel", "swin", "se"),
        help="kinds of the expert groups; may repeat (default: one of each)",
    )
    add("--experts", type=count, default=4, metavar="E", help="sub-experts a group (default: 4)")
    add("--top-k", type=count, default=2, metavar="k", help="active sub-experts (default: 2)")
    add("--inter", choices=("dense", "sparse"), default="dense", help="between groups")
    add("--intra", choices=("dense", "sparse"), default="sparse", help="inside a group")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code (130 after Ctrl-C)."""
    args = build_parser().parse_args(argv)
    with Interrupts() as interrupts:
        try:
            return _run(args)
        except KeyboardInterrupt:
            pass
        # Checkpoints fail in many ways, and libraries turn Ctrl-C into errors of many kinds.
        except Exception as error:
            if not interrupts.asked:
                if args.debug:
                    traceback.print_exc()
                print(f"mimdit-init: {first_line(error)}", file=sys.stderr)
                return 1
    print("mimdit-init: stopped; nothing was written", file=sys.stderr)
    return 130


def _run(args: argparse.Namespace) -> int:
    out: Path = args.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"--out: {out} exists and is not an empty folder")
    from diffusers.utils import logging

    from mimdit.loading import PRECISIONS
    from mimdit.sd35 import from_sd35

    if not args.debug:
        logging.set_verbosity_error()
    texts = {"positive": args.positive, "negative": args.negative}
    with warnings.catch_warnings(record=True) as notes:
        warnings.simplefilter("always", UserWarning)
        pipe = from_sd35(
            args.backbone,
            text_encoders=args.text_encoders,
            vae=args.vae,
            keep_text_encoders=args.keep_text_encoders,
            dtype=PRECISIONS[args.precision],
            seed=args.seed,
            mim_dim=args.mim_dim,
            groups=args.groups,
            experts=args.experts,
            top_k=args.top_k,
            inter=args.inter,
            intra=args.intra,
            **{name: text for name, text in texts.items() if text is not None},
        )
    for note in notes:
        if "text encoders" in str(note.message):
            print(f"note: {note.message}", file=sys.stderr)
    out.parent.mkdir(parents=True, exist_ok=True)
    # Written beside its place first, so that a folder of this name is always complete.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        unfinished = Path(folder) / "model"
        pipe.save_pretrained(unfinished)
        model = pipe.transformer
        mim = sum(p.numel() for p in model.mim.parameters()) / 1e6
        total = sum(p.numel() for p in model.parameters()) / 1e6
        card = _CARD.format(backbone=Path(args.backbone).name, mim=mim, total=total)
        (unfinished / "README.md").write_text(card)
        unfinished.replace(out)
    print(f"{out}: {total:.0f} M parameters, {mim:.0f} M of them fresh mixtures of experts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
