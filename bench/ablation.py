"""What each of the engine's transformations is worth: `python -m bench.ablation`.

They are switched off one at a time, interleaved in one process, and every variant must still
compute what the reference does. One JSON line a row, and a table. The model is a preset with random
weights whose modulations do not depend on the picture, so that all transformations apply.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench import machine, measure
from bench.arguments import at_least, loading, multiples, parser
from bench.inputs import make_inputs, unit_of
from bench.latency import TOLERANCE
from bench.latency_times import failed, percentiles
from bench.rows import Row, RowFile
from bench.variants import Variant, reference, with_engine
from export.checks import relative_error
from mimdit.engine import Engine
from mimdit.engine.step import Block, Joint
from mimdit.loading import PRECISIONS, assemble
from mimdit.presets import PRESETS, build
from mimdit.transformer import MiMDiTTransformer2DModel
from mimkernels import joint_qkv, use_backend


class _Tokens(Block):
    """Keeps the tokens of the condition that was encoded last, where a graph found the first."""

    tokens: Tensor | None = None

    def keys_and_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        if self.tokens is None or self.tokens.shape != tokens.shape:
            self.tokens = tokens.clone()
        self.tokens.copy_(tokens)
        return super().keys_and_values(tokens)


class WithoutKeysOnce(_Tokens):
    """Keys and values of the conditioning tokens anew in every step."""

    def attend(self, image: Tensor, text: Tensor, joint: Joint) -> tuple[Tensor, Tensor | None]:
        assert self.tokens is not None
        start = image.shape[1] + text.shape[1]
        for buffer, part in zip(joint[1:], super().keys_and_values(self.tokens), strict=True):
            buffer[:, :, start:] = part
        return super().attend(image, text, joint)


class WithDeadQueries(_Tokens):
    """Queries and outputs of the conditioning tokens, too, which nothing reads."""

    def attend(self, image: Tensor, text: Tensor, joint: Joint) -> tuple[Tensor, Tensor | None]:
        attn = self.attn
        assert self.tokens is not None
        q = attn.to_q(self.tokens).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
        q = q if attn.norm_q is None else attn.norm_q(q)
        out = F.scaled_dot_product_attention(q, *joint[1:])
        attn.to_out[0](out.transpose(1, 2).flatten(2))
        return super().attend(image, text, joint)


class WithoutBuffers(Block):
    """Concatenated keys and values instead of rows in a buffer."""

    def attend(self, image: Tensor, text: Tensor, joint: Joint) -> tuple[Tensor, Tensor | None]:
        attn, tokens = self.attn, image.shape[1]
        start = tokens + text.shape[1]
        weights = [
            [None if norm is None else norm.weight for norm in norms]
            for norms in ((attn.norm_q, attn.norm_added_q), (attn.norm_k, attn.norm_added_k))
        ]
        streams = [self.image_qkv(image), self.text_qkv(text)]
        q, *own = joint_qkv(streams, *weights, heads=attn.heads)
        k, v = (torch.cat([x, y[:, :, start:]], 2) for x, y in zip(own, joint[1:], strict=True))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        words = None if self.text_out is None else self.text_out(out[:, tokens:])
        return self.image_out(out[:, :tokens]), words


def one_by_one(layers: Sequence[nn.Module]) -> Callable[[Tensor], Tensor]:
    """A product for each layer."""
    return lambda x: torch.cat([layer(x) for layer in layers], dim=-1)


def _engine(model: MiMDiTTransformer2DModel, name: str, **settings: Any) -> Variant:
    kind = type("Ablated", (Engine,), settings)
    return with_engine(name, model, kind(model))


def _inside(variant: Variant, context: Callable[[], AbstractContextManager[Any]]) -> Variant:
    def through(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any) -> Any:
            with context():
                return call(*arguments)

        return run

    return replace(variant, encode=through(variant.encode), step=through(variant.step))


@contextmanager
def layer_by_layer(model: MiMDiTTransformer2DModel) -> Iterator[None]:
    """The mixtures of every block for themselves."""
    mim = model.mim
    # Shadows the method.
    mim.__dict__["chunks"] = lambda _: [slice(i, i + 1) for i in range(mim.layers)]
    try:
        yield
    finally:
        del mim.__dict__["chunks"]


def ablations(model: MiMDiTTransformer2DModel, like: Tensor) -> tuple[list[Variant], list[str]]:
    """The engine, the engine without one transformation each, and the reference; and a line for
    each that does not apply here."""
    whole = _engine(model, "engine")
    found = [
        whole,
        replace(_engine(model, "conditioning in every step"), cached=False),
        _engine(model, "keys and values block by block", together=False),
        _engine(model, "keys and values in every step", block=WithoutKeysOnce, together=False),
        _engine(model, "queries of conditioning tokens", block=WithDeadQueries, together=False),
        _engine(model, "concatenation, no joint buffers", block=WithoutBuffers),
        replace(_engine(model, "no table of modulations"), sampling=lambda _: nullcontext()),
        _inside(_engine(model, "mixtures layer by layer"), lambda: layer_by_layer(model)),
        _engine(model, "q, k and v one by one", join=staticmethod(one_by_one)),
    ]
    left = []
    if model.device.type == "cuda":
        found.append(_inside(_engine(model, "no fused kernels"), lambda: use_backend("torch")))
        found.append(with_engine("no CUDA graph", model, Engine(model, graph=False)))
        for kind in ("CUDNN_ATTENTION", "FLASH_ATTENTION", "EFFICIENT_ATTENTION"):
            name = f"{kind.split('_')[0].lower()} attention alone"
            chosen = partial(sdpa_kernel, getattr(SDPBackend, kind))
            found.append(_inside(_engine(model, name), chosen))
    else:
        left = [f"{name}: left out, it needs a GPU" for name in ("fused kernels", "CUDA graph")]
    return [*found, reference(model, like)], left


@torch.no_grad()
def run(
    model: MiMDiTTransformer2DModel,
    label: str,
    size: int,
    steps: int,
    runs: int,
    warmup: int,
    seconds: float = math.inf,
    save: Callable[[Sequence[Row]], None] = lambda _: None,
) -> tuple[list[Row], list[str]]:
    """Rows, without times where parity fails; and what does not apply.

    seconds, save: as of `bench.latency.run`.
    """
    given = make_inputs(assemble(model), size, 1)
    device, seen = given.x.device, given.seen.to(model.dtype)
    variants, left = ablations(model, given.z)
    judge = variants[-1]
    wanted = judge.step(seen, given.t, judge.encode(given.z))
    fixed = {
        "bench": "ablation",
        "model": label,
        "dtype": str(model.dtype).removeprefix("torch."),
        "height": size,
        "width": size,
        "batch": 1,
        "steps": steps,
    } | machine.environment(device)
    until = time.perf_counter() + seconds
    rows: dict[str, Row] = {}
    for v in variants:
        row = rows[v.name] = fixed | {"variant": v.name, "rel_err": None, "parity": None}
        try:
            with v.sampling(given.t):
                relative = relative_error(v.step(seen, given.t, v.encode(given.z)), wanted)
            row |= {"rel_err": relative, "parity": relative <= TOLERANCE[model.dtype]}
        # Whatever stops a variant must not stop the others.
        except Exception as fault:
            failed(row, fault)
        save(list(rows.values()))
    calls = {
        v.name: lambda v=v: v.picture(model, given.x, given.z, steps)
        for v in variants
        if rows[v.name]["parity"]
    }

    def keep(times: dict[str, list[float]]) -> None:
        turn = max(map(len, times.values()), default=0)
        state = machine.gpu_state(device) if turn % 10 == 1 else {}
        for name, found in times.items():
            rows[name] |= percentiles("picture", found, 1) | {"runs": len(found)} | state
        save(list(rows.values()))

    faults: dict[str, Exception] = {}
    measure.interleaved(calls, device, warmup, runs, until=until, after=keep, faults=faults)
    for name, fault in faults.items():
        failed(rows[name], fault)
    save(list(rows.values()))
    return list(rows.values()), left


def table(rows: Sequence[Row]) -> str:
    """Markdown: what a picture takes without each transformation."""
    whole = next((r["picture_p50_s"] for r in rows if r["variant"] == "engine" and r["parity"]), 0)
    lines = ["| off | picture | × engine | rel. error |", "|---|---|---|---|"]
    for row in rows:
        name = row["variant"]
        if not row["parity"]:
            error = "" if row["rel_err"] is None else f"{row['rel_err']:.1e}"
            lines.append(f"| {name} | no speed: {row.get('reason', 'differs')} | | {error} |")
            continue
        seconds = row["picture_p50_s"]
        ratio = f"{seconds / whole:.2f}" if whole else "–"
        lines.append(f"| {name} | {seconds:.3f} s | {ratio} | {row['rel_err']:.1e} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    gpu = torch.cuda.is_available()
    p = parser("ablation", __doc__, list(PRESETS))
    p.add_argument("--size", type=int, default=512 if gpu else 256, help="pixels")
    p.add_argument("--steps", type=int, default=40, help="of a picture (default 40)")
    p.add_argument("--runs", type=int, default=30 if gpu else 5)
    p.add_argument("--warmup", type=int, default=10 if gpu else 1)
    enough = "after which only three runs of each variant are taken (default: no limit)"
    p.add_argument("--seconds", type=float, default=math.inf, help=enough)
    args = p.parse_args(argv)
    at_least(p, args, steps=1, runs=1, warmup=0)
    with loading(p, args), torch.device(args.device):
        model = build(args.model, PRECISIONS[args.precision], pooled_condition=False)
    model = model.randomize_(0).requires_grad_(False).eval()
    multiples(p, args, "size", unit_of(assemble(model)))
    sizes = (args.size, args.steps, args.runs, args.warmup)
    rows, left = run(model, args.model, *sizes, args.seconds, RowFile(args.out).write)
    print("\n".join([*left, table(rows), f"rows in {args.out}"]))
    return 1 if any(row["parity"] is False for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
