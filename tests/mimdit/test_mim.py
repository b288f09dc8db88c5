import pytest
import torch

from mimdit.mim import MiM


def module(**options: object) -> MiM:
    torch.manual_seed(0)
    mim = MiM(2, 96, 64, **options)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        mim.inter_router.normal_()
        mim.intra_router.normal_()
        mim.zero_weight.normal_(std=0.1)
    return mim.eval()


Z = torch.randn(3, 20, 96, generator=torch.Generator().manual_seed(5))


FIRST, SECOND = slice(0, 1), slice(1, 2)


def test_equals_the_double_sum_over_groups_and_experts() -> None:
    mim = module()
    (y,), (u,) = mim.project(Z, SECOND)
    (m,), routing = mim(Z, (4, 5), SECOND)
    total = y.clone()
    for b in range(3):
        for g, bank in enumerate(mim.banks):
            for p, e in zip(routing.intra[0, b, g], routing.index[0, b, g], strict=True):
                one, gate = slice(b, b + 1), torch.ones(1, 1)
                added, left = bank(u[one], y[one], (4, 5), e.view(1, 1), gate, SECOND)
                only = 0 if added is None else added[0]
                if left is not None:
                    bias = 0 if left.bias is None else left.bias[e]
                    only = only + left.slots[0, 0] @ left.weight[e].T + bias
                total[b] += routing.inter[0, b, g] * p * only
    expected = total @ mim.zero_weight[1].T + mim.zero_bias[1]
    torch.testing.assert_close(m, expected, rtol=1e-5, atol=1e-5)


def test_layers_together_equal_layers_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    mim = module()
    m, routing = mim(Z, (4, 5), slice(None))
    for layer in range(2):
        one = slice(layer, layer + 1)
        alone, chosen = mim(Z, (4, 5), one)
        torch.testing.assert_close(m[one], alone, rtol=1e-5, atol=1e-5)
        assert torch.equal(routing.index[one], chosen.index)
    assert mim.chunks(Z) == [slice(0, 2)]
    monkeypatch.setattr("mimdit.mim._TOGETHER", 1)
    assert mim.chunks(Z) == [FIRST, SECOND]


def test_softmax_comes_before_top_k() -> None:
    _, r = module()(Z, (4, 5), FIRST)
    torch.testing.assert_close(r.inter.sum(-1), torch.ones(1, 3))
    assert (r.intra.sum(-1) < 1).all()
    assert (r.intra[..., 0] >= r.intra[..., 1]).all()
    assert r.index.shape == (1, 3, 4, 2)


def test_renormalised_weights_add_up_to_one() -> None:
    _, routing = module(renormalize=True)(Z, (4, 5), FIRST)
    torch.testing.assert_close(routing.intra.sum(-1), torch.ones(1, 3, 4))


def test_ties_go_to_the_lowest_index() -> None:
    mim = module(experts=8, top_k=3)
    with torch.no_grad():
        mim.intra_router.zero_()
    _, routing = mim(Z, (4, 5), FIRST)
    assert (routing.index == torch.arange(3)).all()


def test_dense_intra_takes_all_experts_equally() -> None:
    _, routing = module(intra="dense")(Z, (4, 5), FIRST)
    assert torch.equal(routing.intra, torch.full((1, 3, 4, 4), 0.25))
    assert (routing.index == torch.arange(4)).all()


def test_sparse_inter_keeps_the_top_group_and_its_softmax_weight() -> None:
    _, dense = module()(Z, (4, 5), FIRST)
    _, sparse = module(inter="sparse")(Z, (4, 5), FIRST)
    assert ((sparse.inter > 0).sum(-1) == 1).all()
    assert torch.equal(sparse.inter.amax(-1), dense.inter.amax(-1))


def test_homogeneous_groups_and_a_single_expert() -> None:
    mim = module(groups=("spatial",) * 4, experts=1, top_k=1)
    m, routing = mim(Z, (4, 5), FIRST)
    assert m.shape == (1, 3, 20, 96)
    assert torch.equal(routing.intra, torch.ones(1, 3, 4, 1))


def test_fresh_module_gives_zero_tokens() -> None:
    m, _ = MiM(2, 96, 64)(Z, (4, 5), slice(None))
    assert torch.equal(m, torch.zeros_like(m))


def test_running_mean_follows_training_batches_only() -> None:
    mim = module()
    before = mim.running_mean.clone()
    mim(Z, (4, 5), FIRST)
    assert torch.equal(mim.running_mean, before)
    mim.train()
    mim(Z, (4, 5), FIRST)
    pooled = mim.pool(Z)[0, :, :64].mean(0)
    torch.testing.assert_close(mim.running_mean[0], pooled, rtol=1e-5, atol=1e-6)
    assert torch.equal(mim.running_mean[1], before[1])


def test_given_routing_overrides_the_routers() -> None:
    mim = module()
    routing = mim.route(mim.pool(Z[:1])).repeat(3)
    _, taken = mim(Z, (4, 5), SECOND, routing)
    assert torch.equal(taken.inter, routing.inter[SECOND])
    assert (taken.index == taken.index[:, :1]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 5}, "top_k: expected 1 to 4"),
        ({"groups": ("swine",)}, "groups: expected one of"),
        ({"inter": "no"}, "inter: expected one of"),
        ({"intra": "no"}, "intra: expected one of"),
    ],
)
def test_bad_options(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MiM(2, 96, 64, **options)
