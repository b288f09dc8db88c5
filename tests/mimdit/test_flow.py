import pytest
import torch

from mimdit import flow


@pytest.mark.parametrize("kind", ["sample", "residual"])
@pytest.mark.parametrize("t", [1e-3, 0.3, 1.0])
def test_the_perfect_output_gives_the_true_velocity(kind: str, t: float) -> None:
    torch.manual_seed(0)
    x0, noise, z = torch.randn(3, 2, 48, 8, 8, dtype=torch.float64)
    time = torch.full((2,), t, dtype=torch.float64)
    x_t = flow.interpolate(x0, noise, time)
    s = 0.4
    n = (1 - t) ** 2 + (t / s) ** 2
    mean = ((1 - t) * x_t + (t / s) ** 2 * z) / n
    output = x0 if kind == "sample" else (x0 - mean) * n**0.5 / t
    seen = flow.network_input(kind, x_t, time, z, s)
    torch.testing.assert_close(seen, x_t if kind == "sample" else mean)
    v = flow.to_velocity(kind, output, x_t, time, z, s)
    torch.testing.assert_close(v, noise - x0, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [1e-3, 0.3, 1.0])
def test_log_affine_is_affine_about_white_on_a_logarithmic_scale(t: float) -> None:
    x_t, z = torch.rand(2, 2, 48, 8, 8, dtype=torch.float64) * 1.6 - 0.8
    residual = torch.randn(2, 48, 8, 8, dtype=torch.float64)
    # Even over the picture, so that interpolation does not matter.
    gain = torch.randn(2, 3, 1, 1, dtype=torch.float64).expand(-1, -1, 8, 8)
    time = torch.full((2,), t, dtype=torch.float64)
    a = t / ((1 - t) ** 2 + (t / 0.4) ** 2) ** 0.5
    seen = flow.network_input("log_affine", x_t, time, z, 0.4)  # 2·c − 1
    factor = (gain * a).exp().repeat_interleave(16, 1)
    wanted = (1 + ((seen - 1) / 2 + residual * a) * factor).clamp(-1, 1.25)
    v = flow.to_velocity("log_affine", torch.cat([residual, gain], 1), x_t, time, z, 0.4)
    found = (flow.observed("log_affine", x_t - t * v) + 1) / 2
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    zero = flow.to_velocity("log_affine", torch.zeros(2, 51, 8, 8), x_t, time, z, 0.4)
    torch.testing.assert_close(zero, flow.to_velocity("residual", 0 * z, x_t, time, z, 0.4))


def test_logarithmic_scale_keeps_black_and_white_and_tells_dark_tones_apart() -> None:
    tones = torch.tensor([-1.0, -0.98, -0.9, 0.0, 1.0], dtype=torch.float64)
    seen = flow.observed("log_affine", tones)
    assert seen[0] == -1 and seen[-1] == pytest.approx(1)
    assert seen[1] - seen[0] > 5 * (tones[1] - tones[0])
    assert (seen.diff() > 0).all()


def test_zero_residual_at_pure_noise_is_the_damaged_picture() -> None:
    x1, z = torch.randn(2, 1, 48, 8, 8)
    v = flow.to_velocity("residual", torch.zeros_like(z), x1, torch.ones(1), z, 0.4)
    torch.testing.assert_close(x1 - v, z)


def test_residual_loss_is_plain_in_the_output() -> None:
    x0, noise, z, off = torch.randn(4, 3, 48, 4, 4, dtype=torch.float64)
    t = torch.tensor([0.01, 0.5, 1.0], dtype=torch.float64)
    x_t = flow.interpolate(x0, noise, t)
    v = [flow.to_velocity("residual", o, x_t, t, z, 0.4) for o in (off, torch.zeros_like(off))]
    error = (v[0] - v[1]).square().mean((1, 2, 3)) * flow.loss_weight("residual", t, 0.4)
    torch.testing.assert_close(error, off.square().mean((1, 2, 3)))


@pytest.mark.parametrize("t", [0.02, 0.5, 1.0])
def test_no_output_makes_a_picture_that_is_not_finite(t: float) -> None:
    x_t, z = torch.randn(2, 1, 48, 8, 8)
    for size in (10.0, 1e3):
        output = size * torch.randn(1, 147, 8, 8)
        v = flow.to_velocity("log_affine", output, x_t, torch.tensor([t]), z, 0.4)
        x0 = x_t - t * v
        assert x0.isfinite().all()
        assert x0.abs().max() < 5


def test_clean_pictures_under_noise_lie_within_the_bounds_of_predictions() -> None:
    """Where nothing is corrected the bounds must not show, at any time."""
    x0 = torch.rand(1, 48, 16, 16) * 2 - 1
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).clamp(-4, 4)
    for t in torch.linspace(0.01, 1, 40):
        x_t = flow.interpolate(x0, noise, t[None])
        v = flow.to_velocity("log_affine", torch.zeros(1, 51, 16, 16), x_t, t[None], x0, 0.4)
        same = flow.to_velocity("residual", torch.zeros_like(x0), x_t, t[None], x0, 0.4)
        torch.testing.assert_close(v, same, rtol=0, atol=1e-3)
