"""Cases of the fused pieces of an MM-DiT block; their references are what diffusers computes."""

from functools import partial
from typing import Any

from torch import Tensor

from bench.kernel_cases.base import Case, Draw, Size, liger
from mimkernels import gated_residual_layernorm_modulate, joint_qkv, layernorm_modulate
from mimkernels.costs import cost

# Tokens of the text stream beside the image's.
_TEXT = 333


def layernorm_modulate_case(size: Size, draw: Draw) -> Case:
    """Both modulations of a dual-attention block."""
    x = draw(size.pictures, size.tokens, size.channels)
    tensors = [x, *(draw(size.pictures, size.channels) for _ in range(4))]
    return _case("layernorm_modulate", layernorm_modulate, size, tensors)


def gated_residual_layernorm_modulate_case(size: Size, draw: Draw) -> Case:
    """After attention, before the MLP."""
    rows = [draw(size.pictures, size.tokens, size.channels) for _ in range(2)]
    vectors = [draw(size.pictures, size.channels) for _ in range(3)]
    name = "gated_residual_layernorm_modulate"
    return _case(name, gated_residual_layernorm_modulate, size, [*rows, *vectors])


def joint_qkv_case(size: Size, draw: Draw) -> Case:
    """Image and text, both with qk norm; heads of 64 channels where the width has them."""
    heads = max(size.channels // 64, 1)
    lengths = (size.tokens, min(_TEXT, size.tokens))
    streams = [draw(size.pictures, n, 3 * size.channels) for n in lengths]
    norms = [draw(size.channels // heads) for _ in range(4)]

    def call(image: Tensor, text: Tensor, *norms: Tensor, backend: str) -> Any:
        q_norms, k_norms = norms[:2], norms[2:]
        return joint_qkv([image, text], q_norms, k_norms, heads=heads, backend=backend)

    return Case(
        "joint_qkv",
        size,
        [*streams, *norms],
        partial(call, backend="triton"),
        partial(call, backend="torch"),
        {"liger": liger()},
        cost(joint_qkv, streams, norms[:2], norms[2:], heads=heads),
    )


def _case(name: str, op: Any, size: Size, tensors: list[Tensor]) -> Case:
    ours, reference = (partial(op, backend=backend) for backend in ("triton", "torch"))
    return Case(name, size, tensors, ours, reference, {"liger": liger()}, cost(op, *tensors))
