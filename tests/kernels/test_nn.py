"""`mimkernels.nn` and `accelerate` against timm, torchvision and a layer like Restormer's."""

import copy
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mimkernels.accelerate import Report, accelerate, restore
from mimkernels.backend import use_backend
from mimkernels.nn import ChannelAttention, SqueezeExcite, WindowAttention, layers
from tests.kernels.common import (
    DEVICE,
    GRADIENT_FACTOR,
    assert_as_exact_as_eager,
    interpreted,
)

ROOT = Path(__file__).parents[2]
TOLERANCE = 1e-5
BACKENDS = ("triton", "torch")
# Of pictures in batches: [B,C,H,W] as usual, and as the kernels read them.
LAYOUTS = (torch.contiguous_format, torch.channels_last)


@pytest.fixture(scope="module", autouse=True)
def plain_arithmetic() -> Iterator[None]:
    """Float32 convolutions also on GPUs; one thread, since more only slow small work down."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each op was called."""
    counts: Counter[str] = Counter()

    def counted(name: str) -> Callable[..., Tensor]:
        op = getattr(layers, name)
        return lambda *args, **options: (counts.update([name]), op(*args, **options))[1]

    for name in ("window_attention", "channel_attention", "squeeze_excite"):
        monkeypatch.setattr(layers, name, counted(name))
    return counts


def randomized(module: Any) -> Any:
    """Every parameter drawn: biases and tables start at zero or nearly so, which hides faults."""
    g = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        table = name.endswith(("relative_position_bias_table", "temperature"))
        scale = p[0].numel() ** -0.5 if p.ndim > 1 and not table else 1 if table else 0.5
        offset = 1 if "norm" in name and name.endswith("weight") else 0
        p.data = offset + scale * torch.randn(p.shape, generator=g)
    return module.to(DEVICE)


