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


def test_equals_the_double_sum_over_groups_and_experts() -> None:
    mim = module()
    y, u = mim.project(Z, 1)
    m, (inter, intra, index) = mim(Z, (4, 5), 1)
    total = y.clone()
    for b in range(3):
        for g, bank in enumerate(mim.banks):
            for p, e in zip(intra[b, g], index[b, g], strict=True):
                only = bank(u[b : b + 1], y[b : b + 1], (4, 5), 1, e.view(1, 1))[0, 0]
                total[b] += inter[b, g] * p * only
    expected = total @ mim.zero_weight[1].T + mim.zero_bias[1]
    torch.testing.assert_close(m, expected, rtol=1e-5, atol=1e-5)


def test_softmax_comes_before_top_k() -> None:
    _, (inter, intra, index) = module()(Z, (4, 5), 0)
    torch.testing.assert_close(inter.sum(-1), torch.ones(3))
    assert (intra.sum(-1) < 1).all()
    assert (intra[..., 0] >= intra[..., 1]).all()
    assert index.shape == (3, 4, 2)


def test_renormalised_weights_add_up_to_one() -> None:
    _, (_, intra, _) = module(renormalize=True)(Z, (4, 5), 0)
    torch.testing.assert_close(intra.sum(-1), torch.ones(3, 4))


def test_ties_go_to_the_lowest_index() -> None:
    mim = module(experts=8, top_k=3)
    with torch.no_grad():
        mim.intra_router.zero_()
    _, (_, _, index) = mim(Z, (4, 5), 0)
    assert (index == torch.arange(3)).all()


def test_dense_intra_takes_all_experts_equally() -> None:
    _, (_, intra, index) = module(intra="dense")(Z, (4, 5), 0)
    assert torch.equal(intra, torch.full((3, 4, 4), 0.25))
    assert (index == torch.arange(4)).all()


def test_sparse_inter_keeps_the_top_group_and_its_softmax_weight() -> None:
    _, (dense, _, _) = module()(Z, (4, 5), 0)
    _, (sparse, _, _) = module(inter="sparse")(Z, (4, 5), 0)
    assert ((sparse > 0).sum(-1) == 1).all()
    assert torch.equal(sparse.amax(-1), dense.amax(-1))


def test_homogeneous_groups_and_a_single_expert() -> None:
    mim = module(groups=("spatial",) * 4, experts=1, top_k=1)
    m, (_, intra, _) = mim(Z, (4, 5), 0)
    assert m.shape == (3, 20, 96)
    assert torch.equal(intra, torch.ones(3, 4, 1))


def test_fresh_module_gives_zero_tokens() -> None:
    m, _ = MiM(2, 96, 64)(Z, (4, 5), 0)
    assert torch.equal(m, torch.zeros_like(m))


def test_running_mean_follows_training_batches_only() -> None:
    mim = module()
    before = mim.running_mean.clone()
    mim(Z, (4, 5), 0)
    assert torch.equal(mim.running_mean, before)
    mim.train()
    mim(Z, (4, 5), 0)
    pooled = mim.pool(Z)[0].mean(0)
    torch.testing.assert_close(mim.running_mean[0], pooled, rtol=1e-5, atol=1e-6)
    assert torch.equal(mim.running_mean[1], before[1])


def test_given_routing_overrides_the_routers() -> None:
    mim = module()
    routing = mim.route(mim.pool(Z[:1])).repeat(3)
    _, (inter, _, index) = mim(Z, (4, 5), 1, routing)
    assert torch.equal(inter, routing.inter[1])
    assert (index == index[:1]).all()


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
