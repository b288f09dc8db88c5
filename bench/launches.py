"""How many kernels a step launches, counted without a GPU: `python -m bench.launches`.

The model runs on tensors without data. Kernels of this package are counted where they are launched;
of torch's operators each that is neither a view nor an allocation counts as one, and so does an
attention, which is one kernel of cuDNN or flash attention. Products that a library splits in two
are not known.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from bench.arguments import at_least, multiples
from bench.variants import variants_of
from mimdit.presets import PRESETS, build
from mimdit.transformer import MiMDiTTransformer2DModel
from mimkernels.explain import recorded

# Operators that neither are views nor launch anything.
_FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach"}
_FREE |= {"alias", "_unsafe_view", "_reshape_alias", "lift_fresh", "promote_types"}


class _Operators(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace == "aten" and not func.is_view and name not in _FREE:
            self.found[name] += 1
        return out


class _Attention(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.scaled_dot_product_attention:
            self.found["attention"] += 1
            pictures, heads, tokens, width = args[0].shape
            # Fused attention lays its result out as the projection reads it: heads inside tokens.
            return args[0].new_empty(pictures, tokens, heads, width).transpose(1, 2)
        return func(*args, **(kwargs or {}))


def count(run: Callable[[], Any]) -> Counter[str]:
    """Launches of a call on tensors without data, by name."""
    found: Counter[str] = Counter()
    with torch.no_grad(), _Operators(found), _Attention(found), recorded("sm_90") as launches:
        run()
    found.update(launch.kernel.__name__ for launch in launches)
    return found


def launches_of(
    model: MiMDiTTransformer2DModel, size: tuple[int, int], batch: int, names: Sequence[str]
) -> dict[str, dict[str, Counter[str]]]:
    """Of each variant, launches of the "condition", the "first step" and every other "step".

    model: on the device "meta". size: of the latents. The step of the literal reference encodes its
    condition anew. Launches of the engine are those that its graph replays at once.
    """
    options = {"device": "meta", "dtype": model.dtype}
    x, z = (torch.empty(batch, model.config["in_channels"], *size, **options) for _ in range(2))
    t = torch.empty(batch, **options)
    found = {}
    for variant in variants_of(model, x, names)[0]:
        held: list[Any] = []

        def encode(variant: Any = variant, held: list[Any] = held) -> None:
            held.append(variant.encode(z))

        def step(variant: Any = variant, held: list[Any] = held) -> Tensor:
            return variant.step(x, t, held[0] if variant.cached else variant.encode(z))

        condition = count(encode)
        with torch.no_grad(), variant.sampling(torch.empty(40, device="meta")):
            # The first step of a picture also places keys and values of the conditioning.
            first = count(step)
            found[variant.name] = {"condition": condition, "first step": first, "step": count(step)}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m bench.launches", description=__doc__)
    p.add_argument("--model", default="sd35-medium", choices=list(PRESETS))
    p.add_argument("--size", type=int, default=64, help="of the latents (default 64)")
    p.add_argument("--batch", type=int, default=1)
    args = p.parse_args(argv)
    at_least(p, args, batch=1)
    multiples(p, args, "size", PRESETS[args.model]["patch_size"], "latents")
    with torch.device("meta"):
        model = build(args.model, torch.bfloat16).eval()
    names = ["reference", "reference-cached", "engine-no-graph", "backbone-eager"]
    rows = launches_of(model, (args.size, args.size), args.batch, names)
    print("| variant | conditioning | first step | a step | most frequent in a step |")
    print("|---|---|---|---|---|")
    for name, parts in rows.items():
        often = ", ".join(f"{kind} {n}" for kind, n in parts["step"].most_common(5))
        totals = " | ".join(str(part.total()) for part in parts.values())
        print(f"| {name} | {totals} | {often} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