def outcome(run: Callable[..., Tensor], module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, and gradients of the input and all parameters for a random output gradient."""
    x = x.detach().to(DEVICE).requires_grad_()
    out = run(x)
    g = torch.Generator().manual_seed(7)
    grad = torch.randn(out.shape, generator=g).to(out)
    leaves = [x, *(p for _, p in sorted(module.named_parameters()))]
    return [out, *torch.autograd.grad(out, leaves, grad)]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    """Within 1e-5 of each tensor's largest value."""
    for a, b in zip(found, wanted, strict=True):
        room = TOLERANCE * float(b.detach().abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=room)


def drawn(*shape: int, layout: torch.memory_format = torch.contiguous_format) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return x.contiguous(memory_format=layout)


class RestormerAttention(nn.Module):
    """As many write it from the paper (arXiv 2111.09881, Eq. 1), with Restormer's names."""

    def __init__(self, dim: int, num_heads: int, bias: bool, **more: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.temperature = nn.Parameter(torch.ones(num_heads, 1, 1))
        self.qkv = nn.Conv2d(dim, dim * 3, kernel_size=1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(dim * 3, dim * 3, 3, padding=1, groups=dim * 3, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, kernel_size=1, bias=bias)
        for name, value in more.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        mixed = self.qkv_dwconv(self.qkv(x)).flatten(2)  # [B,3C,T]
        q, k, v = (t.unflatten(1, (self.num_heads, -1)) for t in mixed.chunk(3, 1))
        similarity = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
        out = self.weigh(similarity * self.temperature) @ v  # [B,heads,c,T]
        return self.project_out(out.flatten(1, 2).unflatten(2, x.shape[2:]))

    def weigh(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


class SparseAttention(RestormerAttention):
    """The same names and shapes, another formula."""

    def weigh(self, x: Tensor) -> Tensor:
        return x.relu()


def timms() -> Any:
    return pytest.importorskip("timm.models.swin_transformer")


def torchvisions() -> Any:
    return pytest.importorskip("torchvision.models.swin_transformer")


def small_swin(**options: Any) -> Any:
    """Two stages of two blocks: unshifted, shifted, and a grid of a single window."""
    shape: dict[str, Any] = {"embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)}
    shape |= {"img_size": 32, "window_size": 4, "num_classes": 5, "drop_path_rate": 0.0}
    return randomized(timms().SwinTransformer(**(shape | options)))


def small_torchvision_swin(depths: Sequence[int]) -> Any:
    make, heads = torchvisions().SwinTransformer, [2, 4][: len(depths)]
    model = make([4, 4], 24, depths, heads, [4, 4], stochastic_depth_prob=0.0, num_classes=5)
    return randomized(model)


# Grids that the window divides, that are padded, and with an axis smaller than it; odd shifts.
CASES = [((8, 4), 2), ((6, 5), 2), ((3, 9), 3), ((7, 2), 1)]
# The kernels on the others: in the op's own tests.
WINDOWS = [
    *((grid, shift, "torch") for grid, shift in CASES),
    *((grid, shift, "triton") for grid, shift in CASES[2:]),
]


@pytest.mark.parametrize(("grid", "shift", "backend"), WINDOWS, ids=str)
def test_window_attention_for_torchvisions(grid: tuple[int, int], shift: int, backend: str) -> None:
    theirs = randomized(torchvisions().ShiftedWindowAttention(12, [4, 4], [shift, shift], 2))
    ours = WindowAttention(12, 4, shift, 2).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.relative_position_index, theirs.relative_position_index)
    x = drawn(2, *grid, 12)
    wanted = outcome(theirs, theirs, x)
    with use_backend(backend):
        assert_same(outcome(ours, ours, x), wanted)


@pytest.mark.parametrize(("grid", "shift", "backend"), WINDOWS, ids=str)
def test_window_attention_for_timms(grid: tuple[int, int], shift: int, backend: str) -> None:
    block = timms().SwinTransformerBlock(
        12, grid, num_heads=2, window_size=4, shift_size=shift, always_partition=True
    )
    block = randomized(block)
    ours = WindowAttention(12, 4, shift, 2, convention="timm").to(DEVICE)
    ours.load_state_dict(block.attn.state_dict())
    block.attn.load_state_dict(ours.state_dict())
    assert torch.equal(ours.relative_position_index, block.attn.relative_position_index)
    x = drawn(2, *grid, 12)
    wanted = outcome(block._attn, block.attn, x)
    with use_backend(backend):
        assert_same(outcome(ours, ours, x), wanted)


def test_window_attention_as_a_layer_of_torchvisions_blocks() -> None:
    swin = torchvisions()

    def model(attention: Any) -> Any:
        block = swin.SwinTransformerBlock
        return swin.SwinTransformer(
            [4, 4], 24, [2], [2], [4, 4], num_classes=5,
            block=lambda *a, **k: block(*a, **k, attn_layer=attention),
        )  # fmt: skip

    theirs = randomized(model(swin.ShiftedWindowAttention)).eval()
    ours = model(WindowAttention).to(DEVICE).eval()
    ours.load_state_dict(theirs.state_dict())
    x = drawn(1, 3, 36, 44)
    assert_same([ours(x)], [theirs(x)])


@pytest.mark.parametrize(
    ("bias", "layout", "backend"),
    [
        (False, LAYOUTS[0], "torch"),
        (True, LAYOUTS[0], "torch"),
        (True, LAYOUTS[1], "torch"),
        (True, LAYOUTS[1], "triton"),
    ],
    ids=str,
)
def test_channel_attention(bias: bool, layout: torch.memory_format, backend: str) -> None:
    theirs = randomized(RestormerAttention(12, 2, bias))
    ours = ChannelAttention(12, 2, bias).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = drawn(2, 12, 5, 7, layout=layout)
    wanted = outcome(theirs, theirs, x)
    with use_backend(backend):
        assert_same(outcome(ours, ours, x), wanted)
        assert ours(x).is_contiguous(memory_format=torch.channels_last)


def test_channel_attention_calls_a_projection_that_is_not_plain() -> None:
    ours = randomized(ChannelAttention(12, 2, bias=True))
    x = drawn(1, 12, 5, 7)
    wanted = ours(x)
    ours.project_out = nn.Sequential(ours.project_out, nn.ReLU())
    assert_same([ours(x)], [wanted.relu()])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("form", [(nn.ReLU, nn.Sigmoid), (nn.SiLU, nn.Hardsigmoid)])
def test_squeeze_excite(form: tuple[type, type], layout: torch.memory_format, backend: str) -> None:
    theirs = pytest.importorskip("torchvision.ops").SqueezeExcitation(24, 6, *form)
    theirs = randomized(theirs)
    ours = SqueezeExcite(24, 6, *form).to(DEVICE)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = drawn(2, 24, 5, 7, layout=layout)
    wanted = outcome(theirs, theirs, x)
    with use_backend(backend):
        assert_same(outcome(ours, ours, x), wanted)


def test_squeeze_excite_under_timms_names() -> None:
    blocks = pytest.importorskip("timm.models._efficientnet_blocks")
    module = pytest.importorskip("timm.layers").SEModule
    pairs = {
        "timm": blocks.SqueezeExcite(24, rd_channels=6, act_layer=nn.SiLU),
        "timm SEModule": module(24, rd_channels=6, act_layer=nn.SiLU),
    }
    for convention, theirs in pairs.items():
        theirs = randomized(theirs)
        ours = SqueezeExcite(24, 6, nn.SiLU, convention=convention).to(DEVICE)
        ours.load_state_dict(theirs.state_dict())
        x = drawn(2, 24, 5, 7)
        assert_same(outcome(ours, ours, x), outcome(theirs, theirs, x))


def test_bad_arguments() -> None:
    cases: list[tuple[Callable[[], nn.Module], str]] = [
        (lambda: WindowAttention(8, (4, 5), 0, 2), r"window_size: expected a square, got \[4, 5\]"),
        (lambda: WindowAttention(8, 4, 0, 2, attention_dropout=0.1), "attention_dropout: expected"),
        (lambda: WindowAttention(8, 4, 0, 2, convention="swin"), "convention: expected one of"),
        (lambda: SqueezeExcite(8, 2, nn.GELU), "activation: expected one of ReLU, SiLU"),
        (lambda: SqueezeExcite(8, 2, nn.ReLU, nn.Tanh), "scale_activation: expected one of"),
        (lambda: SqueezeExcite(8, 2, convention="keras"), "convention: expected one of"),
    ]
    for make, message in cases:
        with pytest.raises(ValueError, match=message):
            make()


SWIN_T = {
    "timm": (224, 224),
    # 50×65 patches: all stages pad, and merging pads as well.
    "timm, any size": (200, 260),
    "torchvision": (224, 224),
    "torchvision, padded": (200, 260),
}


def swin_t(case: str) -> Any:
    if not case.startswith("timm"):
        return randomized(torchvisions().swin_t()).eval()
    make = timms().swin_tiny_patch4_window7_224
    return randomized(make(strict_img_size=False) if "any" in case else make()).eval()


@pytest.mark.slow
@pytest.mark.parametrize("case", SWIN_T)
def test_gradients_of_a_whole_swin_t(case: str) -> None:
    """Sums over a whole picture and twelve layers are rounded: float64 says who is how far off."""
    model, x = swin_t(case), drawn(1, 3, *SWIN_T[case])
    wanted = outcome(model, model, x)
    double = copy.deepcopy(model).double()
    oracle = outcome(double, double, x.double())
    assert len(accelerate(model).replaced) == 12
    found = outcome(model, model, x)
    for triple in zip(found, wanted, oracle, strict=True):
        assert_as_exact_as_eager(*triple, factor=GRADIENT_FACTOR)
        torch.testing.assert_close(*triple[:2], rtol=TOLERANCE, atol=TOLERANCE)


@pytest.mark.parametrize("case", SWIN_T)
def test_a_whole_swin_t(case: str, calls: Counter[str]) -> None:
    model, x = swin_t(case), drawn(1, 3, *SWIN_T[case])
    with torch.no_grad():
        wanted = model(x)
        report = accelerate(model)
        assert len(report.replaced) == 12 and not report.left
        calls.clear()
        assert_same([model(x)], [wanted])
    assert calls == {"window_attention": 12}


# Masks kept for one size, which windows do not divide; and for any.
@pytest.mark.parametrize("options", [{"img_size": (36, 52)}, {"strict_img_size": False}], ids=str)
def test_gradients_of_an_accelerated_swin(options: dict[str, Any]) -> None:
    model = small_swin(**options)
    x = drawn(2, 3, 36, 52)
    wanted = outcome(model, model, x)
    assert len(accelerate(model).replaced) == 4
    assert_same(outcome(model, model, x), wanted)


# Of the second size windows divide neither side, and one covers each of the second stage's.
KERNELS_IN_SWINS = {
    "timm": (lambda: small_swin(), (32, 32)),
    "timm, padded": (lambda: small_swin(strict_img_size=False), (20, 12)),
    "torchvision, padded": (lambda: small_torchvision_swin([2]), (20, 12)),
    "torchvision, padded, deep": (lambda: small_torchvision_swin([2, 2]), (36, 20)),
}


@interpreted
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, marks=pytest.mark.slow) if "deep" in c else c for c in KERNELS_IN_SWINS],
)
def test_kernels_inside_a_swin(case: str) -> None:
    make, size = KERNELS_IN_SWINS[case]
    model, x = make(), drawn(1, 3, *size)
    wanted = outcome(model, model, x)
    report = accelerate(model)
    assert report.replaced and not report.left
    with use_backend("triton"):
        assert_same(outcome(model, model, x), wanted)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_accelerated_restormer_block(backend: str, layout: torch.memory_format) -> None:
    block = nn.Sequential(nn.Conv2d(3, 12, 1), RestormerAttention(12, 2, True))
    block = randomized(block).to(memory_format=layout)
    x = drawn(1, 3, 5, 7, layout=layout)
    wanted = outcome(block, block, x)
    report = accelerate(block)
    assert [(e.name, e.op) for e in report.replaced] == [("1", "channel_attention")]
    with use_backend(backend):
        assert_same(outcome(block, block, x), wanted)


def test_squeeze_and_excitation_takes_the_op_where_nothing_is_copied(calls: Counter[str]) -> None:
    layer = pytest.importorskip("torchvision.ops").SqueezeExcitation(24, 6)
    layer = randomized(layer)
    wanted = [layer(drawn(2, 24, 5, 7, layout=layout)) for layout in LAYOUTS]
    report = accelerate(layer)
    assert report.replaced[0].name == "(the module itself)"
    calls.clear()
    for layout, expected in zip(LAYOUTS, wanted, strict=True):
        found = layer(drawn(2, 24, 5, 7, layout=layout))
        assert_same([found], [expected])
        assert calls["squeeze_excite"] == (layout == torch.channels_last)


def keys_and_owners(model: nn.Module) -> dict[str, int]:
    return {k: v.data_ptr() for k, v in model.state_dict().items()}


def test_parameters_stay_and_undo_restores_every_bit(calls: Counter[str]) -> None:
    model = small_swin()
    x = drawn(1, 3, 32, 32)
    before, parameters = keys_and_owners(model), list(model.parameters())
    kinds = {name: type(m) for name, m in model.named_modules()}
    wanted = outcome(model, model, x)
    report = accelerate(model)
    assert keys_and_owners(model) == before
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert all(isinstance(m, kinds[name]) for name, m in model.named_modules())
    twin = copy.deepcopy(model)
    calls.clear()
    assert_same([model(x), twin(x)], [wanted[0]] * 2)
    assert calls == {"window_attention": 8}
    report.undo()
    restore(twin)
    for restored in (model, twin):
        assert {name: type(m) for name, m in restored.named_modules()} == kinds
        found = outcome(restored, restored, x)
        assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert calls == {"window_attention": 8}


def test_a_step_of_an_optimiser_made_before() -> None:
    model = small_swin()
    twin, x = copy.deepcopy(model), drawn(1, 3, 32, 32)
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin)]
    accelerate(model)
    for m, optimiser in zip((model, twin), optimisers, strict=True):
        m(x).square().sum().backward()
        optimiser.step()
    assert_same([model(x)], [twin(x)])


