"""`joint_qkv` in Triton's interpreter against its reference and diffusers."""

from functools import partial
from importlib import import_module
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimkernels.joint_qkv import joint_qkv, joint_qkv_, joint_qkv_reference
from tests.kernels.common import (
    DEVICE,
    DTYPES,
    compare,
    interpreted,
    poisoned_memory,
    with_gradients,
)

HEADS, WIDTH = 3, 20
# Tokens of each stream, and whether it has queries: image, conditioning, text.
STREAMS = ((19, True), (7, False), (40, True))


def inputs(
    streams: tuple[tuple[int, bool], ...] = STREAMS,
    pictures: int = 2,
    heads: int = HEADS,
    width: int = WIDTH,
    norm: bool = True,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """qkv of all streams, then with norms the weights of all queries and of all keys."""
    g = torch.Generator().manual_seed(0)
    qkvs = [
        torch.randn(pictures, tokens, (3 if queries else 2) * heads * width, generator=g)
        for tokens, queries in streams
    ]
    weights = [torch.rand(width, generator=g) + 0.5 for _ in range(2 * len(streams) * norm)]
    return [v.to(DEVICE, dtype) for v in (*qkvs, *weights)]


def split(count: int, flat: tuple[Tensor, ...]) -> list[list[Any]]:
    """qkvs, weights of q, weights of k; a stream without queries has none for them."""
    qkvs, weights = list(flat[:count]), list(flat[count:]) or [None] * (2 * count)
    return [qkvs, weights[:count], weights[count:]]


def joined(*flat: Tensor, count: int = 3, heads: int = HEADS, **options: Any) -> Tensor:
    out = joint_qkv(*split(count, flat), heads=heads, **{"backend": "triton", **options})
    return torch.cat(out, dim=2)


def reference(
    *flat: Tensor, count: int = 3, heads: int = HEADS, width: int = WIDTH, eps: float = 1e-6
) -> Tensor:
    # What is not used has a gradient of zero, which autograd would not give.
    unused = sum((v * 0).sum() for v in flat)
    out = torch.cat(joint_qkv_reference(*split(count, flat), heads, width, eps), dim=2)
    return out + unused


@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(
    dtype: torch.dtype, norm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with poisoned_memory(monkeypatch):
        compare(joined, reference, inputs(norm=norm, dtype=dtype))


def test_programs_that_sum_many_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    # Tiles of 64 tokens: two programs a head, of two tiles and of one.
    # By its module: the package's own name is the function's.
    monkeypatch.setattr(import_module("mimkernels.joint_qkv.kernel"), "_PROGRAMS", 12)
    streams = ((150, True), (140, False), (5, True))
    compare(joined, reference, inputs(streams))


def test_some_norms_and_four_streams() -> None:
    """Streams alike share a launch, others do not."""
    args = inputs(((5, True), (3, True), (4, False), (2, True)), dtype=torch.float32)
    present = (0, 1, 2, 3, 4, 5, 8, 10, 11)

    def both(op: Any, *flat: Tensor) -> Tensor:
        full = dict(zip(present, flat, strict=True))
        qkvs, q, k = ([full.get(4 * i + j) for j in range(4)] for i in range(3))
        if op is joint_qkv_reference:
            out = op(qkvs, q, k, HEADS, WIDTH)
        else:
            out = op(qkvs, q, k, heads=HEADS, backend="triton")
        return torch.cat(out, dim=2)

    runs = (partial(both, op) for op in (joint_qkv, joint_qkv_reference))
    compare(*runs, [args[i] for i in present])


@interpreted
@settings(max_examples=15, deadline=None)
@given(
    tokens=st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=3),
    pictures=st.integers(0, 2),
    heads=st.integers(1, 3),
    width=st.integers(1, 70),
    norm=st.booleans(),
)
def test_any_shape(
    tokens: list[tuple[int, bool]], pictures: int, heads: int, width: int, norm: bool
) -> None:
    # One stream at least has queries. With a large eps no gradient vanishes, however few channels.
    streams = ((tokens[0][0], True), *tokens[1:])
    options: dict[str, Any] = {"count": len(streams), "heads": heads, "eps": 0.125}
    runs = (partial(joined, **options), partial(reference, width=width, **options))
    compare(*runs, inputs(streams, pictures, heads, width, norm, torch.float64))


@interpreted
def test_gradcheck() -> None:
    args = inputs(((2, True), (1, True)), 1, 1, 2, dtype=torch.float64)
    leaves = [v.requires_grad_() for v in args]
    assert torch.autograd.gradcheck(partial(joined, count=2, heads=1), leaves)


@interpreted
@pytest.mark.parametrize("frozen", [(), (0,), range(3, 9)], ids=["none", "a stream", "weights"])
def test_strided_input_expanded_gradient_and_frozen_inputs(frozen: Any) -> None:
    image, condition, text, *weights = inputs(dtype=torch.float64)
    wide = torch.randn(19, 2, 300, dtype=torch.float64).transpose(0, 1)[..., 30:210]
    for v in (wide, text[:1, :19].expand(2, -1, -1), image[:, :1].expand(-1, 30, -1)):
        results = []
        for op in (joined, reference):
            args = enumerate([v, condition, text, *weights])
            leaves = [a.detach().requires_grad_(i not in frozen) for i, a in args]
            wanted = [leaf for leaf in leaves if leaf.requires_grad]
            results.append(torch.autograd.grad(op(*leaves).sum(), wanted))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_weights_may_have_another_type_and_serve_two_streams(backend: str) -> None:
    image, condition, text, weight, *_ = inputs()

    def run(weight: Tensor, *qkvs: Tensor) -> Tensor:
        weights = [weight] * 3
        return torch.cat(joint_qkv(qkvs, weights, weights, heads=HEADS, backend=backend), dim=2)

    halves = [v.half() for v in (image, condition, text)]
    out, grads = with_gradients(run, [weight, *halves])
    assert out.dtype == torch.float16
    assert [v.dtype for v in grads] == [torch.float32] + [torch.float16] * 3
    exact, exact_grads = with_gradients(run, [weight.double(), *(v.double() for v in halves)])
    for found, wanted in zip((out, *grads), (exact, *exact_grads), strict=True):
        assert (found - wanted).abs().max() <= 2e-3 * wanted.abs().max()


def test_a_batch_equals_its_single_runs_and_runs_repeat() -> None:
    *qkvs, a, b, c, d, e, f = inputs()
    weights = (a, b, c, d, e, f)
    both = joined(*qkvs, *weights)
    for i in (0, 1):
        one = joined(*(v[i : i + 1] for v in qkvs), *weights)
        assert torch.equal(one, both[i : i + 1])
    first, second = (with_gradients(joined, [*qkvs, *weights]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def buffers(layout: str = "dense") -> tuple[Tensor, Tensor, Tensor]:
    """For 19 + 40 rows with queries and 7 without, and spare ones."""
    sizes = {"q": 62, "k": 75, "v": 75}
    if layout == "dense":
        q, k, v = (torch.full((2, HEADS, n, WIDTH), 7.0, device=DEVICE) for n in sizes.values())
    else:
        shapes = ((n, 2, HEADS, 2 * WIDTH) for n in sizes.values())
        q, k, v = (
            torch.full(s, 7.0, device=DEVICE).permute(1, 2, 0, 3)[..., WIDTH:] for s in shapes
        )
    return q, k, v


@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("layout", ["dense", "strided"])
@pytest.mark.parametrize("norm", [True, False], ids=["norm", "no norm"])
def test_buffers_take_the_same_rows_and_keep_all_others(
    norm: bool, layout: str, backend: str
) -> None:
    qkvs, q_weights, k_weights = split(3, tuple(inputs(norm=norm)))
    run = partial(joint_qkv_, backend=backend)
    found, offsets = buffers(layout), (0, 66, 20)
    # Conditioning once, then the others, the second before the first.
    some = [1], [2, 0]
    for order in some:
        picked = ([v[i] for i in order] for v in (qkvs, q_weights, k_weights))
        assert run(found, *picked, offsets=[offsets[i] for i in order]) is None
    wanted = buffers()
    joint = joint_qkv(qkvs, q_weights, k_weights, heads=HEADS, backend=backend)
    starts = {True: (0, 19), False: (0, 19, 26)}
    for buffer, rows, queries in zip(wanted, joint, (True, False, False), strict=True):
        places = [i for i in range(3) if not queries or STREAMS[i][1]]
        for i, start in zip(places, starts[queries], strict=True):
            tokens = STREAMS[i][0]
            buffer[:, :, offsets[i] : offsets[i] + tokens] = rows[:, :, start : start + tokens]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    # Rows 19, 60 and 61, and those of k and v up to the conditioning's 66 to 72, and after.
    assert (found[0][:, :, [19, 60, 61]] == 7).all()
    assert (found[1][:, :, [19, *range(60, 66), 73, 74]] == 7).all()


def test_operators_pass_opcheck() -> None:
    qkvs, q, k = split(3, tuple(inputs()))
    ops = torch.ops.mimkernels
    torch.library.opcheck(ops.joint_qkv.default, (qkvs, q, [None] * 3, HEADS, WIDTH, 1e-6))
    grads = [v.clone() for v in joint_qkv(qkvs, q, k, heads=HEADS, backend="triton")]
    for with_weights in (True, False):
        args = (*grads, qkvs, q, k, 1e-6, with_weights)
        torch.library.opcheck(ops.joint_qkv_backward.default, args)
    torch.library.opcheck(ops.joint_qkv_.default, (*buffers(), qkvs, q, k, [0, 66, 20], 1e-6))


def test_compiles_without_graph_breaks() -> None:
    args = inputs()
    compiled = torch.compile(joined, fullgraph=True, backend="aot_eager")
    found, eager = with_gradients(compiled, args), with_gradients(joined, args)
    assert torch.equal(found[0], eager[0])
    assert all(torch.equal(a, b) for a, b in zip(found[1], eager[1], strict=True))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_buffer_form_compiles_without_graph_breaks(backend: str) -> None:
    qkvs, q_weights, k_weights = split(3, tuple(inputs()))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        options: dict[str, Any] = {"offsets": [0, 66, 20], "backend": backend}
        joint_qkv_((q, k, v), qkvs, q_weights, k_weights, **options)
        return F.scaled_dot_product_attention(q, k, v)

    found, wanted = buffers(), buffers()
    out = torch.compile(attend, fullgraph=True, backend="aot_eager")(*found)
    assert torch.equal(out, attend(*wanted))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


@interpreted
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize("qk_norm", ["rms_norm", None])
def test_equals_diffusers(
    qk_norm: str | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    attn = Attention(
        query_dim=32,
        added_kv_proj_dim=32,
        dim_head=16,
        heads=2,
        context_pre_only=False,
        qk_norm=qk_norm,
        eps=1e-6,
        processor=JointAttnProcessor2_0(),
    )
    norms = [attn.norm_q, attn.norm_added_q, attn.norm_k, attn.norm_added_k] if qk_norm else []
    weights = [torch.nn.init.uniform_(norm.weight, 0.5, 2) for norm in norms]
    seen: list[Tensor] = []
    attend = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        seen[:] = [q, k, v]
        return attend(q, k, v, **options)

    def theirs(image: Tensor, text: Tensor, *leaves: Tensor) -> Tensor:
        for norm, leaf in zip(norms, leaves, strict=True):
            del norm.weight
            norm.weight = leaf
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", watched)
            attn(image, encoder_hidden_states=text)
        return torch.cat(seen, dim=2)

    def ours(image: Tensor, text: Tensor, *leaves: Tensor) -> Tensor:
        qkvs = [
            torch.cat([project(x) for project in projections], dim=-1)
            for x, projections in (
                (image, (attn.to_q, attn.to_k, attn.to_v)),
                (text, (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)),
            )
        ]
        weights = (leaves[:2], leaves[2:]) if leaves else (None, None)
        return torch.cat(joint_qkv(qkvs, *weights, heads=2, backend=backend), dim=2)

    args = [torch.randn(2, 9, 32) * 2, torch.randn(2, 5, 32), *weights]
    found, wanted = with_gradients(ours, args), with_gradients(theirs, args)
    for a, b in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


class OnJointQKV:
    """What diffusers' joint attention processor does, with the op in its middle."""

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def __call__(
        self, attn: Any, image: Tensor, encoder_hidden_states: Tensor, attention_mask: Any = None
    ) -> tuple[Tensor, Tensor]:
        text = encoder_hidden_states
        own = torch.cat([attn.to_q(image), attn.to_k(image), attn.to_v(image)], dim=-1)
        added = (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
        q_weights = [attn.norm_q.weight, attn.norm_added_q.weight]
        k_weights = [attn.norm_k.weight, attn.norm_added_k.weight]
        qkv = joint_qkv(
            [own, torch.cat(added, dim=-1)], q_weights, k_weights,
            heads=attn.heads, backend=self.backend,
        )  # fmt: skip
        out = F.scaled_dot_product_attention(*qkv).transpose(1, 2).flatten(2)
        image, text = out[:, : image.shape[1]], out[:, image.shape[1] :]
        return attn.to_out[0](image), attn.to_add_out(text)


@interpreted
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_stands_in_for_diffusers_processor(backend: str) -> None:
    """Both outputs, and the gradients of the inputs and of all parameters."""
    torch.manual_seed(0)
    attn = Attention(
        query_dim=32, added_kv_proj_dim=32, dim_head=16, heads=2, context_pre_only=False,
        qk_norm="rms_norm", eps=1e-6, processor=JointAttnProcessor2_0(),
    )  # fmt: skip
    for norm in (attn.norm_q, attn.norm_k, attn.norm_added_q, attn.norm_added_k):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    args = [torch.randn(2, 9, 32) * 2, torch.randn(2, 5, 32)]
    parameters = list(attn.parameters())

    def results() -> list[Tensor]:
        leaves = [x.detach().requires_grad_() for x in args]
        out = attn(leaves[0], encoder_hidden_states=leaves[1])
        grads = torch.autograd.grad(out, [*leaves, *parameters], [x.detach() for x in out])
        return [*out, *grads]

    wanted = results()
    attn.set_processor(OnJointQKV(backend))
    for a, b in zip(results(), wanted, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@interpreted
def test_bad_arguments() -> None:
    qkvs, q, k = split(3, tuple(inputs()))
    image, _, text = qkvs
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        (([],), {}, "qkvs: expected at least one stream"),
        (([image[0]],), {}, r"qkvs\[0\]: expected shape"),
        ((qkvs,), {"heads": 7}, "heads: expected a divisor of 180 / 3"),
        ((qkvs,), {"heads": 0}, "heads: expected a divisor of 180 / 3"),
        (([image, text[..., 1:]],), {}, r"qkvs\[1\]: expected 180 channels .* got 179"),
        (([image, text[:1]],), {}, r"qkvs\[1\]: expected shape \[2, any, any\]"),
        (([image, text.double()],), {}, r"qkvs\[1\]: expected torch.float32 as qkvs\[0\]"),
        (([image.mT.contiguous().mT],), {}, r"qkvs\[0\]: expected a last stride of 1"),
        ((qkvs, q[:2]), {}, "q_norm_weights: expected 3 as qkvs, got 2"),
        ((qkvs, q, [*k[:2], k[2][1:]]), {}, r"k_norm_weights\[2\]: expected shape \[20\]"),
        ((qkvs, [v.int() for v in q]), {}, r"q_norm_weights\[0\]: expected a floating"),
        ((qkvs,), {"eps": 0.0}, "eps: expected a positive number"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            joint_qkv(*args, **{"heads": HEADS, **options})


@interpreted
def test_bad_buffers() -> None:
    qkvs, q_weights, k_weights = split(3, tuple(inputs()))
    good, (q, k, v) = (qkvs, q_weights, k_weights), buffers()
    cases: list[tuple[tuple[Any, ...], tuple[Any, ...], Any, str]] = [
        ((q, k[0], v), good, (0, 66, 20), r"k: expected shape"),
        ((q, k, v[:, 1:]), good, (0, 66, 20), r"v: expected shape \[2, 3, 75, 20\]"),
        ((q, k, v.double()), good, (0, 66, 20), r"v: expected torch.float32 as qkvs\[0\]"),
        ((q[:1], k, v), good, (0, 66, 20), r"q: expected shape \[2, 3, any, 20\]"),
        ((q, k, v), good, (0, 66), "offsets: expected 3 as qkvs, got 2"),
        ((q, k, v), good, (0, 66, 18), r"offsets\[2\]: expected 19 or more, got 18"),
        ((q, k, v), good, (-1, 66, 20), r"offsets\[0\]: expected 0 or more, got -1"),
        ((q, k, v), good, (0, 69, 20), r"qkvs\[1\]: expected to end at row 75 or before, got 76"),
        ((q, k, v), good, (0, 66, 23), r"qkvs\[2\]: expected to end at row 62 or before, got 63"),
        ((q, k, v), ([qkvs[0][:1]],), (0,), r"qkvs\[0\]: expected shape \[2, any, any\]"),
    ]
    for some, args, offsets, message in cases:
        with pytest.raises(ValueError, match=message):
            joint_qkv_(some, *args, offsets=offsets)
    leaf = qkvs[0].clone().requires_grad_()
    with pytest.raises(ValueError, match="expected no gradients"):
        joint_qkv_((q, k, v), [leaf], offsets=[0])
    with torch.no_grad():
        joint_qkv_((q, k, v), [leaf], offsets=[0])
