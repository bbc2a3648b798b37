"""Numbers against closed forms and independent implementations."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn
from torch.distributions import Normal

from poise.balance import ComputedBalance, FixedBalance
from poise.errors import InputError
from poise.images import PixelMoments
from poise.latent import DiagonalGaussian
from poise.metrics import encode_all, frechet_distance, latent_statistics, pixel_std, reconstruction
from poise.networks import mlp
from poise.vae import VAE


def features(n: int, d: int, seed: int) -> torch.Tensor:
    source = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=source) @ torch.randn(d, d, generator=source) + seed


def by_scipy(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.double().numpy(), b.double().numpy()
    cov_a, cov_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = scipy.linalg.sqrtm(cov_a @ cov_b).real
    return float(np.square(a.mean(0) - b.mean(0)).sum() + np.trace(cov_a + cov_b - 2 * root))


def test_frechet_distance_equals_scipys_matrix_square_root():
    a, b = features(200, 12, 0), features(150, 12, 1)
    assert frechet_distance(a, b) == pytest.approx(by_scipy(a, b), rel=1e-9)


def test_frechet_distance_holds_with_fewer_samples_than_features():
    a, b = features(20, 64, 0), features(30, 64, 1)
    # With A, B the centred samples over sqrt(n - 1): the trace term is the nuclear norm of A B^T, whatever the rank.
    half = [(x.double() - x.double().mean(0)) / math.sqrt(len(x) - 1) for x in (a, b)]
    cross = torch.linalg.svdvals(half[0] @ half[1].T).sum()
    mean = (a.double().mean(0) - b.double().mean(0)).square().sum()
    expected = float(mean + half[0].square().sum() + half[1].square().sum() - 2 * cross)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_known_gaussians():
    grid = Normal(0.0, 1.0).icdf((torch.arange(2000).double() + 0.5) / 2000)
    a, b = (grid / grid.std())[:, None], (3 * grid / grid.std() + 2)[:, None]
    assert frechet_distance(a, b) == pytest.approx(2**2 + (3 - 1) ** 2, rel=1e-9)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_refuses_what_it_cannot_compare(unchecked):
    for a, b in [(features(5, 3, 0), features(5, 4, 0)), (features(1, 3, 0), features(5, 3, 0))]:
        with pytest.raises(InputError, match="n >= 2 and equal d"):
            frechet_distance(a, b)
    with pytest.raises(InputError, match="NaN"):
        frechet_distance(features(5, 3, 0).log(), features(5, 3, 0))


class Affine(nn.Module):
    """An encoder or decoder whose codes and images are known."""

    def __init__(self, logvar: float | None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.logvar = logvar

    def forward(self, values):
        if self.logvar is None:
            return self.scale * values.reshape(-1, 1, 2, 2)
        return self.scale * values.flatten(1), torch.full_like(values.flatten(1), self.logvar)


@pytest.mark.parametrize("power, distribution", [(2, Normal), (1, torch.distributions.Laplace)])
def test_elbo_equals_torch_distributions(power, distribution):
    vae, images = VAE(Affine(-40.0), Affine(None)), torch.rand(130, 1, 2, 2)  # so narrow a posterior that z = mean
    balance = ComputedBalance(start=0.04, power=power)
    figures = reconstruction(vae, balance, images)
    decoder = distribution(images * 0.25, 0.2 if power == 2 else 0.04)
    likelihood = decoder.log_prob(images).flatten(1).sum(1)
    posterior = Normal(0.5 * images.flatten(1), math.exp(-20))
    kl = torch.distributions.kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)
    assert figures.elbo_nats == pytest.approx(float((likelihood - kl).mean()), rel=1e-4)
    assert figures.mse == pytest.approx(float((0.75 * images).square().mean()), rel=1e-5)
    assert figures.bits_per_dim == pytest.approx(-figures.elbo_nats / 4 / math.log(2) + math.log2(255), rel=1e-9)
    assert figures.variance_lost == pytest.approx(float((1 - 1 / 16) * images.var(0, correction=0).mean()), rel=1e-3)


def test_figures_do_not_depend_on_the_batch_or_on_training_mode():
    torch.manual_seed(0)
    vae, images = VAE(*mlp((1, 4, 4), 3, hidden=(8,))), torch.rand(250, 1, 4, 4)
    together = reconstruction(vae.train(), FixedBalance(gamma2=0.1), images)
    halves = [reconstruction(vae, FixedBalance(gamma2=0.1), part) for part in (images[:100], images[100:])]
    assert together.mse == pytest.approx((100 * halves[0].mse + 150 * halves[1].mse) / 250, rel=1e-6)
    assert together.kl_nats == pytest.approx((100 * halves[0].kl_nats + 150 * halves[1].kl_nats) / 250, rel=1e-6)


def test_bytes_and_floats_give_the_same_figures():
    vae = VAE(*mlp((1, 4, 4), 3, hidden=(8,)))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4), dtype=np.uint8)
    floats = torch.from_numpy(pixels).float() / 255
    assert reconstruction(vae, FixedBalance(), pixels) == reconstruction(vae, FixedBalance(), floats)
    torch.testing.assert_close(encode_all(vae, pixels).mean, vae.encode(floats).mean.detach())


def test_streamed_moments_equal_numpys():
    images = torch.rand(230, 1, 3, 3)
    moments = PixelMoments()
    for part in images.split(7):
        moments.add(part)
    np.testing.assert_allclose(moments.variance().numpy(), images.double().numpy().var(0), rtol=1e-10)
    assert pixel_std(images) == pytest.approx(float(images.double().numpy().std(0).mean()), rel=1e-10)


def test_latent_statistics_of_known_codes():
    mean = torch.randn(20_000, 3) * torch.tensor([0.9, 0.05, 0.5])
    logvar = torch.tensor([1 - 0.81, 1 - 0.0025, 1 - 0.25]).log().expand(20_000, 3)
    statistics = latent_statistics(DiagonalGaussian(mean, logvar))
    assert statistics.active_units == 2 and statistics.latent_dim == 3
    assert statistics.variance_law == pytest.approx(1, abs=0.01)
    assert latent_statistics(DiagonalGaussian(mean, logvar), released=True).variance_law > statistics.variance_law
