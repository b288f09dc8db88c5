"""`channel_attention` in Triton's interpreter against its reference and Restormer's formula."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimdit.experts import ChannelExperts
from mimkernels import expert_depthwise3x3, expert_linear
from mimkernels.channel_attention import channel_attention, channel_attention_reference, products
from mimkernels.launch import record
from tests.kernels.common import (
    DEVICE,
    DTYPES,
    compare,
    interpreted,
    poisoned_memory,
    with_gradients,
)

INDEX = torch.tensor([[0, 2], [2, 1]], device=DEVICE)


def inputs(
    front: tuple[int, ...] = (2,),
    tokens: int = 37,
    heads: int = 2,
    head: int = 16,
    experts: int | None = None,
    proj: bool = False,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """q, k, v, three views of one tensor; temperature and, if wanted, proj, or banks of them."""
    g = torch.Generator().manual_seed(0)
    channels, bank = heads * head, () if experts is None else (experts,)
    qkv = torch.randn(*front, tokens, 3 * channels, generator=g).to(DEVICE, dtype)
    temperature = torch.rand(*bank, heads, generator=g) * 4 + 0.5
    weight = torch.randn(*bank, channels, channels, generator=g) * channels**-0.5
    some = [temperature, weight] if proj else [temperature]
    return [*qkv.chunk(3, dim=-1), *(v.to(DEVICE, dtype) for v in some)]


def both(heads: int, index: Tensor | None = None) -> list:
    """The op's kernel and its reference, as functions of q, k, v, temperature and maybe proj."""

    def op(*args: Tensor) -> Tensor:
        q, k, v, temperature, *proj = args
        kwargs = {"proj": proj[0] if proj else None, "index": index, "backend": "triton"}
        return channel_attention(q, k, v, temperature, heads=heads, **kwargs)

    def reference(*args: Tensor) -> Tensor:
        q, k, v, temperature, *proj = args
        weight = proj[0] if proj else None
        return channel_attention_reference(q, k, v, temperature, weight, index, heads=heads)

    return [op, reference]


def restormer(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, proj: Tensor) -> Tensor:
    """Eq. 1 of arXiv 2111.09881 as it stands there, channels first; temperature [heads]."""
    planes = (rearrange(x, "b t (h c) -> b h c t", h=len(temperature)) for x in (q, k, v))
    q, k, v = planes
    q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
    attention = (q @ k.transpose(-2, -1) * temperature[:, None, None]).softmax(dim=-1)
    out = rearrange(attention @ v, "b h c t -> b (h c) t 1")
    return F.conv2d(out, proj[:, :, None, None]).squeeze(-1).transpose(1, 2)


