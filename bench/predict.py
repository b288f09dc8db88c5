"""What a step should take on GPUs that are not here: `python -m bench.predict`.

Counts the matrix products, attentions and element-wise passes that the engine launches in a step,
and gives each its time on a device of `mimkernels.devices` under the assumptions below. A
prediction to be held against a measurement (bench/NOTES.md), not a measurement. With --kernels also
what the conditioning's own kernels are compiled to for each device: tile, registers, shared memory.
"""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.arguments import at_least, multiples
from mimdit.presets import PRESETS, build
from mimdit.transformer import MiMDiTTransformer2DModel
from mimkernels import (
    channel_attention,
    expert_combine,
    expert_linear,
    explain,
    window_attention,
)
from mimkernels.devices import DEVICES, Device
from mimkernels.tiles import SHARED_MEMORY

# Shares of the published peak: 0.8 is what a large bf16 product reaches on one H200 (790 of
# 989 TFLOP/s); attention with heads of 64 and streaming passes are assumed.
PRODUCT_SHARE = 0.8
ATTENTION_SHARE = 0.5
BANDWIDTH_SHARE = 0.85
# Side of the output tile that one multiprocessor computes; tiles run in whole waves.
TILE = 128
# Seconds between two kernels of a replayed graph.
GAP = 1.5e-6


