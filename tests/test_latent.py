"""Compare posterior and code statistics with torch.distributions and closed forms."""

import numpy as np
import pytest
import torch
from scipy.spatial import geometric_slerp
from torch.distributions import Normal, kl_divergence

from poise.latent import DiagonalGaussian, gaussian_kl, spherical_path, variance_law


@pytest.fixture
def posterior() -> DiagonalGaussian:
    mean, logvar = torch.randn(2, 6, 5)
    return DiagonalGaussian(mean, 2 * logvar)


def test_kl_is_that_of_torch_distributions(posterior):
    expected = kl_divergence(Normal(posterior.mean, posterior.std), Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(posterior.kl(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        DiagonalGaussian(torch.zeros(3, 5), torch.zeros(3, 5)).kl(), torch.zeros(3)
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_kl_of_half_precision_codes_is_computed_in_float32(posterior, dtype):
    mean, logvar = posterior.mean.to(dtype), posterior.logvar.to(dtype)
    torch.testing.assert_close(
        gaussian_kl(mean, logvar), gaussian_kl(mean.float(), logvar.float()), rtol=0, atol=0
    )


def test_samples_have_the_moments_of_the_posterior():
    mean, logvar = torch.tensor([[-1.0, 0.0, 3.0]]), torch.tensor([[-4.0, 0.0, 1.0]])
    n = 100_000
    samples = DiagonalGaussian(mean.expand(n, -1), logvar.expand(n, -1)).sample(torch.randn(n, 3))
    # 0.03 is 5 standard errors of the widest latent.
    torch.testing.assert_close(samples.mean(0), mean[0], rtol=0, atol=0.03)
    torch.testing.assert_close(samples.var(0), logvar[0].exp(), rtol=0.03, atol=0)


def linear_gaussian_codes() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the exact posterior of x = W z + e, W with orthogonal columns.

    The moments of the data are exactly those of the model.
    """
    noise_variance = 0.3
    weight = torch.linalg.qr(torch.randn(8, 3, dtype=torch.float64)).Q * torch.tensor(
        [0.1, 1.0, 4.0]
    )
    precision = weight.T @ weight / noise_variance + torch.eye(3)
    raw = torch.randn(500, 8, dtype=torch.float64)
    white = torch.linalg.qr(raw - raw.mean(0)).Q * 500**0.5
    data = (
        white
        @ torch.linalg.cholesky(
            weight @ weight.T + noise_variance * torch.eye(8, dtype=torch.float64)
        ).T
    )
    mean = data @ weight @ precision.inverse() / noise_variance
    variance = precision.inverse().diag()
    return mean, variance.log().expand_as(mean), variance


def test_variance_law_is_one_for_an_exact_posterior():
    mean, logvar, _ = linear_gaussian_codes()
    torch.testing.assert_close(
        variance_law(mean, logvar), torch.ones(3, dtype=torch.float64), rtol=1e-10, atol=0
    )


def test_the_released_variance_law_is_too_large_by_the_difference_of_std_and_variance():
    mean, logvar, variance = linear_gaussian_codes()
    excess = variance_law(mean, logvar, released=True) - 1
    assert (excess > 0).all()
    torch.testing.assert_close(excess, variance.sqrt() - variance, rtol=1e-10, atol=1e-12)


def test_the_path_between_codes_of_equal_norm_is_that_of_scipy_and_stays_on_their_sphere():
    a, b = torch.nn.functional.normalize(torch.randn(2, 7, dtype=torch.float64)).unbind()
    path = spherical_path(4 * a, 4 * b, 9)
    expected = 4 * geometric_slerp(a.numpy(), b.numpy(), np.linspace(0, 1, 9))
    torch.testing.assert_close(path, torch.from_numpy(expected))
    torch.testing.assert_close(path.norm(dim=1), torch.full((9,), 4.0, dtype=torch.float64))


@pytest.mark.parametrize("factor", [2.0, 1.0, 0.0, -1.0])
def test_the_path_between_parallel_codes_is_a_straight_line(factor):
    a = torch.tensor([1.0, -2.0, 3.0])
    path = spherical_path(a, factor * a, 5)
    straight = torch.linspace(1, factor, 5)[:, None] * a
    torch.testing.assert_close(path, straight, rtol=1e-6, atol=1e-6)


def test_the_path_ends_exactly_at_its_codes(posterior):
    a, b = posterior.mean[:2]
    path = spherical_path(a, b, 2)
    assert torch.equal(path, torch.stack([a, b]))
