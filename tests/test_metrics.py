"""Compare metrics with closed forms and independent implementations."""

import math

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from skimage.metrics import structural_similarity as ssim_by_skimage
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.distributions import Normal

from poise.balance import ComputedBalance, FixedBalance
from poise.data.decoding import PixelMoments
from poise.errors import InputError
from poise.latent import DiagonalGaussian
from poise.metrics import encode_all, latent_statistics, pixel_std, reconstruction
from poise.metrics.reconstruction import peak_signal_to_noise, structural_similarity, summed_error
from poise.networks import mlp
from poise.vae import VAE
from test_likelihood import LATENTS, ProbabilisticPCA


class Affine(nn.Module):
    """An encoder (`logvar` given) or decoder that multiplies its input by 0.5."""

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
    # The posterior is so narrow that z = mean.
    vae, images = VAE(Affine(-40.0), Affine(None)), torch.rand(130, 1, 2, 2)
    balance = ComputedBalance(start=0.04, power=power)
    figures = reconstruction(vae, balance, images)
    decoder = distribution(images * 0.25, 0.2 if power == 2 else 0.04)
    likelihood = decoder.log_prob(images).flatten(1).sum(1)
    posterior = Normal(0.5 * images.flatten(1), math.exp(-20))
    kl = torch.distributions.kl_divergence(posterior, Normal(0.0, 1.0)).sum(1)
    assert figures.elbo_nats == pytest.approx(float((likelihood - kl).mean()), rel=1e-4)
    assert figures.mse == pytest.approx(float((0.75 * images).square().mean()), rel=1e-5)
    assert figures.bits_per_dim == pytest.approx(
        -figures.elbo_nats / 4 / math.log(2) + math.log2(255), rel=1e-9
    )
    assert figures.variance_lost == pytest.approx(
        float((1 - 1 / 16) * images.var(0, correction=0).mean()), rel=1e-3
    )


def by_skimage(a: Tensor, b: Tensor) -> list[float]:
    settings = {
        "gaussian_weights": True,
        "sigma": 1.5,
        "use_sample_covariance": False,
        "data_range": 1,
        "channel_axis": 0,
    }
    return [
        ssim_by_skimage(x, y, **settings)
        for x, y in zip(a.double().numpy(), b.double().numpy(), strict=True)
    ]