def test_an_accelerated_model_can_be_saved_whole() -> None:
    model = small_swin()
    accelerate(model)
    x, file = drawn(1, 3, 32, 32), io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert torch.equal(loaded(x), model(x))
    restore(loaded)
    restore(model)
    assert torch.equal(loaded(x), model(x))


# timm's, while it interpolates tables.
@pytest.mark.filterwarnings("ignore::UserWarning:timm.*")
def test_a_new_input_size_after_accelerating(calls: Counter[str]) -> None:
    model = small_swin()
    twin = copy.deepcopy(model)
    accelerate(model)
    x = drawn(1, 3, 48, 72)
    for m in (model, twin):
        # Its windows become 6×9, which the op lacks, and back to squares after that.
        m.set_input_size((48, 72))
    calls.clear()
    assert torch.equal(model(x), twin(x)) and not calls
    for m in (model, twin):
        m.set_input_size((48, 72), window_size=6)
    assert_same([model(x)], [twin(x)])
    assert calls == {"window_attention": 4}


def test_dropout_of_attention_runs_the_layers_own_code() -> None:
    model = small_swin(attn_drop_rate=0.5)
    x = drawn(1, 3, 32, 32)

    def trained() -> Tensor:
        torch.manual_seed(0)
        return model(x)

    wanted, evaluated = trained(), model.eval()(x)
    report = accelerate(model)
    assert "its own code in training: attention dropout 0.5" in str(report)
    assert_same([model(x)], [evaluated])
    model.train()
    assert torch.equal(trained(), wanted)


