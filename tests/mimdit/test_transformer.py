import pytest
import torch
from diffusers import SD3Transformer2DModel

from mimdit.engine import accelerate
from mimdit.presets import PRESETS, build
from mimdit.transformer import MiMDiTTransformer2DModel

SD3_KEYS = [
    "sample_size",
    "patch_size",
    "in_channels",
    "num_layers",
    "attention_head_dim",
    "num_attention_heads",
    "joint_attention_dim",
    "caption_projection_dim",
    "pooled_projection_dim",
    "out_channels",
    "pos_embed_max_size",
    "dual_attention_layers",
    "qk_norm",
]


def inputs(height: int = 12, width: int = 20) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x, z = torch.randn(2, 2, 48, height, width, generator=g)
    return x, z, torch.tensor([300.0, 900.0])


@pytest.mark.parametrize("dual", [(), (0,)], ids=["single", "dual"])
@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_without_conditioning_it_is_diffusers_transformer(dual: tuple, qk_norm: str | None) -> None:
    options = {"prediction_type": "velocity", "out_channels": 48}
    ours = (
        build("debug", dual_attention_layers=dual, qk_norm=qk_norm, **options).randomize_(1).eval()
    )
    theirs = SD3Transformer2DModel(**{k: ours.config[k] for k in SD3_KEYS}).eval()
    own = ours.state_dict()
    theirs.load_state_dict({k: own[k] for k in theirs.state_dict()})
    x, _, t = inputs()
    text, pooled = torch.randn(2, 7, 32), torch.randn(2, 16)
    with torch.no_grad():
        a = ours(x, t, encoder_hidden_states=text, pooled_projections=pooled).sample
        b = theirs(x, text, pooled, t).sample
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [None, "rms_norm"])
def test_dropping_conditioning_queries_is_exact(qk_norm: str | None) -> None:
    model = build("debug", qk_norm=qk_norm).randomize_(2).eval().double()
    x, z, t = (v.double() for v in inputs())
    with torch.no_grad():
        condition = model.encode_condition(z)
        short = model.predict(x, t, condition)
        model.use_literal_attention()
        literal = model.predict(x, t, condition)
        other = model.predict(x, t, model.encode_condition(z.flip(-1)))
    torch.testing.assert_close(short, literal, rtol=0, atol=1e-12)
    assert (literal - other).abs().max() > 1e-3


def test_condition_once_or_in_the_call(debug_model: MiMDiTTransformer2DModel) -> None:
    x, z, t = inputs()
    with torch.no_grad():
        condition = debug_model.encode_condition(z)
        assert torch.equal(
            debug_model(x, t, condition).sample, debug_model(x, t, lq_latents=z).sample
        )
    assert len(condition.tokens) == 2
    assert condition.tokens[0].shape == (2, 60, 64)


def test_fresh_model_has_zero_conditioning_tokens() -> None:
    condition = build("debug").encode_condition(inputs()[1])
    assert all(torch.equal(m, torch.zeros_like(m)) for m in condition.tokens)


def test_every_part_of_the_conditioning_learns() -> None:
    torch.manual_seed(0)
    model = build("debug").train()
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    touched: set[str] = set()
    for _ in range(12):
        # Pictures that differ in colour and contrast, so that routers tell them apart.
        z = torch.randn(8, 48, 16, 16) * torch.rand(8, 1, 1, 1) + torch.randn(8, 48, 1, 1)
        loss = model(torch.randn_like(z), torch.rand(8) * 1000, lq_latents=z).sample.square().mean()
        optimizer.zero_grad()
        loss.backward()
        for name, p in model.mim.named_parameters():
            assert p.grad is not None, name
            # Axis 0 is the layer; for banks, axis 1 the expert.
            if name.startswith("banks"):
                axes = tuple(range(2, p.ndim))
                alive = (p.grad != 0).any(dim=axes) if axes else p.grad != 0
                found = {f"{name}[{a},{b}]" for a, b in alive.nonzero().tolist()}
            else:
                found = {
                    f"{name}[{a}]" for (a,) in (p.grad.flatten(1) != 0).any(1).nonzero().tolist()
                }
            touched |= found
        optimizer.step()
    wanted = set()
    for name, p in model.mim.named_parameters():
        experts = range(p.shape[1]) if name.startswith("banks") else None
        for layer in range(p.shape[0]):
            wanted |= {f"{name}[{layer},{e}]" for e in experts} if experts else {f"{name}[{layer}]"}
    assert wanted == touched


def test_position_offset_moves_the_crop(debug_model: MiMDiTTransformer2DModel) -> None:
    z = inputs()[1]
    centre = debug_model.pos_embed(z)
    with debug_model.position_offset(5, 3):
        assert torch.equal(debug_model.pos_embed(z), centre)
    with debug_model.position_offset(0, 0):
        assert not torch.equal(debug_model.pos_embed(z), centre)
    assert torch.equal(debug_model.pos_embed(z), centre)


def test_routing_does_not_depend_on_the_place(debug_model: MiMDiTTransformer2DModel) -> None:
    """The place moves the token means as far as some damages do; restoration has the centre."""
    z = inputs()[1]
    centre = debug_model.encode_condition(z)
    for engine in (False, True):
        if engine:
            accelerate(debug_model)
        with torch.set_grad_enabled(not engine), debug_model.position_offset(0, 0):
            corner = debug_model.encode_condition(z)
            pooled = debug_model.pool_condition(z)
        torch.testing.assert_close(corner.routing.inter, centre.routing.inter)
        torch.testing.assert_close(corner.routing.pooled, centre.routing.pooled)
        assert torch.equal(corner.routing.index, centre.routing.index)
        torch.testing.assert_close(debug_model.mim.route(pooled).inter, centre.routing.inter)
        if not engine:
            assert not torch.allclose(corner.tokens[0], centre.tokens[0], atol=1e-3)


def test_gradient_checkpointing_changes_nothing() -> None:
    model = build("debug").randomize_(0).train()
    x, z, t = inputs()

    def gradient() -> torch.Tensor:
        model.zero_grad()
        model(x, t, model.encode_condition(z)).sample.square().mean().backward()
        assert model.mim.zero_weight.grad is not None
        return model.mim.zero_weight.grad.clone()

    plain = gradient()
    model.enable_gradient_checkpointing()
    torch.testing.assert_close(gradient(), plain)


def test_bad_requests(debug_model: MiMDiTTransformer2DModel) -> None:
    x, z, t = inputs()
    with pytest.raises(ValueError, match="needs the damaged picture"):
        debug_model(x, t)
    with pytest.raises(ValueError, match="multiples of 2"):
        debug_model.encode_condition(z[..., :11, :])
    with pytest.raises(ValueError, match="prompt: expected one of empty"):
        debug_model.prompt("positive")
    with pytest.raises(ValueError, match="prediction_type"):
        build("debug", prediction_type="noise")
    with pytest.raises(ValueError, match="preset: expected one of debug"):
        build("huge")


@pytest.mark.parametrize(
    ("name", "total", "mim"), [("tiny", 13.7e6, 4.6e6), ("sd35-medium", 2.7e9, 0.26e9)]
)
def test_preset_sizes(name: str, total: float, mim: float) -> None:
    with torch.device("meta"):
        model = MiMDiTTransformer2DModel(**PRESETS[name])
    count = sum(p.numel() for p in model.mim.parameters())
    assert count == pytest.approx(mim, rel=0.1)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(total, rel=0.1)
