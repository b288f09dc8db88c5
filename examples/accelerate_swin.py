"""A Swin Transformer before and after `mimkernels.accelerate`: equal outputs, and both times.

`python examples/accelerate_swin.py` takes timm's Swin-T with random weights, or torchvision's where
timm is not installed. Kernels run on a GPU; a CPU gets their torch references.
"""

import argparse
import copy
from statistics import median

import torch
from torch import nn

from bench.measure import interleaved
from mimkernels import accelerate


def swin_t() -> tuple[str, nn.Module]:
    """Swin-T without pretrained weights, so that nothing is downloaded."""
    try:
        import timm
    except ImportError:
        from torchvision.models import swin_t

        return "torchvision", swin_t()
    return "timm", timm.create_model("swin_tiny_patch4_window7_224")


def main() -> None:
    cuda = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--batch", type=int, default=64 if cuda else 1)
    parser.add_argument("--runs", type=int, default=30 if cuda else 7)
    args = parser.parse_args()
    device, dtype = torch.device("cuda" if cuda else "cpu"), torch.bfloat16 if cuda else None

    torch.manual_seed(0)
    library, model = swin_t()
    before = model.eval().to(device, dtype)
    after = copy.deepcopy(before)
    print(accelerate(after))

    x = torch.randn(args.batch, 3, 224, 224, device=device, dtype=dtype)
    with torch.inference_mode():
        wanted, found = before(x).float(), after(x).float()
        error = float((found - wanted).norm() / wanted.norm())
        variants = {"before": lambda: before(x), "after": lambda: after(x)}
        times = interleaved(variants, device, warmup=2, runs=args.runs)
    slow, fast = median(times["before"]), median(times["after"])
    print(f"{library}'s Swin-T, {args.batch} pictures, {device.type}, {x.dtype}")
    print(f"relative difference of the outputs: {error:.1e}")
    print(f"before {slow * 1e3:.1f} ms, after {fast * 1e3:.1f} ms: {slow / fast:.2f} times as fast")


if __name__ == "__main__":
    main()
