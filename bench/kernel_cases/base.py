"""What a benchmark case is, and what all of them share."""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mimkernels.costs import Costs

# Largest error allowed, relative to the largest value of the float64 reference.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
# A call on the case's tensors, or why there is none.
Variant = Callable[..., Any] | str
Draw = Callable[..., Tensor]


@dataclass(frozen=True)
class Size:
    """Tokens T and channels C of each of B pictures, which picks k of E experts, in L layers.

    Layers are independent of each other, with experts of their own: a call takes all of them.
    """

    tokens: int
    channels: int
    experts: int = 4
    slots: int = 2
    layers: int = 1
    pictures: int = 1


FULL = tuple(Size(tokens, channels) for tokens in (1024, 4096) for channels in (384, 1536))
# Grids of 64×64 and 128×128: of one block, which takes little longer than a launch, and of all
# blocks at once, whose traffic takes an H200 30 µs and more.
GRIDS = tuple(Size(tokens, 384, layers=n) for n in (1, 24) for tokens in (4096, 16384))
# The blocks of a transformer follow each other: what is large here is the batch.
BATCHES = tuple(Size(tokens, 384, pictures=24) for tokens in (4096, 16384))
# For checks on a CPU: no size that a tile divides, and more than one picture.
SMALL = tuple(Size(t, c, layers=2, pictures=2) for t, c in ((12, 16), (20, 40)))


@dataclass(frozen=True)
class Case:
    """An op at one size. kernel, reference and comparators are called with `tensors`."""

    op: str
    size: Size
    tensors: list[Tensor]
    kernel: Callable[..., Any]
    reference: Callable[..., Any]
    comparators: dict[str, Variant]
    costs: Costs


def picks(size: Size, draw: Draw, layers: int = 1) -> tuple[Tensor, list[list[int]]]:
    """Different experts for each picture [L·B,k], also as numbers that the host knows.

    Pictures of layer l have the numbers l·E to l·E + E − 1 of a bank of L·E experts.
    """
    scores = draw(layers, size.pictures, size.experts).float()
    index = scores.argsort(dim=-1, stable=True)[..., : size.slots]
    first = torch.arange(layers, device=index.device) * size.experts
    index = (index + first[:, None, None]).flatten(0, 1).contiguous()
    return index, index.tolist()


def grid_of(tokens: int) -> tuple[int, int]:
    """Height and width of the squarest plane of so many tokens."""
    height = next(n for n in range(isqrt(tokens), 0, -1) if tokens % n == 0)
    return height, tokens // height


def compiled(run: Callable[..., Any], x: Tensor) -> Callable[..., Any]:
    """`run`, compiled as a whole for the device of x."""
    # On a CPU only whether it is traced into one graph: code generation takes long.
    compiler = "inductor" if x.device.type == "cuda" else "aot_eager"
    return torch.compile(run, fullgraph=True, dynamic=False, backend=compiler)


def liger() -> str:
    return "has no such op" if find_spec("liger_kernel") else "not installed"


def where_grouped(run: Callable[..., Any], x: Tensor) -> Variant:
    """`run`, or why `grouped_mm` is not compared."""
    if x.device.type == "cpu":
        return run
    if x.dtype != torch.bfloat16:
        return "takes bfloat16 only"
    fast = torch.cuda.get_device_capability(x.device) in ((9, 0), (10, 0))
    return run if fast else "asks the host for the offsets except on sm_90 and sm_100"


def grouped_product(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
    """x [B,1,T,K] or [B,k,T,K], weight [E,N,K], index [B,k] → [B,k,T,N] with one grouped product.

    Slots are put in the order of their experts and back on the device.
    """
    slots, tokens = index.shape[1], x.shape[2]
    experts = torch.arange(len(weight), device=index.device)
    counts = (index.flatten()[:, None] == experts).sum(0)
    order = index.flatten().argsort(stable=True)
    source = order if x.shape[1] == slots else order // slots
    rows = x.flatten(0, 1).index_select(0, source).flatten(0, 1)  # [B·k·T,K]
    ends = (counts.cumsum(0) * tokens).int()
    y = F.grouped_mm(rows, weight.transpose(1, 2), offs=ends).unflatten(0, (-1, tokens))
    return y.index_select(0, order.argsort()).unflatten(0, index.shape)
