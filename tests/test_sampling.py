"""Test priors and samples: image i depends only on i, and options follow their formulas."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.mixture import GaussianMixture
from torch import nn

from poise.errors import InputError
from poise.latent import DiagonalGaussian, variance_law
from poise.networks import infogan, second_stage
from poise.priors import (
    MixturePrior,
    NormalPrior,
    RenormalisedPrior,
    SecondStagePrior,
    expectation_maximisation,
    fit_mixture,
    renormalisation_factor,
)
from poise.sampling import fit_adjustment, sample
from poise.support.seeds import derive, generator, noise_per_image
from poise.vae import VAE


@pytest.fixture
def vae() -> VAE:
    return VAE(*infogan(8, 1, 4))


def codes(n: int = 3000) -> DiagonalGaussian:
    mean = torch.cat([torch.randn(n // 2, 2) * 0.1 - 0.8, torch.randn(n // 2, 2) * 0.1 + 0.8])
    return DiagonalGaussian(mean, torch.full_like(mean, 0.2).log())


def test_image_i_is_the_same_bits_whatever_the_number_drawn(vae):
    whole = sample(vae, NormalPrior(4), 230, seed=1)
    assert torch.equal(sample(vae, NormalPrior(4), 7, seed=1), whole[:7])
    assert torch.equal(sample(vae, NormalPrior(4), 50, seed=1, first=90), whole[90:140])
    assert not torch.equal(sample(vae, NormalPrior(4), 7, seed=2), whole[:7])


def test_noise_is_standard_normal_and_independent_between_images_and_seeds():
    noise = noise_per_image(2000, 5, seed=0)
    assert stats.kstest(noise.flatten(), "norm").pvalue > 1e-3
    neighbours = np.corrcoef(noise[:-1].flatten(), noise[1:].flatten())[0, 1]
    seeds = np.corrcoef(noise.flatten(), noise_per_image(2000, 5, seed=1).flatten())[0, 1]
    assert abs(neighbours) < 0.04 and abs(seeds) < 0.04


def test_noise_of_an_image_is_what_its_generator_gives():
    for dims in (3, 16, 33):
        rows = [
            torch.randn(dims, generator=generator("image", 7, number)) for number in range(-2, 5)
        ]
        assert torch.equal(noise_per_image(7, dims, seed=7, first=-2), torch.stack(rows))


def test_seeds_differ_by_every_part_and_are_stable():
    assert (
        len(
            {
                derive(*parts)
                for parts in [(1, 2), (2, 1), (12,), ("1", 2, 0), ("order", 0, 1), ("noise", 0, 1)]
            }
        )
        == 6
    )
    assert generator("a", 1).initial_seed() == derive("a", 1)


def test_the_mixture_draws_from_what_scikit_learn_fitted():
    posterior = codes()
    prior = fit_mixture(posterior, components=2)
    latents = posterior.sample(torch.randn(posterior.mean.shape, generator=generator("mixture", 0)))
    fitted = GaussianMixture(2, random_state=derive("mixture", 0) % 2**32).fit(
        latents.double().numpy()
    )
    drawn = prior.latents(noise_per_image(20_000, prior.noise_dims, seed=3))
    expected_mean = fitted.weights_ @ fitted.means_
    np.testing.assert_allclose(drawn.mean(0), expected_mean, atol=0.03)
    centred = fitted.means_ - expected_mean
    expected_cov = np.einsum(
        "k,kij->ij", fitted.weights_, fitted.covariances_ + centred[:, :, None] * centred[:, None]
    )
    np.testing.assert_allclose(np.cov(drawn.T.numpy()), expected_cov, atol=0.03)
    assert abs(float((drawn[:, 0] > 0).float().mean()) - 0.5) < 0.02


@pytest.mark.parametrize(("dims", "components"), [(1, 4), (3, 1), (8, 5)])
def test_expectation_maximisation_is_scikit_learns(dims, components):
    draws = np.random.default_rng(dims)
    values = draws.normal(size=(1500, dims)) @ draws.normal(size=(dims, dims)) + 3 * draws.integers(
        0, 3, (1500, 1)
    )
    fitted = GaussianMixture(components, random_state=7).fit(values)
    weights, means, factors = expectation_maximisation(
        torch.from_numpy(values), components, 7, torch.device("cpu")
    )
    np.testing.assert_allclose(weights, fitted.weights_, rtol=1e-5)
    np.testing.assert_allclose(means, fitted.means_, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(factors @ factors.mT, fitted.covariances_, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize(("mean", "logvar"), [(1e30, 0.0), (0.0, 800.0), (math.nan, 0.0)])
def test_codes_without_a_mixture_are_refused_in_one_line(mean, logvar):
    values = torch.randn(60, 3)
    values[::3] += mean
    codes = DiagonalGaussian(values, torch.full((60, 3), logvar))
    with pytest.raises(InputError, match="no mixture can be fitted to"):
        fit_mixture(codes, components=3)


def test_a_mixture_of_many_codes_is_fitted_to_some_chosen_at_random(monkeypatch):
    """The codes are sorted, so that the first ones alone would have another mean."""
    monkeypatch.setattr("poise.priors.mixture.MOST_CODES", 2_000)
    mean = torch.linspace(-1, 1, 20_000)[:, None]
    prior = fit_mixture(DiagonalGaussian(mean, torch.full_like(mean, -20.0)), components=1)
    # Tolerance: four standard errors.
    assert float(prior.means) == pytest.approx(0, abs=4 * (3 * 2_000) ** -0.5)
    assert float(prior.factors) == pytest.approx(3**-0.5, rel=0.05)


def test_mixture_components_are_chosen_by_weight():
    prior = MixturePrior(
        torch.tensor([0.2, 0.5, 0.3]), torch.tensor([[0.0], [10.0], [20.0]]), torch.zeros(3, 1, 1)
    )
    drawn = prior.latents(noise_per_image(20_000, 2, seed=0)).squeeze()
    shares = [(drawn == value).float().mean() for value in (0, 10, 20)]
    np.testing.assert_allclose(shares, [0.2, 0.5, 0.3], atol=0.01)


def test_second_stage_noise_has_the_decoders_variance():
    vae = VAE(*second_stage(3, 8))
    plain, noisy = SecondStagePrior(vae, 3, None), SecondStagePrior(vae, 3, torch.tensor(0.25))
    noise = noise_per_image(5000, 6, seed=0)
    difference = noisy.latents(noise) - plain.latents(noise[:, :3])
    torch.testing.assert_close(difference, 0.5 * noise[:, 3:])


def test_renormalised_latents_obey_the_variance_law():
    posterior = codes()
    target = variance_law(posterior.mean, posterior.logvar).mean().sqrt()
    assert renormalisation_factor(NormalPrior(2), posterior) == pytest.approx(float(target))
    prior = MixturePrior(torch.ones(1), torch.zeros(1, 2), 0.3 * torch.eye(2)[None])
    scaled = RenormalisedPrior(prior, renormalisation_factor(prior, posterior))
    drawn = scaled.latents(noise_per_image(20_000, 3, seed=9))
    assert float(drawn.std(0).mean()) == pytest.approx(float(target), rel=0.02)


def test_the_variance_adjustment_restores_the_standard_deviation():
    images = 0.5 + 0.05 * torch.randn(500, 1, 4, 4)
    adjusted = fit_adjustment(images, real_std=0.1)(images)
    assert float(adjusted.double().std(0, correction=0).mean()) == pytest.approx(0.1, rel=1e-3)
    torch.testing.assert_close(adjusted.mean(0), images.mean(0), atol=1e-3, rtol=0)
    wide = fit_adjustment(images, real_std=5.0)(images)
    assert wide.min() == 0 and wide.max() == 1


class Recorder(nn.Module):
    """A decoder that returns its latents as images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, latents):
        return self.weight * latents[:, :, None, None]


def test_samples_are_the_decoded_latents_of_their_noise():
    drawn = sample(VAE(nn.Identity(), Recorder()), NormalPrior(3), 12, seed=4, first=5)
    torch.testing.assert_close(drawn.squeeze(), noise_per_image(12, 3, seed=4, first=5))