@pytest.mark.parametrize("banked", [False, True], ids=["plain", "banks of slots"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradients(
    banked: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    with poisoned_memory(monkeypatch):
        if banked:
            args = inputs((2, 2), heads=2, head=30, experts=3, proj=True, dtype=dtype)
            compare(*both(2, INDEX), args)
        else:
            compare(*both(2), inputs(tokens=130, head=48, dtype=dtype))


@interpreted
@settings(max_examples=15, deadline=None)
@given(
    front=st.sampled_from([(0,), (1,), (2,), (1, 0), (2, 1), (1, 2)]),
    tokens=st.sampled_from([0, 1, 2, 5, 16, 33]),
    heads=st.integers(1, 3),
    head=st.sampled_from([1, 3, 16, 30, 48, 64]),
    experts=st.sampled_from([None, 1, 3]),
    proj=st.booleans(),
)
def test_any_shape(
    front: tuple[int, ...], tokens: int, heads: int, head: int, experts: int | None, proj: bool
) -> None:
    args = inputs(front, tokens, heads, head, experts, proj, torch.float64)
    g = torch.Generator().manual_seed(1)
    index = None if experts is None else torch.randint(0, experts, front, generator=g)
    (found, grads), (wanted, oracle) = (with_gradients(f, args) for f in both(heads, index))
    for a, b in zip([found, *grads], [wanted, *oracle], strict=True):
        # Not relative: with one token or channel, softmax or norm leave no gradient but rounding.
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@interpreted
def test_gradcheck() -> None:
    leaves = [v.requires_grad_() for v in inputs((1,), 4, 1, 3, dtype=torch.float64)]
    assert torch.autograd.gradcheck(both(1)[0], leaves)
    args = inputs((2, 1), 3, 2, 2, 2, True, torch.float64)
    leaves = [v.requires_grad_() for v in args]
    # Along random directions: one by one these take half a minute.
    op = both(2, torch.tensor([[1], [0]]))[0]
    assert torch.autograd.gradcheck(op, leaves, fast_mode=True)


@interpreted
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_equals_restormer_s_formula(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # More tokens than one program takes, and more parts than are added at once.
    monkeypatch.setattr(products, "PROGRAMS", 6)
    args = inputs((1,), 380, 1, 16, proj=True)

    def op(q: Tensor, k: Tensor, v: Tensor, temperature: Tensor, proj: Tensor) -> Tensor:
        return channel_attention(q, k, v, temperature, heads=1, proj=proj, backend=backend)

    (found, grads), (wanted, oracle) = (with_gradients(f, args) for f in (op, restormer))
    for a, b in zip([found, *grads], [wanted, *oracle], strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


@interpreted
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_equals_the_channel_experts(backend: str) -> None:
    torch.manual_seed(0)
    bank = ChannelExperts(1, 3, dim=32, head_dim=16).requires_grad_(False)
    torch.nn.init.uniform_(bank.temperature, 0.5, 2)
    u, index, grid = torch.randn(2, 12, 32), INDEX.cpu(), (3, 4)
    _, wanted = bank(u, u, grid, index, torch.ones(2, 2), slice(None))
    qkv = expert_linear(u, bank.qkv_weight[0], index).unflatten(2, grid)
    qkv = expert_depthwise3x3(qkv, bank.dwconv_weight[0], index).flatten(2, 3)
    options = {"heads": 2, "index": index, "backend": backend}
    op = partial(channel_attention, *qkv.chunk(3, dim=-1), bank.temperature[0], **options)
    torch.testing.assert_close(op(), wanted.slots, rtol=0, atol=1e-5)
    projected = expert_linear(wanted.slots, wanted.weight, index)
    torch.testing.assert_close(op(proj=wanted.weight), projected, rtol=0, atol=1e-5)


@interpreted
def test_a_clamped_norm_is_a_constant() -> None:
    q, k, v, temperature = inputs((1,), 9, 2, 4, dtype=torch.float64)
    q, k = q.clone(), k.clone()
    q[0, :, 1], q[0, :, 5], k[0, :, 2] = 0.0, q[0, :, 5] * 1e-14, k[0, :, 2] * 1e-14
    args = [q, k, v, temperature]
    (found, grads), (wanted, oracle) = (with_gradients(f, args) for f in both(2))
    torch.testing.assert_close(found, wanted)
    # Channel by channel: gradients through a clamped norm are larger by eleven orders.
    columns = ([x for g in some[:2] for x in g.unbind(-1)] for some in (grads, oracle))
    for a, b in zip(*columns, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max()
    assert oracle[0][0, :, 1].abs().max() > 1e9 and oracle[1][0, :, 2].abs().max() > 1e9
    torch.testing.assert_close(grads[2:], oracle[2:])


def test_views_of_one_tensor_are_not_copied() -> None:
    q, k, v, temperature = inputs((2, 2), tokens=5)
    assert not q.is_contiguous() and q.data_ptr() != k.data_ptr()
    with record() as launches:
        channel_attention(q, k, v, temperature, heads=2, backend="triton")
    first, last = launches[0].arguments, launches[-1].arguments
    assert [x.data_ptr() for x in (*first[:2], last[0])] == [x.data_ptr() for x in (q, k, v)]
    assert first[0].stride() == q.stride()
    dense = [x.contiguous() for x in (q, k, v)]
    op, _ = both(2)
    assert torch.equal(op(q, k, v, temperature), op(*dense, temperature))


@interpreted
def test_expanded_input_and_gradient() -> None:
    q, k, v, temperature = inputs((2, 2), 5, dtype=torch.float64)
    q, v = q[:1, :1].expand_as(q), v[:, :, :1].expand_as(v)
    found, wanted = (
        torch.autograd.grad(f(*leaves, temperature).sum(), leaves)
        for f in both(2)
        for leaves in [[x.detach().requires_grad_() for x in (q, k, v)]]
    )
    torch.testing.assert_close(found, wanted)


def test_slots_equal_single_runs_and_runs_repeat() -> None:
    q, k, v, *banks = args = inputs((2, 2), 20, experts=3, proj=True)
    first, second = (with_gradients(both(2, INDEX)[0], args) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))
    for b, j in ((0, 1), (1, 0)):
        own = [bank[INDEX[b, j]] for bank in banks]
        one = both(2)[0](q[b, j][None], k[b, j][None], v[b, j][None], *own)
        assert torch.equal(first[0][b, j], one[0])


@interpreted
def test_an_expert_that_nobody_picked_gets_no_gradient() -> None:
    args = inputs((2, 1), 5, head=4, experts=3, proj=True, dtype=torch.float64)
    _, grads = with_gradients(both(2, torch.tensor([[2], [0]]))[0], args)
    for grad in grads[3:]:
        assert grad[[0, 2]].any(dim=-1).all() and not grad[1].any()


@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_not_a_number_stays_in_its_picture() -> None:
    q, k, v, *banks = inputs((2, 2), 5, experts=3, proj=True)
    q = q.clone()
    q[1, 1, 2, 3] = float("nan")
    out, grads = with_gradients(both(2, INDEX)[0], [q, k, v, *banks])
    assert out[1, 1].isnan().all(dim=-1).all() and out[:, 0].isfinite().all()
    # The slot picked the expert with number 1.
    for grad in grads[3:]:
        assert grad[1].isnan().any() and grad[[0, 2]].isfinite().all()


def test_operators_pass_opcheck() -> None:
    q, k, v, temperature, proj = inputs((1, 2), 3, head=4, experts=3, proj=True)
    forward = torch.ops.mimkernels.channel_attention.default
    backward = torch.ops.mimkernels.channel_attention_backward.default
    args = (q, k, v, temperature, proj, INDEX[:1])
    torch.library.opcheck(forward, (*args, 2))
    out, *saved = forward(*args, 2)
    torch.library.opcheck(backward, (out, *args, *saved, 2, True))


def test_compiles_without_graph_breaks() -> None:
    args = inputs((2, 2), 3, head=4, experts=3, proj=True)
    op, _ = both(2, INDEX)
    found, grads = with_gradients(torch.compile(op, fullgraph=True, backend="aot_eager"), args)
    eager, eager_grads = with_gradients(op, args)
    assert torch.equal(found, eager)
    assert all(torch.equal(a, b) for a, b in zip(grads, eager_grads, strict=True))


def test_autocast_takes_its_type_and_keeps_wide_sums() -> None:
    q, k, v, temperature, proj = inputs(proj=True)
    with torch.autocast(DEVICE, torch.bfloat16):
        found = channel_attention(q, k, v, temperature, heads=2, proj=proj, backend="torch")
    cast = [x.bfloat16() for x in (q, k, v)]
    wanted = channel_attention_reference(*cast, temperature, proj.bfloat16(), heads=2)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, wanted)


@interpreted
def test_bad_arguments() -> None:
    q, k, v, temperature, proj = inputs(proj=True)
    tau = temperature
    cases = [
        ((q[0], k, v, tau), {}, r"q: expected \[B,T,C\]"),
        ((q.int(), k, v, tau), {}, "q: expected a floating-point type"),
        ((q, k[:, 1:], v, tau), {}, "k: expected shape"),
        ((q, k, v.half(), tau), {}, "v: expected torch.float32 as q"),
        ((q, torch.randn(2, 32, 37).mT, v, tau), {}, "k: expected a last stride of 1"),
        ((q, k, v, tau), {"heads": 3}, "heads: expected a divisor of 32"),
        ((q, k, v, tau), {"heads": 0}, "heads: expected a divisor of 32"),
        (([torch.randn(1, 2, 130)] * 3 + [tau]), {}, "heads: expected heads of at most 64, got 65"),
        ((q, k, v, tau[:1]), {}, "temperature: expected shape"),
        ((q, k, v, tau.to("meta")), {}, "temperature: expected device cpu as q"),
        ((q, k, v, tau), {"proj": proj[1:]}, "proj: expected shape"),
        ((q, k, v, tau), {"proj": proj.double()}, "proj: expected torch.float32 as q"),
        ((q, k, v, tau), {"index": INDEX[0]}, r"temperature: expected shape \[any, 2\]"),
        ((q, k, v, tau[None]), {"index": INDEX}, "index: expected shape"),
        ((q, k, v, tau[None]), {"index": INDEX[0]}, "index: expected 0 to 0, got 0 to 2"),
        ((q, k, v, tau[None]), {"index": INDEX[0], "proj": proj}, "proj: expected shape"),
    ]
    for args, options, message in cases:
        with pytest.raises(ValueError, match=message):
            channel_attention(*args, **{"heads": 2, **options})
