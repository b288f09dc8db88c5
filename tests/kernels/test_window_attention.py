"""`window_attention` in Triton's interpreter against its reference and against others' Swin."""

import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mimkernels.window_attention import window_attention, window_attention_reference
from tests.kernels.common import (
    DEVICE,
    DTYPES,
    compare,
    interpreted,
    poisoned_memory,
    with_gradients,
)

EXPERTS = 3
BACKENDS = ("triton", "torch")


def inputs(
    front: tuple[int, ...] = (1, 2),
    grid: tuple[int, int] = (6, 9),
    window: int = 4,
    heads: int = 2,
    head: int = 6,
    bank: bool = True,
    pad: str = "masked",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> list[Tensor]:
    """qkv, table, then index of a bank and the padding's values, as far as there are any."""
    g = torch.Generator().manual_seed(seed)
    experts = (EXPERTS,) if bank else ()
    args = [
        torch.randn(*front, *grid, 3 * heads * head, generator=g),
        torch.randn(*experts, (2 * window - 1) ** 2, heads, generator=g),
    ]
    if bank:
        args.append(torch.randint(0, EXPERTS, front, generator=g))
    if pad != "masked":
        own = experts if pad == "of each expert" else ()
        args.append(torch.randn(*own, 3 * heads * head, generator=g))
    return [v.to(DEVICE, dtype if v.is_floating_point() else None) for v in args]


def pair(
    window: int = 4,
    shift: tuple[int, int] = (2, 2),
    heads: int = 2,
    bank: bool = True,
    pad: str = "masked",
    roll_first: bool = False,
    scale: float | None = None,
) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The kernel and the reference as functions of what `inputs` returns."""
    options: dict[str, Any] = {"window": window, "shift": shift, "heads": heads}
    options |= {"roll_first": roll_first, "scale": scale}

    def named(rest: tuple[Tensor, ...]) -> dict[str, Tensor | None]:
        index = rest[0] if bank else None
        return {"index": index, "pad_value": None if pad == "masked" else rest[-1]}

    return (
        lambda x, t, *rest: window_attention(x, t, **named(rest), **options, backend="triton"),
        lambda x, t, *rest: window_attention_reference(x, t, **named(rest), **options),
    )


CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "slots of a bank": ({"grid": (5, 6)}, {}),
    "one table, shift of columns": (
        {"front": (2,), "bank": False, "grid": (4, 9)},
        {"bank": False, "shift": (0, 1), "scale": -0.3},
    ),
    "padding of each expert": (
        {"pad": "of each expert", "grid": (3, 7)},
        {"pad": "of each expert", "shift": (1, 3)},
    ),
    "roll first, one padding": (
        {"pad": "shared", "grid": (5, 3)},
        {"pad": "shared", "roll_first": True},
    ),
    "several tiles": (
        {"front": (1,), "grid": (8, 9), "window": 9, "heads": 1, "head": 30},
        {"window": 9, "shift": (4, 4), "heads": 1},
    ),
    "several tiles, padding": (
        {"front": (1,), "grid": (9, 8), "window": 9, "heads": 1, "pad": "shared"},
        {"window": 9, "shift": (4, 0), "heads": 1, "pad": "shared"},
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_forward_and_gradients(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, options = CASES[case]
    with poisoned_memory(monkeypatch):
        compare(*pair(**options), inputs(**made, dtype=dtype))


@interpreted
@settings(max_examples=7, deadline=None)
@given(
    front=st.sampled_from([(0,), (2,), (1, 2), (2, 1)]),
    grid=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    window=st.integers(2, 5),
    heads=st.integers(1, 2),
    head=st.integers(1, 30),
    bank=st.booleans(),
    pad=st.sampled_from(["masked", "shared"]),
    roll_first=st.booleans(),
    data=st.data(),
)
def test_any_shape(
    front: tuple[int, ...],
    grid: tuple[int, int],
    window: int,
    heads: int,
    head: int,
    bank: bool,
    pad: str,
    roll_first: bool,
    data: st.DataObject,
) -> None:
    shift = data.draw(st.tuples(st.integers(0, window - 1), st.integers(0, window - 1)))
    args = inputs(front, grid, window, heads, head, bank, pad, torch.float64)
    compare(*pair(window, shift, heads, bank, pad, roll_first), args)


@interpreted
@pytest.mark.parametrize(("front", "grid"), [((0, 2), (4, 5)), ((2,), (0, 3))])
def test_nothing_in_nothing_out(front: tuple[int, ...], grid: tuple[int, int]) -> None:
    args = inputs(front, grid, pad="of each expert")
    for run in pair(pad="of each expert"):
        out, (_, *gradients) = with_gradients(run, args)
        assert out.shape == (*front, *grid, 12)
        assert not any(g.any() for g in gradients)


@interpreted
def test_gradcheck() -> None:
    args = inputs((1,), (3, 1), 2, 1, 1, False, "shared", torch.float64)
    op, _ = pair(2, (1, 0), 1, False, "shared")
    assert torch.autograd.gradcheck(op, [v.requires_grad_() for v in args])


@interpreted
def test_strided_input_and_expanded_gradient() -> None:
    qkv, table, index = inputs((1, 2), (4, 5), dtype=torch.float64)
    wide = torch.randn(1, 2, 5, 4, 50, dtype=torch.float64).transpose(2, 3)[..., 7:43]
    for x, t in ((wide, table.expand(3, 49, 2)), (qkv[:, :1].expand(1, 2, 4, 5, 36), table[:1])):
        leaves = [x.detach().requires_grad_(), t.detach().requires_grad_()]
        grads = [torch.autograd.grad(run(*leaves, index % len(t)).sum(), leaves) for run in pair()]
        torch.testing.assert_close(*grads)


@interpreted
def test_what_is_not_wanted_is_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    from mimkernels.window_attention import backward

    launched = []
    launch = backward.launch
    monkeypatch.setattr(
        backward, "launch", lambda k, *a, **o: (launched.append(k), launch(k, *a, **o))
    )
    qkv, table, index = inputs((1, 1), (4, 4))
    qkv.requires_grad_()
    pair()[0](qkv, table, index).sum().backward()
    assert backward.reduce_kernel not in launched
    pair()[0](qkv, table.requires_grad_(), index).sum().backward()
    assert backward.reduce_kernel in launched


def test_a_table_that_nobody_picked_gets_no_gradient() -> None:
    qkv, table, _ = inputs(grid=(4, 4))
    _, (_, dtable) = with_gradients(pair()[0], [qkv, table, torch.tensor([[0, 2]], device=DEVICE)])
    assert dtable[0].any() and dtable[2].any() and not dtable[1].any()


def test_a_batch_equals_its_single_runs_and_runs_repeat() -> None:
    qkv, table, _ = inputs((2, 1), (5, 4))
    index = torch.tensor([[2], [0]], device=DEVICE)
    op, _ = pair()
    both = op(qkv, table, index)
    for b in (0, 1):
        one = op(qkv[b : b + 1], table, index[b : b + 1])
        assert torch.equal(both[b : b + 1], one)
        alone = window_attention(
            qkv[b], table[index[b, 0]], window=4, heads=2, shift=2, backend="triton"
        )
        assert torch.equal(both[b], alone)
    first, second = (with_gradients(op, [qkv, table, index]) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


def test_operators_pass_opcheck_and_compile() -> None:
    qkv, table, index, pad_value = inputs((1, 1), (3, 4), pad="of each expert")
    options = (4, [2, 2], 2, 0.3, False)
    ops = torch.ops.mimkernels
    given = (qkv, table, index, pad_value)
    torch.library.opcheck(ops.window_attention.default, (*given, *options))
    out, lse = ops.window_attention(*given, *options)
    torch.library.opcheck(
        ops.window_attention_backward.default, (out, *given, out, lse, *options, True, True)
    )
    op, _ = pair(pad="of each expert")
    found, grads = with_gradients(torch.compile(op, fullgraph=True, backend="aot_eager"), given)
    eager, eager_grads = with_gradients(op, given)
    assert torch.equal(found, eager)
    assert all(torch.equal(a, b) for a, b in zip(grads, eager_grads, strict=True))


def test_autocast_takes_its_type() -> None:
    qkv, table, index = inputs()
    with torch.autocast(DEVICE, torch.bfloat16):
        found = window_attention(qkv, table, window=4, heads=2, index=index, backend="torch")
    assert found.dtype == torch.bfloat16
    low = [qkv.bfloat16(), table.bfloat16()]
    assert torch.equal(found, window_attention_reference(*low, index, window=4, heads=2))


def assert_equal_with_gradients(
    ours: Callable[..., Tensor], theirs: Callable[..., Tensor], args: list[Tensor], error: float
) -> None:
    found, wanted = with_gradients(ours, args), with_gradients(theirs, args)
    for a, b in zip((found[0], *found[1]), (wanted[0], *wanted[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=error, atol=error)


def swin(args: list[Tensor], backend: str, **options: Any) -> Tensor:
    """Linear layers around the op, as in the modules that it is compared with."""
    x, qkv_weight, qkv_bias, table, weight, bias = args
    qkv = F.linear(x, qkv_weight, qkv_bias)
    out = window_attention(
        qkv, table, window=4, heads=2, pad_value=qkv_bias, backend=backend, **options
    )
    return F.linear(out, weight, bias)


PARAMETERS = {
    "qkv.weight": (36, 12),
    "qkv.bias": (36,),
    "relative_position_bias_table": (49, 2),
    "proj.weight": (12, 12),
    "proj.bias": (12,),
}


def drawn(*shape: int) -> list[Tensor]:
    """x and the parameters, in float64: what differs is the meaning, not rounding."""
    g = torch.Generator().manual_seed(0)
    shapes = [shape, *PARAMETERS.values()]
    return [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]


# A grid that the window divides, and one that is padded.
GRIDS = [(8, 4), (6, 5)]


@interpreted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_timms_swin_block(grid: tuple[int, int], backend: str) -> None:
    module = pytest.importorskip("timm.models.swin_transformer")
    block = module.SwinTransformerBlock(
        12, grid, num_heads=2, window_size=4, shift_size=2, always_partition=True
    ).double()

    class Attention(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return block._attn(x)

    whole = Attention()
    whole.attn = block.attn

    def theirs(x: Tensor, *parameters: Tensor) -> Tensor:
        named = {f"attn.{n}": v for n, v in zip(PARAMETERS, parameters, strict=True)}
        return torch.func.functional_call(whole, named, (x,))

    assert_equal_with_gradients(
        lambda *args: swin(args, backend, shift=(2, 2), roll_first=True),
        theirs,
        drawn(2, *grid, 12),
        1e-10,
    )


@interpreted
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_equals_torchvisions_swin(grid: tuple[int, int], backend: str) -> None:
    swin_transformer = pytest.importorskip("torchvision.models.swin_transformer")
    layer = swin_transformer.ShiftedWindowAttention(12, [4, 4], [2, 2], 2).double()

    def theirs(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(PARAMETERS, parameters, strict=True))
        return torch.func.functional_call(layer, named, (x,))

    # No shift along an axis that one window covers.
    shift = tuple(2 if size > 4 else 0 for size in grid)
    assert_equal_with_gradients(
        lambda *args: swin(args, backend, shift=shift),
        theirs,
        drawn(2, *grid, 12),
        1e-10,
    )


@interpreted
def test_bad_arguments() -> None:
    qkv, table, index = inputs()
    pad_value = torch.randn(36)
    good: dict[str, Any] = {"qkv": qkv, "table": table, "index": index, "window": 4, "heads": 2}
    cases = [
        ({"qkv": qkv[0, 0]}, r"qkv: expected \[B,H,W,3C\] or \[B,k,H,W,3C\]"),
        ({"qkv": qkv.int()}, "qkv: expected a floating-point type"),
        ({"qkv": qkv.transpose(3, 4)}, "qkv: expected a last stride of 1"),
        ({"window": 33}, "window: expected 1 to 32, got 33"),
        ({"shift": 4}, r"shift: expected 0 to 3 of rows and columns, got \(4, 4\)"),
        ({"shift": (1, 2, 3)}, "shift: expected 0 to 3"),
        ({"scale": 0.0}, "scale: expected a number other than 0"),
        ({"heads": 5}, "heads: expected a divisor of 36 / 3"),
        ({"qkv": torch.randn(1, 2, 4, 4, 390)}, "heads: expected heads of at most 64, got 65"),
        ({"window": 3}, r"table: expected shape \[any, 25, 2\]"),
        ({"index": None}, r"table: expected shape \[49, 2\]"),
        ({"table": table.double()}, "table: expected torch.float32 as qkv"),
        ({"table": table.to("meta")}, "table: expected device cpu as qkv"),
        ({"index": index[:, :1]}, "index: expected shape"),
        ({"index": index.float()}, "index: expected int32 or int64"),
        ({"index": index + 3}, "index: expected 0 to 2"),
        ({"pad_value": pad_value[1:]}, r"pad_value: expected shape \[36\]"),
        ({"pad_value": pad_value.expand(2, 36)}, r"pad_value: expected shape \[3, 36\]"),
        ({"pad_value": pad_value.half()}, "pad_value: expected torch.float32 as qkv"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            window_attention(**(good | change))


COMPILE = """
import sys
from mimkernels.aot import compile_all
for row in compile_all(["window_attention"], ["bf16"], [sys.argv[1]]):
    print(row.kernel, row.matrix, row.fault or "good")
"""


@pytest.mark.parametrize(
    ("architecture", "instruction"),
    [
        ("sm_90", "wgmma"),
        *(
            pytest.param(*other, marks=pytest.mark.slow)
            for other in (
                ("sm_80", "mma.sync"),
                ("sm_86", "mma.sync"),
                ("sm_120", "mma.sync"),
                ("gfx942", "v_mfma"),
            )
        ),
    ],
)
def test_compiles_for_a_gpu_that_is_not_there(architecture: str, instruction: str) -> None:
    """Compilation and the interpreter exclude each other in one process."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, architecture],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    rows = {tuple(line.split()) for line in done.stdout.splitlines()}
    kernels = ("forward_kernel", "query_kernel", "key_kernel", "window_kernel")
    expected = {(name, instruction, "good") for name in kernels}
    assert rows == expected | {("reduce_kernel", "none", "good")}
