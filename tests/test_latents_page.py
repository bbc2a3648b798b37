"""Compare the latent page with numpy, torch.distributions, quadrature and known codes."""

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from poise.errors import InputError
from poise.latent import DiagonalGaussian
from poise.metrics import latent_statistics
from poise.metrics.latents import aggregate_moments


@pytest.fixture
def codes() -> DiagonalGaussian:
    """Return codes that are correlated, not centred, with one latent nearly collapsed."""
    mean = torch.randn(300, 4) @ torch.tensor(
        [[1.0, 0.5, 0, 0], [0, 0.7, 0, 0], [0, 0, 0.05, 0], [0, 0, 0, 0.8]]
    )
    return DiagonalGaussian(
        mean + torch.tensor([0.5, 0, 0, -1.0]),
        torch.randn(300, 4) - torch.tensor([3.0, 2.0, 0.0, 1.0]),
    )


def draws(codes: DiagonalGaussian, number: int) -> np.ndarray:
    """Return samples of the aggregate posterior: a random code, then a sample of its posterior."""
    chosen = torch.randint(len(codes.mean), (number,))
    some = DiagonalGaussian(codes.mean[chosen].double(), codes.logvar[chosen].double())
    return (some.mean + some.std * torch.randn(some.mean.shape, dtype=torch.float64)).numpy()


def test_moments_of_the_aggregate_posterior_are_those_of_a_huge_sample_of_it(codes):
    mean, covariance = aggregate_moments(codes)
    sample = draws(codes, 400_000)
    np.testing.assert_allclose(mean.numpy(), sample.mean(0), atol=0.01)
    np.testing.assert_allclose(covariance.numpy(), np.cov(sample, rowvar=False), atol=0.015)
    aggregate = latent_statistics(codes).aggregate
    eigenvalues = np.linalg.eigvalsh(np.cov(sample, rowvar=False))[::-1]
    np.testing.assert_allclose(aggregate.covariance_eigenvalues, eigenvalues, atol=0.015)
    assert aggregate.mean_norm == pytest.approx(np.linalg.norm(sample.mean(0)), abs=0.01)


def test_moments_are_numpys_over_n(codes):
    mean, covariance = aggregate_moments(codes)
    means, variances = codes.mean.double().numpy(), np.exp(codes.logvar.double().numpy())
    np.testing.assert_allclose(mean.numpy(), means.mean(0), rtol=1e-12)
    expected = np.cov(means, rowvar=False, ddof=0) + np.diag(variances.mean(0))
    np.testing.assert_allclose(covariance.numpy(), expected, rtol=1e-10, atol=1e-14)


def test_the_gaussian_divergence_is_torch_distributions(codes):
    mean, covariance = aggregate_moments(codes)
    prior = MultivariateNormal(torch.zeros(4).double(), torch.eye(4).double())
    expected = float(kl_divergence(MultivariateNormal(mean, covariance), prior))
    assert latent_statistics(codes).aggregate.gaussian_kl_nats == pytest.approx(expected, rel=1e-9)


def test_per_latent_values_are_torch_distributions_and_numpys(codes):
    statistics = latent_statistics(codes)
    posterior = Normal(codes.mean.double(), (0.5 * codes.logvar.double()).exp())
    expected = kl_divergence(posterior, Normal(0.0, 1.0)).mean(0)
    np.testing.assert_allclose(statistics.kl_nats_per_latent, expected.numpy(), rtol=1e-9)
    assert sum(statistics.kl_nats_per_latent) == pytest.approx(float(codes.kl().mean()), rel=1e-6)
    np.testing.assert_allclose(
        statistics.variance_of_mean, codes.mean.double().numpy().var(0), rtol=1e-9
    )
    np.testing.assert_allclose(
        statistics.mean_variance, posterior.variance.mean(0).numpy(), rtol=1e-9
    )


def test_the_variance_law_is_the_mean_of_the_eigenvalues_and_that_of_active_latents_leaves_out_the_others(
    codes,
):
    statistics = latent_statistics(codes)
    assert statistics.variance_law == pytest.approx(
        np.mean(statistics.aggregate.covariance_eigenvalues), rel=1e-9
    )
    assert statistics.active_units == 3 and statistics.latent_dim == 4, (
        "the third has a standard deviation of 0.05"
    )
    law = np.add(statistics.variance_of_mean, statistics.mean_variance)
    assert statistics.variance_law_active == pytest.approx(law[[0, 1, 3]].mean(), rel=1e-9)
    collapsed = DiagonalGaussian(torch.zeros(5, 2), torch.zeros(5, 2))
    assert latent_statistics(collapsed).variance_law_active is None


def test_the_released_law_changes_the_law_and_nothing_else(codes):
    plain, released = latent_statistics(codes), latent_statistics(codes, released=True)
    std = (0.5 * codes.logvar.double()).exp().mean(0).numpy()
    law = np.add(plain.variance_of_mean, std)
    assert released.noise_term == "E[s]" and plain.noise_term == "E[s^2]"
    assert released.variance_law == pytest.approx(law.mean(), rel=1e-9)
    assert released.variance_law_active == pytest.approx(law[[0, 1, 3]].mean(), rel=1e-9)
    for name in (
        "variance_of_mean",
        "mean_variance",
        "kl_nats_per_latent",
        "aggregate",
        "active_units",
        "latent_dim",
    ):
        assert getattr(released, name) == getattr(plain, name)


