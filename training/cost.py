"""What a training step costs, from the cost model: `python -m training.cost`.

FLOPs are counted as torch runs the step on tensors without data; times are those at the published
peak of a GPU times an assumed share of it, and no measurement.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from mimdit.presets import PRESETS, build
from mimdit.transformer import MiMDiTTransformer2DModel
from mimkernels.backend import use_backend
from mimkernels.devices import DEVICES, find_device
from training.step import FlowStep


@dataclass(frozen=True)
class StepCost:
    """Of one picture: FLOPs of forward and backward. Of the model, in bytes: weights, gradients,
    Adam's states and averages."""

    flops: int
    memory: int

    def seconds(self, pictures: int, device: str, share: float) -> float:
        """Of so many pictures on one GPU that reaches a share of its bfloat16 peak."""
        peak = find_device(device).peak(torch.bfloat16)
        return self.flops * pictures / (share * peak)


def step_cost(
    model: MiMDiTTransformer2DModel, latent: tuple[int, int], frozen: bool, checkpointing: bool
) -> StepCost:
    """The cost for latents of height and width `latent`; inside `FakeTensorMode` the model's
    tensors need no data.

    frozen: only the mixtures are trained. checkpointing: blocks are computed twice.
    """
    model.requires_grad_(not frozen)
    model.mim.requires_grad_(True)
    if checkpointing:
        model.enable_gradient_checkpointing()
    step = FlowStep(model, 0.0, False, lambda share: share).train()
    shape = (1, model.config["in_channels"], *latent)
    x0, z_lq, noise = (torch.empty(shape) for _ in range(3))
    t = torch.empty(1)
    # The references are made of operations that the counter knows.
    with use_backend("torch"), FlopCounterMode(display=False) as counter:
        step(x0, z_lq, t, noise, 0, 0)[0].backward()
    counts = dict(counter.get_flop_counts()["Global"])
    convolution, backward = torch.ops.aten.convolution, torch.ops.aten.convolution_backward
    # Torch counts the gradients of depthwise convolutions as if they were dense; they take twice
    # what the forward pass does.
    counts[backward] = 2 * counts.get(convolution, 0)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    rest = sum(p.numel() for p in model.parameters()) - trained
    # Trained: weight, gradient, two moments and the average in float32; the rest in bfloat16.
    return StepCost(sum(counts.values()), 20 * trained + 2 * rest)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m training.cost", description=__doc__)
    p.add_argument("--model", default="sd35-medium", choices=list(PRESETS))
    p.add_argument("--crop", type=int, default=512, help="pixels a side")
    p.add_argument("--batch", type=int, default=128, help="pictures a step")
    p.add_argument("--steps", type=int, default=100_000)
    p.add_argument("--share", type=float, default=0.35, help="of the peak that is reached")
    p.add_argument("--train-backbone", action="store_true")
    args = p.parse_args(argv)
    factor = 8 if "sd35" in args.model else 4
    unit = factor * PRESETS[args.model]["patch_size"]
    if args.crop < 1 or args.crop % unit:
        p.error(f"--crop: expected a multiple of {unit} pixels, got {args.crop}")
    if not 0 < args.share <= 1:
        p.error(f"--share: expected above 0, to 1, got {args.share:g}")
    side = args.crop // factor
    with FakeTensorMode():
        model = build(args.model)
        cost = step_cost(model, (side, side), not args.train_backbone, checkpointing=True)
    print(
        f"{args.model} at {args.crop}×{args.crop}: {cost.flops / 1e12:.2f} TFLOP a picture, "
        f"{cost.memory / 1e9:.1f} GB of weights and states; {args.steps} steps of {args.batch} "
        f"pictures at {args.share:.0%} of the bfloat16 peak:"
    )
    for name in DEVICES:
        seconds = cost.seconds(args.batch, name, args.share)
        print(
            f"  {name}: {seconds:.2f} s a step, {seconds * args.steps / 86400:.1f} days of one GPU"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