def test_autocast_and_compile() -> None:
    model = nn.Sequential(small_swin(), nn.Unflatten(1, (5, 1, 1)), SqueezeExcite(5, 2)).eval()
    model = nn.Sequential(RestormerAttention(3, 1, False), *model).to(DEVICE)
    x = drawn(1, 3, 32, 32)
    with torch.no_grad():
        wanted = model(x)
        assert len(accelerate(model).replaced) == 5
        with torch.autocast(DEVICE, torch.bfloat16):
            low = model(x)
        assert low.dtype == torch.bfloat16
        assert (low - wanted).norm() < 0.05 * wanted.norm()
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_same([compiled(x)], [wanted])


def test_squeeze_and_excitation_keeps_the_type_of_pictures_under_autocast(
    calls: Counter[str],
) -> None:
    own = pytest.importorskip("torchvision.ops").SqueezeExcitation(8, 4).to(DEVICE)
    fast = copy.deepcopy(own)
    accelerate(fast)
    x = drawn(2, 8, 5, 6, layout=torch.channels_last)
    calls.clear()
    with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16):
        assert torch.equal(fast(x), own(x)) and not calls
        fast(x.bfloat16())
    assert calls == {"squeeze_excite": 1}


def left(module: nn.Module) -> list[str]:
    """The reasons, of a module that stays as it is."""
    kinds = [type(m) for m in module.modules()]
    report = accelerate(module)
    assert [type(m) for m in module.modules()] == kinds and not report.replaced
    return [entry.reason for entry in report.left]