def noisy(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Return smooth images, and copies with noise from weak to strong."""
    images = torch.rand(shape).cumsum(2).cumsum(3) / (shape[2] * shape[3])
    return images, images + torch.linspace(0.001, 0.5, len(images)).view(-1, 1, 1, 1) * torch.randn(
        shape
    )


@pytest.mark.parametrize(
    "shape", [(13, 3, 32, 32), (12, 1, 11, 11), (3, 3, 12, 29), (2, 1, 64, 48)]
)
def test_similarities_equal_scikit_images(shape):
    images, others = noisy(shape)
    np.testing.assert_allclose(
        structural_similarity(images, others).numpy(), by_skimage(images, others), atol=1e-9
    )
    pairs = zip(images.double().numpy(), others.double().numpy(), strict=True)
    psnr = [peak_signal_noise_ratio(x, y, data_range=1) for x, y in pairs]
    np.testing.assert_allclose(peak_signal_to_noise(images, others).numpy(), psnr, rtol=1e-6)


def ssim_by_definition(x: np.ndarray, y: np.ndarray, width: int) -> float:
    """Return the SSIM of one channel, window by window (Wang et al. 2004, eq. 13)."""
    offsets = np.arange(width) - width // 2
    window = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for top in range(x.shape[0] - width + 1):
        for left in range(x.shape[1] - width + 1):
            a, b = (z[top : top + width, left : left + width] for z in (x, y))
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            spread = (window * ((a - mean_a) ** 2 + (b - mean_b) ** 2)).sum()
            covariance = (window * (a - mean_a) * (b - mean_b)).sum()
            brightness = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
            values.append(brightness * (2 * covariance + 9e-4) / (spread + 9e-4))
    return float(np.mean(values))


@pytest.mark.parametrize(
    "sides, width", [((8, 8), 7), ((9, 20), 9), ((10, 12), 9), ((12, 15), 11), ((2, 2), 1)]
)
def test_in_a_small_image_the_window_is_the_largest_odd_one_that_fits(sides, width):
    images, others = noisy((2, 2, *sides))
    expected = [
        np.mean([ssim_by_definition(a, b, width) for a, b in zip(x, y, strict=True)])
        for x, y in zip(images.double().numpy(), others.double().numpy(), strict=True)
    ]
    np.testing.assert_allclose(structural_similarity(images, others).numpy(), expected, atol=1e-12)


def test_similarities_of_equal_and_of_opposite_images():
    image = torch.rand(2, 3, 16, 16)
    np.testing.assert_allclose(structural_similarity(image, image).numpy(), 1, atol=1e-12)
    # Finite for equal images.
    np.testing.assert_allclose(
        peak_signal_to_noise(image, image).numpy(), 480 * math.log10(2), rtol=1e-12
    )
    black = torch.zeros(1, 1, 16, 16)
    assert float(structural_similarity(black, 1 - black)) == pytest.approx(
        1e-4 / (1 + 1e-4), rel=1e-9
    )
    assert float(peak_signal_to_noise(black, 1 - black)) == 0


def test_similarities_are_of_reconstructions_from_the_posterior_mean_and_means_over_images():
    vae, images = VAE(*mlp((3, 16, 16), 4, hidden=(8,))), torch.rand(130, 3, 16, 16)
    figures, restored = (
        reconstruction(vae, FixedBalance(), images),
        vae.eval().reconstruct(images).detach(),
    )
    assert figures.ssim == pytest.approx(np.mean(by_skimage(images, restored)), abs=1e-6)
    mse = (images - restored).double().square().mean((1, 2, 3))
    assert figures.psnr_db == pytest.approx(float((10 * (1 / mse).log10()).mean()), rel=1e-6)


def test_vectors_are_no_images_and_have_no_similarities_or_bits():
    vae, latents = VAE(*mlp(6, 3, hidden=(8,), output="linear")), 3 * torch.randn(40, 6)
    figures = reconstruction(vae, FixedBalance(), latents)
    assert figures.psnr_db is figures.ssim is figures.bits_per_dim is None
    assert all(
        value is not None and math.isfinite(value)
        for value in (figures.mse, figures.elbo_nats, figures.variance_lost)
    )


def test_variance_lost_is_the_error_where_the_decoder_is_optimal():
    """For samples of its posterior, probabilistic PCA decodes E[x|z].

    Lost variance and error are then both exactly sigma^2.
    """
    digits = torch.from_numpy(load_digits().data).float().view(-1, 1, 8, 8) / 16
    pca = ProbabilisticPCA(digits)
    figures = reconstruction(pca.vae(), pca.balance, digits)
    assert figures.mse_sampled == pytest.approx(pca.gamma2, rel=0.01)
    assert figures.variance_lost == pytest.approx(pca.gamma2, rel=0.03)
    assert figures.variance_lost_share == pytest.approx(
        figures.variance_lost / figures.mse_sampled, rel=1e-12
    )
    assert figures.variance_lost_share == pytest.approx(1, abs=0.03)

    # From the posterior mean, error and lost variance are both smaller, and differ.
    v, gamma2 = pca.variances, pca.gamma2
    restored = pca.vae().reconstruct(digits).detach().double()
    lost = float((digits.double().var(0, correction=0) - restored.var(0, correction=0)).mean())
    left_out = (64 - LATENTS) * gamma2
    assert figures.mse == pytest.approx((float((gamma2**2 / v).sum()) + left_out) / 64, rel=1e-4)
    assert lost == pytest.approx(
        (float((gamma2 * (2 - gamma2 / v)).sum()) + left_out) / 64, rel=1e-4
    )
    assert lost / figures.mse > 1.1


def test_no_variance_is_lost_without_an_error():
    class Copy(nn.Linear):
        def forward(self, values):
            return values, torch.full_like(values, -400.0)

    figures = reconstruction(VAE(Copy(3, 3), nn.Identity()), FixedBalance(), torch.randn(20, 3))
    assert (
        figures.mse_sampled == 0
        and figures.variance_lost == 0
        and figures.variance_lost_share is None
    )


def test_errors_are_summed_in_float64():
    difference = torch.full((1, 2, 200, 200), 0.1)
    assert summed_error(difference, 1).item() == pytest.approx(
        80_000 * float(difference[0, 0, 0, 0]), rel=1e-13
    )


def test_figures_do_not_depend_on_the_batch_or_on_training_mode():
    torch.manual_seed(0)
    vae, images = VAE(*mlp((1, 4, 4), 3, hidden=(8,))), torch.rand(250, 1, 4, 4)
    together = reconstruction(vae.train(), FixedBalance(gamma2=0.1), images)
    halves = [
        reconstruction(vae, FixedBalance(gamma2=0.1), part) for part in (images[:100], images[100:])
    ]
    assert together.mse == pytest.approx(
        (100 * halves[0].mse + 150 * halves[1].mse) / 250, rel=1e-6
    )
    assert together.kl_nats == pytest.approx(
        (100 * halves[0].kl_nats + 150 * halves[1].kl_nats) / 250, rel=1e-6
    )
    for name in ("ssim", "psnr_db"):
        first, second = (getattr(half, name) for half in halves)
        assert getattr(together, name) == pytest.approx(
            (100 * first + 150 * second) / 250, rel=1e-6
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_model_of_another_precision_is_refused(dtype):
    vae = VAE(*mlp((1, 8, 8), 2)).to(dtype)
    with pytest.raises(InputError, match=r"computes in float32: pass copy.deepcopy\(vae\).float"):
        reconstruction(vae, FixedBalance(), torch.rand(4, 1, 8, 8))


def test_bytes_and_floats_give_the_same_figures():
    vae = VAE(*mlp((1, 4, 4), 3, hidden=(8,)))
    pixels = np.random.default_rng(0).integers(0, 256, (20, 1, 4, 4), dtype=np.uint8)
    floats = torch.from_numpy(pixels).float() / 255
    assert reconstruction(vae, FixedBalance(), pixels) == reconstruction(
        vae, FixedBalance(), floats
    )
    torch.testing.assert_close(encode_all(vae, pixels).mean, vae.encode(floats).mean.detach())


def test_streamed_moments_equal_numpys():
    images = torch.rand(230, 1, 3, 3)
    moments = PixelMoments()
    for part in images.split(7):
        moments.add(part)
    np.testing.assert_allclose(
        moments.variance().numpy(), images.double().numpy().var(0), rtol=1e-10
    )
    assert pixel_std(images) == pytest.approx(
        float(images.double().numpy().std(0).mean()), rel=1e-10
    )


def test_latent_statistics_of_known_codes():
    mean = torch.randn(20_000, 3) * torch.tensor([0.9, 0.05, 0.5])
    logvar = torch.tensor([1 - 0.81, 1 - 0.0025, 1 - 0.25]).log().expand(20_000, 3)
    statistics = latent_statistics(DiagonalGaussian(mean, logvar))
    assert statistics.active_units == 2 and statistics.latent_dim == 3
    assert statistics.variance_law == pytest.approx(1, abs=0.01)
    assert (
        latent_statistics(DiagonalGaussian(mean, logvar), released=True).variance_law
        > statistics.variance_law
    )