def test_codes_that_make_up_the_prior_differ_from_it_in_nothing():
    grid = Normal(0.0, 1.0).icdf((torch.arange(100).double() + 0.5) / 100)
    grid = grid / grid.std(correction=0)
    mean = 0.6 * torch.cartesian_prod(grid, grid)
    statistics = latent_statistics(
        DiagonalGaussian(mean, torch.full_like(mean, math.log(1 - 0.36)))
    )
    assert statistics.variance_law == pytest.approx(1, rel=1e-9)
    assert statistics.aggregate.covariance_eigenvalues == pytest.approx((1, 1), rel=1e-9)
    assert statistics.aggregate.mean_norm == pytest.approx(0, abs=1e-9)
    assert statistics.aggregate.gaussian_kl_nats == pytest.approx(0, abs=1e-9)
    assert sum(statistics.kl_nats_per_latent) == pytest.approx(-math.log(1 - 0.36), rel=1e-6), (
        "the information z carries"
    )


def test_the_gaussian_divergence_is_one_of_two_parts_of_the_whole():
    """KL(q || N(0, 1)) = KL(q || N(m, C)) + KL(N(m, C) || N(0, 1)), by quadrature.

    q is a mixture of two Gaussians in one dimension.
    """
    codes = DiagonalGaussian(
        torch.tensor([[-1.0], [2.0]]), torch.tensor([[math.log(0.3)], [math.log(0.6)]])
    )
    statistics = latent_statistics(codes)

    def density(z: float) -> float:
        return 0.5 * norm.pdf(z, -1, math.sqrt(0.3)) + 0.5 * norm.pdf(z, 2, math.sqrt(0.6))

    def divergence(mean: float, variance: float) -> float:
        def integrand(z: float) -> float:
            return density(z) * (math.log(density(z)) - norm.logpdf(z, mean, math.sqrt(variance)))

        return quad(integrand, -8, 8, limit=200)[0]

    whole = divergence(0, 1)
    mean, variance = 0.5, 0.45 + 1.5**2  # E[s^2] + Var(mu)
    assert statistics.aggregate.covariance_eigenvalues == pytest.approx((variance,), rel=1e-6)
    assert statistics.aggregate.gaussian_kl_nats == pytest.approx(
        whole - divergence(mean, variance), abs=1e-6
    )
    assert statistics.aggregate.gaussian_kl_nats < whole < sum(statistics.kl_nats_per_latent)


def test_a_singular_aggregate_is_infinitely_far_from_the_prior():
    """Codes without noise lie on a line: s^2 underflows to 0."""
    mean = torch.randn(50, 1) @ torch.tensor([[1.0, 2.0, -1.0]])
    aggregate = latent_statistics(DiagonalGaussian(mean, torch.full_like(mean, -1000.0))).aggregate
    assert aggregate.gaussian_kl_nats == math.inf
    assert (
        min(aggregate.covariance_eigenvalues) >= 0 and aggregate.covariance_eigenvalues[1] < 1e-12
    )


def test_two_codes_suffice_and_what_says_nothing_is_refused(unchecked):
    two = DiagonalGaussian(torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0]]), torch.zeros(2, 3))
    assert latent_statistics(two).variance_of_mean == (1, 0, 0)
    with pytest.raises(InputError, match="n >= 2"):
        latent_statistics(DiagonalGaussian(torch.zeros(1, 3), torch.zeros(1, 3)))
    with pytest.raises(InputError, match="n >= 2"):
        latent_statistics(DiagonalGaussian(torch.zeros(4, 3), torch.zeros(4, 2)))
    for mean, logvar in [
        (math.nan, 0.0),
        (math.inf, 0.0),
        (0.0, math.nan),
        (0.0, -math.inf),
        (0.0, 1000.0),
    ]:
        with pytest.raises(InputError, match="finite"):
            latent_statistics(
                DiagonalGaussian(torch.full((4, 2), mean), torch.full((4, 2), logvar))
            )


def test_order_does_not_matter_and_the_codes_stay_as_they_are(codes):
    order = torch.randperm(len(codes.mean))
    before = codes.mean.clone(), codes.logvar.clone()
    shuffled = latent_statistics(DiagonalGaussian(codes.mean[order], codes.logvar[order]))
    statistics = latent_statistics(codes)
    np.testing.assert_allclose(
        shuffled.kl_nats_per_latent, statistics.kl_nats_per_latent, rtol=1e-12
    )
    assert shuffled.aggregate.gaussian_kl_nats == pytest.approx(
        statistics.aggregate.gaussian_kl_nats, rel=1e-9
    )
    assert torch.equal(codes.mean, before[0]) and torch.equal(codes.logvar, before[1])