def test_same_names_another_formula() -> None:
    differs = "its output is not that of Restormer's attention"
    assert left(SparseAttention(12, 2, False)) == [differs]
    assert left(RestormerAttention(12, 2, False, tile=(8, 8))) == [
        "its attribute tile = (8, 8) has no place in Restormer's attention"
    ]
    assert left(RestormerAttention(12, 2, False, weigh=None))[0].startswith("a trial of it failed")
    assert not left(nn.Sequential(nn.Conv2d(3, 3, 1), nn.LayerNorm(3)))
    believed = accelerate(SparseAttention(12, 2, False), trial=False)
    assert len(believed.replaced) == 1


def test_what_no_kernel_can_do_is_left() -> None:
    wide = left(RestormerAttention(80, 1, False))
    assert wide == ["its heads are 80 wide, the kernel's at most 64"]
    single = RestormerAttention(12, 2, False)
    single.temperature = nn.Parameter(torch.ones(1))
    assert left(single) == ["its temperature has the shape [1], not [heads, 1, 1]"]
    assert left(RestormerAttention(12, 2, False).to("meta")) == [
        "its weights are on the meta device, so it cannot be tried"
    ]
    hooked = RestormerAttention(12, 2, False)
    hooked.project_out.register_forward_hook(lambda *_: None)
    assert left(hooked) == ["there are hooks on modules inside it"]
    patched = RestormerAttention(12, 2, False)
    patched.forward = patched.forward
    assert left(patched) == ["its forward pass was replaced on the instance"]
    assert left(ChannelAttention(12, 2)) == ["it runs on this package's ops already"]


