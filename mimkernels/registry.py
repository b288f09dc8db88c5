"""Registration of kernels as torch operators."""

from collections.abc import Callable
from typing import Any

import torch

_LIBRARY = torch.library.Library("mimkernels", "FRAGMENT")


def kernel_op(schema: str, launch: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define `torch.ops.mimkernels.<name>` by its schema and return it.

    launch: runs the kernel, on CUDA tensors or, in Triton's interpreter, on CPU tensors.
    fake: outputs of the right shape, stride and type, without data. Gradients are not registered:
    an `autograd.Function` on top calls the forward and the backward operator.
    """
    name = schema.split("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device in ("CUDA", "CPU"):
        _LIBRARY.impl(name, launch, device)
    torch.library.register_fake(f"mimkernels::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.mimkernels, name).default