@dataclass(frozen=True)
class Work:
    """What one step launches.

    products: (rows, columns, depth) of every matrix product. attention: FLOPs of each attention.
    passes: bytes of each element-wise launch.
    """

    products: tuple[tuple[int, int, int], ...]
    attention: tuple[int, ...]
    passes: tuple[int, ...]

    @property
    def flops(self) -> int:
        """Multiplications and additions of products and attentions."""
        return sum(2 * m * n * k for m, n, k in self.products) + sum(self.attention)

    @property
    def launches(self) -> int:
        """Kernels of a step."""
        return len(self.products) + len(self.attention) + len(self.passes)


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, by what they are spent on."""

    products: float
    attention: float
    passes: float
    gaps: float

    @property
    def step(self) -> float:
        """All of it."""
        return self.products + self.attention + self.passes + self.gaps


def work_of(model: MiMDiTTransformer2DModel, latents: tuple[int, int, int, int], text: int) -> Work:
    """What the engine launches in one step on latents [B,c,h,w] with `text` tokens a picture.

    Modulations are looked up in the table of all steps, so they are no product of a step.
    """
    batch, channels, height, width = latents
    config, d = model.config, model.inner_dim
    patch = config["patch_size"]
    image = batch * (height // patch) * (width // patch)
    all_text = batch * text
    # Bytes of the streams: one read or write of every token.
    u_image, u_text = (n * d * model.dtype.itemsize for n in (image, all_text))
    products = [
        (image, d, patch**2 * channels),
        (all_text, d, config["joint_attention_dim"]),
        (image, patch**2 * model.out_channels, d),
    ]
    attention, passes = [], [2 * u_image, 2 * u_image, 2 * u_text]
    own, keys = image // batch + text, 2 * image // batch + text
    for i in range(len(model.transformer_blocks)):
        last = i == len(model.transformer_blocks) - 1
        streams = [(image, u_image)] if last else [(image, u_image), (all_text, u_text)]
        products += [(image, 3 * d, d), (all_text, 3 * d, d)]
        # q, k and v are read, normalised and written into the joint buffers.
        passes += [6 * u_image, 6 * u_text]
        attention.append(batch * 4 * own * keys * d)
        if i in config["dual_attention_layers"]:
            products += [(image, 3 * d, d), (image, d, d)]
            passes.append(6 * u_image)
            attention.append(batch * 4 * (image // batch) ** 2 * d)
        for n, u in streams:
            products += [(n, d, d), (n, 4 * d, d), (n, d, 4 * d)]
            # Residual, norm and modulation twice (4U each), and GELU on four times the width.
            passes += [4 * u, 4 * u, 8 * u]
    return Work(tuple(products), tuple(attention), tuple(passes))


def predict(work: Work, device: Device, dtype: torch.dtype) -> Prediction:
    """Seconds of a step on a device."""
    peak, bandwidth = device.peak(dtype), device.bandwidth * BANDWIDTH_SHARE
    per_tile = 2 * TILE**2 * device.multiprocessors / (peak * PRODUCT_SHARE)

    def product(m: int, n: int, k: int) -> float:
        waves = math.ceil(math.ceil(m / TILE) * math.ceil(n / TILE) / device.multiprocessors)
        moved = (m * k + k * n + m * n) * dtype.itemsize
        return max(waves * k * per_tile, moved / bandwidth)

    return Prediction(
        products=sum(product(*shape) for shape in work.products),
        attention=sum(flops / (peak * ATTENTION_SHARE) for flops in work.attention),
        passes=sum(moved / bandwidth for moved in work.passes),
        gaps=work.launches * GAP,
    )


def table(model: MiMDiTTransformer2DModel, name: str, sizes: Sequence[int], steps: int) -> str:
    """Markdown: a row for each size of picture and device."""
    lines = [
        f"| {name}, bf16 | device | step | products | attention | passes | gaps "
        f"| {steps} steps | share of peak |",
        "|" + "---|" * 9,
    ]
    for size in sizes:
        latents = (1, model.config["in_channels"], size // 8, size // 8)
        work = work_of(model, latents, model.config["prompt_tokens"])
        for device in DEVICES.values():
            p = predict(work, device, model.dtype)
            parts = " | ".join(
                f"{1e3 * s:.2f}" for s in (p.products, p.attention, p.passes, p.gaps)
            )
            share = work.flops / p.step / device.peak(model.dtype)
            lines.append(
                f"| {size}² | {device.name} | {1e3 * p.step:.2f} ms | {parts} "
                f"| {steps * p.step:.2f} s | {share:.0%} |"
            )
    return "\n".join(lines)


def conditioning_calls(
    layers: int, tokens: int, width: int
) -> Iterator[tuple[Any, list[Any], Any]]:
    """(op, arguments, options) of the mixtures' kernels, all layers at once, without data.

    One picture of a square of `tokens`; two of four experts of every group, as in the presets.
    """

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta", dtype=torch.bfloat16)

    side, bank = math.isqrt(tokens), 4 * layers
    index = torch.empty(layers, 2, device="meta", dtype=torch.int64)
    qkv = empty(layers, 2, tokens, 3 * width)
    x = [empty(layers, 2, tokens, width) for _ in range(3)]
    projections = [empty(bank, width, width) for _ in x]
    gates, picks = [empty(layers, 2) for _ in x], [index for _ in x]
    yield expert_linear, [empty(layers, tokens, width), empty(bank, 3 * width, width), index], {}
    yield expert_combine, [x, projections, picks, gates], {"residual": empty(layers, tokens, width)}
    windows = [qkv.view(layers, 2, side, side, -1), empty(bank, 225, width // 32)]
    yield window_attention, windows, {"window": 8, "heads": width // 32, "shift": 4, "index": index}
    channels = [*qkv.chunk(3, dim=-1), empty(bank, width // 64)]
    yield channel_attention, channels, {"heads": width // 64, "index": index}


def kernel_table(model: MiMDiTTransformer2DModel, size: int) -> str:
    """Markdown: a row for each kernel and device, compiled here. Raises as `explain` does."""
    lines = [
        "| device | kernel | tile | warps, stages | registers | shared memory | blocks "
        "(limited by) | waves | the op's floor |",
        "|" + "---|" * 9,
    ]
    shape = (len(model.transformer_blocks), (size // 16) ** 2, model.config["mim_dim"])
    for device in DEVICES.values():
        room = SHARED_MEMORY[device.architecture]
        for op, arguments, options in conditioning_calls(*shape):
            found = explain(op, *arguments, device=device.name, **options)
            for kernel in found.kernels:
                tile = " ".join(f"{name.lower()} {n}" for name, n in kernel.tile.items())
                shared = f"{kernel.shared / 1024:.0f} of {room / 1024:.0f} KiB {kernel.fault}"
                registers = "–" if kernel.registers is None else str(kernel.registers)
                lines.append(
                    f"| {device.name} | {found.op}: {kernel.name} | {tile} | {kernel.warps}, "
                    f"{kernel.stages} | {registers} | {shared.strip()} | {kernel.blocks} "
                    f"({kernel.limit}) | {kernel.waves:.1f} | {found.floor * 1e6:.0f} µs |"
                )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    sd35 = [name for name in PRESETS if name.startswith("sd35")]
    p = argparse.ArgumentParser(
        prog="python -m bench.predict", description=(__doc__ or "").split("\n")[0]
    )
    p.add_argument("--model", default="sd35-medium", choices=sd35)
    p.add_argument("--sizes", type=int, nargs="+", default=[512, 1024], help="multiples of 16")
    p.add_argument("--steps", type=int, default=40)
    compiled = "compile the conditioning's kernels, too (a minute or two)"
    p.add_argument("--kernels", action="store_true", help=compiled)
    args = p.parse_args(argv)
    multiples(p, args, "sizes", 16)
    at_least(p, args, steps=1)
    with torch.device("meta"):
        model = build(args.model, torch.bfloat16)
    print(table(model, args.model, args.sizes, args.steps))
    if args.kernels:
        print("", kernel_table(model, args.sizes[0]), sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