def test_swins_that_are_left() -> None:
    assert left(small_swin(window_size=(4, 2))) == ["its windows are not square: 4×2"] * 4
    assert left(small_swin(embed_dim=160)) == ["its heads are 80 wide, the kernel's at most 64"] * 4
    v2 = pytest.importorskip("timm.models.swin_transformer_v2")
    cosine = v2.SwinTransformerV2(
        32, embed_dim=24, depths=(1, 1), num_heads=(2, 4), window_size=4, num_classes=5
    )
    assert left(cosine) == ["cosine attention (Swin V2) has no kernel"] * 2
    theirs = torchvisions().ShiftedWindowAttentionV2(12, [4, 4], [2, 2], 2)
    assert left(theirs) == ["cosine attention (Swin V2) has no kernel"]
    assert left(small_swin().layers[0].blocks[0].attn) == [
        "its windows, if it has any, are made and masked outside of it"
    ]


def test_squeeze_and_excitation_that_is_left() -> None:
    ops = pytest.importorskip("torchvision.ops")
    assert left(ops.SqueezeExcitation(8, 2, nn.GELU)) == ["GELU has no kernel here"]
    module = pytest.importorskip("timm.layers").SEModule
    assert left(module(8, norm_layer=nn.BatchNorm2d)) == [
        "there is a normalisation between its layers"
    ]
    assert left(module(8, add_maxpool=True)) == ["its output is not that of squeeze-and-excitation"]
    assert left(module(8, bias=False)) == ["its layers are not plain 1×1 convolutions with biases"]


def test_the_report_reads_well() -> None:
    heads = (1, 2, 3, 4)
    model = nn.Sequential(
        *(RestormerAttention(12, h, False) for h in heads), SparseAttention(12, 2, False)
    )
    report = accelerate(model)
    assert str(report).splitlines() == [
        "mimkernels.accelerate: 4 replaced, 1 left",
        "  4 × RestormerAttention → channel_attention: 0, 1, …, 3",
        "  1 × SparseAttention left (its output is not that of Restormer's attention): 4",
    ]
    again = accelerate(model)
    assert not again.replaced and len(again.left) == 5
    again.undo()
    assert "AcceleratedRestormerAttention" in repr(model)
    report.undo()
    assert "Accelerated" not in repr(model)
    assert report == Report(report.replaced, report.left)


def test_restore_refuses_a_class_that_changed_since() -> None:
    layer = RestormerAttention(12, 2, False)
    accelerate(layer)
    layer.__class__ = type("Sharded", (type(layer),), {})
    with pytest.raises(ValueError, match="expected the class that accelerate gave it, got Sharded"):
        restore(layer)


def test_a_trial_leaves_no_trace() -> None:
    layer = RestormerAttention(12, 2, True).eval()
    state, random = copy.deepcopy(layer.state_dict()), torch.get_rng_state()
    accelerate(layer)
    assert not layer.training and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())


@pytest.mark.slow
def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    import runpy

    monkeypatch.setattr(sys, "argv", ["accelerate_swin.py", "--batch", "1", "--runs", "1"])
    runpy.run_path(str(ROOT / "examples" / "accelerate_swin.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "12 replaced, 0 left" in printed and "times as fast" in printed
