"""Compare importance-weighted likelihoods with probabilistic PCA and quadrature."""

import math
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import laplace, multivariate_normal, norm
from sklearn.datasets import load_digits
from torch import Tensor, nn

from poise.balance import Balance, ComputedBalance, FixedBalance
from poise.errors import InputError
from poise.latent import DiagonalGaussian
from poise.metrics import encoding, reconstruction, target
from poise.metrics.likelihood import BLOCK, importance_weighted_nll, nll_of_values, nll_per_image
from poise.networks import mlp
from poise.vae import VAE

LATENTS, IMAGES = 5, 60
# Most tests are about the encoder's posterior as proposal.
under_encoder = partial(nll_per_image, proposal="encoder")
mean_under_encoder = partial(importance_weighted_nll, proposal="encoder")


@pytest.fixture(scope="module")
def digits() -> Tensor:
    return torch.from_numpy(load_digits().data[:IMAGES]).float().view(-1, 1, 8, 8) / 16


class ProbabilisticPCA:
    """Probabilistic PCA of images as a VAE with the true posterior, or a wider and shifted one.

    The columns u sqrt(v - gamma2) of W are orthogonal. The true posterior therefore has independent
    latents of variance gamma2 / v.
    """

    def __init__(self, images: Tensor) -> None:
        pixels = images.flatten(1).double()
        self.mean = pixels.mean(0)
        variances, axes = torch.linalg.eigh(pixels.T.cov(correction=0))
        self.gamma2 = float(variances[:-LATENTS].mean())
        self.variances, axes = variances[-LATENTS:], axes[:, -LATENTS:]
        self.weight = axes * (self.variances - self.gamma2).sqrt()
        self.covariance = self.weight @ self.weight.T + self.gamma2 * torch.eye(len(self.mean))

    @property
    def balance(self) -> Balance:
        return FixedBalance(gamma2=self.gamma2)

    def vae(self, *, wider: float = 1.0, shifted: float = 0.0) -> VAE:
        """Return the VAE with a changed posterior.

        Args:
            wider: factor on the true standard deviations.
            shifted: shift of the means, in true standard deviations.
        """
        encoder, decoder = mlp((1, 8, 8), LATENTS, hidden=(), output="linear")
        std = (self.gamma2 / self.variances).sqrt()
        infer = (self.weight / self.variances).T
        with torch.no_grad():
            encoder.mean.weight.copy_(infer)
            encoder.mean.bias.copy_(shifted * std - infer @ self.mean)
            encoder.log_std.weight.zero_()
            encoder.log_std.bias.copy_((wider * std).log())
            decoder.layers[0].weight.copy_(self.weight)
            decoder.layers[0].bias.copy_(self.mean)
        return VAE(encoder, decoder)

    def nll(self, images: Tensor) -> np.ndarray:
        return -multivariate_normal(self.mean.numpy(), self.covariance.numpy()).logpdf(
            images.flatten(1).double().numpy()
        )

    def elbo_gap(self, wider: float, shifted: float) -> float:
        """Return KL(q(z|x) || p(z|x)) in nats, the same for all images."""
        return LATENTS * (0.5 * (wider**2 + shifted**2 - 1) - math.log(wider))


@pytest.fixture(scope="module")
def pca(digits) -> ProbabilisticPCA:
    return ProbabilisticPCA(digits)


def test_with_the_true_posterior_one_sample_gives_each_images_exact_likelihood(digits, pca):
    one = under_encoder(pca.vae(), pca.balance, digits, samples=1)
    many = under_encoder(pca.vae(), pca.balance, digits, samples=250)
    np.testing.assert_allclose(one.nll_nats.numpy(), pca.nll(digits), atol=2e-3)
    np.testing.assert_allclose(many.nll_nats.numpy(), pca.nll(digits), atol=2e-3)
    np.testing.assert_allclose(many.effective_share.numpy(), 1, atol=1e-6)


@pytest.mark.parametrize("wider, shifted", [(1.4, 0.0), (1.0, 0.5), (1.3, -0.4)])
def test_with_a_wrong_posterior_enough_samples_come_within_a_tenth_of_a_nat_where_the_elbo_is_below(
    digits, pca, wider, shifted
):
    vae = pca.vae(wider=wider, shifted=shifted)
    exact = pca.nll(digits)
    nll = under_encoder(vae, pca.balance, digits, samples=500).nll_nats.numpy()
    assert nll.mean() == pytest.approx(exact.mean(), abs=0.03)
    assert np.abs(nll - exact).max() < 0.3
    elbo = np.mean(
        [reconstruction(vae, pca.balance, digits, seed=seed).elbo_nats for seed in range(20)]
    )
    gap = pca.elbo_gap(wider, shifted)
    assert gap > 0.3 and elbo == pytest.approx(-exact.mean() - gap, abs=0.2)
    assert elbo < -nll.mean()


def test_one_sample_gives_the_negative_elbo_on_average_and_more_samples_less(digits, pca):
    wider, shifted = 1.3, 0.5
    vae = pca.vae(wider=wider, shifted=shifted)
    means = [
        np.mean(
            [
                mean_under_encoder(vae, pca.balance, digits, samples=k, seed=s).mean_nats
                for s in range(8)
            ]
        )
        for k in (1, 4, 16, 64)
    ]
    assert means[0] == pytest.approx(pca.nll(digits).mean() + pca.elbo_gap(wider, shifted), abs=0.2)
    assert all(few - more > 0.03 for few, more in pairwise(means)), means
    assert means[-1] > pca.nll(digits).mean()


def test_the_figures_are_those_of_the_images(digits, pca):
    vae = pca.vae(wider=1.5)
    likelihood, each = (
        f(vae, pca.balance, digits, samples=30) for f in (mean_under_encoder, under_encoder)
    )
    nll = each.nll_nats.numpy()
    assert likelihood.samples == 30
    assert likelihood.mean_nats == pytest.approx(nll.mean(), rel=1e-12)
    assert likelihood.standard_error_nats == pytest.approx(
        nll.std(ddof=1) / math.sqrt(IMAGES), rel=1e-12
    )
    assert likelihood.bits_per_dim == pytest.approx(
        (nll.mean() / 64 + math.log(255)) / math.log(2), rel=1e-12
    )
    assert likelihood.effective_share == pytest.approx(
        float(each.effective_share.mean()), rel=1e-12
    )
    assert 1 / 30 <= float(each.effective_share.min()) < likelihood.effective_share < 1


def test_the_effective_share_is_what_the_weights_second_moment_says(digits, pca):
    """K / ESS tends to E_q[w^2] / E_q[w]^2 = c^2 / sqrt(2 c^2 - 1) per latent.

    This holds for q = N(0, c^2) and target N(0, 1).
    """
    share = under_encoder(
        pca.vae(wider=1.5), pca.balance, digits[:20], samples=4000
    ).effective_share
    assert float(share.mean()) == pytest.approx(
        (math.sqrt(2 * 1.5**2 - 1) / 1.5**2) ** LATENTS, rel=0.02
    )


def test_an_image_does_not_depend_on_the_others_or_on_the_chunks(digits, pca, monkeypatch):
    vae = pca.vae(wider=1.5)
    together = under_encoder(vae, pca.balance, digits, samples=BLOCK + 5)
    alone = under_encoder(vae, pca.balance, digits[:7], samples=BLOCK + 5)
    torch.testing.assert_close(together.nll_nats[:7], alone.nll_nats, rtol=0, atol=1e-3)
    others = digits.flip(0)
    others[3] = digits[3]
    swapped = under_encoder(vae, pca.balance, others, samples=BLOCK + 5)
    torch.testing.assert_close(together.nll_nats[3], swapped.nll_nats[3], rtol=0, atol=1e-3)
    monkeypatch.setattr(encoding, "CHUNK", 13)
    torch.testing.assert_close(
        under_encoder(vae, pca.balance, digits, samples=BLOCK + 5).nll_nats,
        together.nll_nats,
        rtol=0,
        atol=1e-3,
    )


def test_seeds_differ_images_differ_and_blocks_differ(digits, pca):
    vae, same = pca.vae(wider=1.5), digits[:1].expand(4, 1, 8, 8)
    first, again, second = (
        under_encoder(vae, pca.balance, same, samples=3, seed=seed).nll_nats for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert len(set(first.tolist() + second.tolist())) == 8
    share = under_encoder(vae, pca.balance, digits[:1], samples=2 * BLOCK).effective_share
    once = under_encoder(vae, pca.balance, digits[:1], samples=BLOCK).effective_share
    assert float(share) != pytest.approx(float(once), rel=1e-3), (
        "the second block would be the first again"
    )


def test_samples_beyond_a_whole_block_count(digits, pca):
    """Each further sample adds a weight between 0 and 1.5^5, across the end of a block too.

    All sums are over the first K weights of one stream.
    """
    vae, image = pca.vae(wider=1.5), digits[:1]

    def total(samples: int) -> float:
        nll = under_encoder(vae, pca.balance, image, samples=samples).nll_nats
        return samples * math.exp(pca.nll(image).item() - nll.item())

    totals = [total(samples) for samples in range(BLOCK - 3, BLOCK + 5)]
    assert all(0 < more - less < 1.5**LATENTS + 0.1 for less, more in pairwise(totals))


class Counting(nn.Module):
    """A decoder that records its batch sizes."""

    def __init__(self, decoder: nn.Module) -> None:
        super().__init__()
        self.decoder, self.sizes = decoder, []

    def forward(self, latents):
        self.sizes.append(len(latents))
        return self.decoder(latents)


def test_no_more_than_a_block_of_latents_is_decoded_at_a_time(digits, pca, monkeypatch):
    monkeypatch.setattr(target, "VALUES_AT_ONCE", {"cpu": 1})
    vae = pca.vae()
    vae.decoder = Counting(vae.decoder)
    under_encoder(vae, pca.balance, digits[:3], samples=5 * BLOCK + 1)
    assert max(vae.decoder.sizes) == BLOCK and sum(vae.decoder.sizes) == 3 * (5 * BLOCK + 1)


class Bent(nn.Module):
    """A decoder of one latent and two values, without a closed form."""

    def forward(self, latents):
        return torch.cat([latents.sin(), 0.5 * latents.square()], 1)


class Constant(nn.Module):
    """An encoder with the same posterior for all images."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = nn.Parameter(torch.tensor(mean)), std

    def forward(self, values):
        shape = (len(values), 1)
        return self.mean.expand(shape), torch.full(shape, 2 * math.log(self.std))


@pytest.mark.parametrize("proposal, samples", [("encoder", 20_000), ("refined", 2_000)])
@pytest.mark.parametrize("power, gamma2", [(1, 0.2), (2, 0.2), (1, [0.2, 0.3]), (2, [0.2, 0.05])])
def test_any_decoder_and_error_agree_with_quadrature(power, gamma2, proposal, samples):
    """With two groups each of the two values has a gamma2 of its own."""
    values = torch.tensor([[0.3, 0.1], [-0.6, 0.9], [0.9, 0.2]])
    groups = {"groups": 2, "per": "channel"} if isinstance(gamma2, list) else {}
    balance = ComputedBalance(power=power, **groups)
    balance.gamma2.copy_(torch.tensor(gamma2))
    of_a, of_b = (
        laplace(scale=g) if power == 1 else norm(scale=math.sqrt(g))
        for g in balance.gamma2.expand(2).tolist()
    )
    likelihood = nll_per_image(
        VAE(Constant(0.2, 1.2), Bent()), balance, values, samples=samples, proposal=proposal
    )
    for (a, b), nll in zip(values.tolist(), likelihood.nll_nats.tolist(), strict=True):

        def density(z, a=a, b=b):
            return norm.pdf(z) * of_a.pdf(a - math.sin(z)) * of_b.pdf(b - z * z / 2)

        exact, _ = quad(
            density, -6, 6, limit=200, points=[math.asin(a), math.sqrt(2 * b), -math.sqrt(2 * b)]
        )
        assert nll == pytest.approx(-math.log(exact), abs=0.03)
    figures = mean_under_encoder(VAE(Constant(0.2, 1.2), Bent()), FixedBalance(), values, samples=5)
    assert figures.bits_per_dim is None, "two numbers are not an image"


class Folded(nn.Module):
    """A decoder with the same output for z and -z: the true posterior has two modes."""

    def forward(self, latents):
        return latents.abs()


def test_a_posterior_that_misses_a_mode_looks_trustworthy_and_is_wrong_by_log_2():
    """A posterior with one of two modes has a high effective share but a wrong likelihood.

    For x far from 0, p(z|x) is half N(mu, s^2), half N(-mu, s^2).
    """
    value, gamma2 = 2.0, 0.01
    mean, variance = value / (1 + gamma2), gamma2 / (1 + gamma2)
    exact = -norm.logpdf(value, scale=math.sqrt(1 + gamma2)) - math.log(2)
    vae = VAE(Constant(mean, math.sqrt(variance)), Folded())
    blind = under_encoder(vae, FixedBalance(gamma2=gamma2), torch.tensor([[value]]), samples=1000)
    assert float(blind.nll_nats) == pytest.approx(exact + math.log(2), abs=1e-3)
    assert float(blind.effective_share) > 0.99
    seeing = under_encoder(
        VAE(Constant(0.0, 2.0), Folded()),
        FixedBalance(gamma2=gamma2),
        torch.tensor([[value]]),
        samples=20_000,
    )
    assert float(seeing.nll_nats) == pytest.approx(exact, abs=0.05)
    assert float(seeing.effective_share) < 0.2
    refined = nll_per_image(vae, FixedBalance(gamma2=gamma2), torch.tensor([[value]]), samples=500)
    assert float(refined.nll_nats) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("wider, shifted", [(0.5, 2.0), (1.5, 0.0)])
def test_a_refined_proposal_gives_the_exact_density_of_a_linear_model(digits, pca, wider, shifted):
    """The rows are the digits, and digits of 30 times the brightness."""
    images = torch.cat([digits[:20], 30 * digits[:20]])
    vae, exact = pca.vae(wider=wider, shifted=shifted).double(), pca.nll(images)
    with torch.no_grad():
        posterior = vae.encode(images.double())
    each = nll_of_values(vae, pca.balance, images.double(), posterior, samples=200)
    assert np.abs(each.nll_nats.numpy() - exact).max() < 0.01
    assert float(each.effective_share.min()) > 0.6
    assert float(each.standard_error_nats.max()) < 0.01
    narrow = under_encoder(pca.vae(wider=0.5, shifted=2.0), pca.balance, digits[:20], samples=200)
    assert np.abs(narrow.nll_nats.numpy() - exact[:20]).max() > 1


@pytest.mark.parametrize("latents, reach, points", [(1, 40, 100_001), (2, 9, 601)])
def test_refined_proposals_agree_with_quadrature_for_rows_near_and_far(latents, reach, points):
    """The decoder is a network of kinks, whose posteriors are skewed, peaked or have many modes."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(latents, 12), nn.ReLU(), nn.Linear(12, 3)).double()
    near = decoder(torch.randn(9, latents).double()) + 0.2 * torch.randn(9, 3)
    rows = torch.cat([near, 4 * near]).detach()
    axis = torch.linspace(-reach, reach, points, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * latents).view(-1, latents)
    with torch.no_grad():
        log_joint = [-((row - decoder(grid)).square().sum(1) / 0.08) for row in rows]
    constant = 1.5 * math.log(2 * math.pi * 0.04) + latents / 2 * math.log(2 * math.pi)
    prior = grid.square().sum(1) / 2
    cell = latents * math.log(2 * reach / (points - 1))
    exact = torch.stack([(part - prior).logsumexp(0) for part in log_joint]) + cell - constant
    each = nll_of_values(
        VAE(nn.Identity(), decoder),
        FixedBalance(gamma2=0.04),
        rows,
        DiagonalGaussian(torch.zeros(18, latents), torch.zeros(18, latents)),
        samples=200,
        most=4_000,
    )
    assert float((each.nll_nats + exact).abs().max()) < 0.05
    assert float(each.standard_error_nats.max()) < 0.05


def test_a_value_without_a_density_does_not_spoil_the_others(pca, digits):
    vae, values = pca.vae(), digits[:3].flatten(1).clone()
    values[1] = math.inf
    posterior = DiagonalGaussian(torch.zeros(3, LATENTS), torch.zeros(3, LATENTS))
    vae.decoder.layers[1] = nn.Identity()  # rows in place of images
    each = nll_of_values(vae, pca.balance, values, posterior, samples=100)
    assert each.nll_nats.isfinite().tolist() == [True, False, True]
    assert each.nll_nats[1] == math.inf and each.standard_error_nats[1] == math.inf


def test_the_error_of_one_sample_is_infinite(pca, digits):
    each = nll_per_image(pca.vae(), pca.balance, digits[:3], samples=1)
    assert each.standard_error_nats.isinf().all()


def test_what_cannot_be_estimated_is_refused(digits, pca, unchecked):
    vae = pca.vae()
    with pytest.raises(InputError, match="samples must be at least 1, not 0"):
        under_encoder(vae, pca.balance, digits, samples=0)
    with pytest.raises(InputError, match="proposal must be refined or encoder, not 'best'"):
        nll_per_image(vae, pca.balance, digits, proposal="best")
    with pytest.raises(InputError, match="at least 2 images, not 1"):
        mean_under_encoder(vae, pca.balance, digits[:1])
    with pytest.raises(InputError, match="no images"):
        under_encoder(vae, pca.balance, digits[:0])
    with torch.no_grad():
        vae.encoder.log_std.bias.fill_(math.nan)
    with pytest.raises(InputError, match="NaN"):
        under_encoder(vae, pca.balance, digits, samples=1)


def test_blocks_that_are_decoded_together_give_the_same_estimate(digits, monkeypatch):
    model = ProbabilisticPCA(digits)
    apart = under_encoder(model.vae(wider=1.2), model.balance, digits[:7], samples=730)
    monkeypatch.setattr(target, "VALUES_AT_ONCE", {"cpu": 64 * 3 * BLOCK})
    together = under_encoder(model.vae(wider=1.2), model.balance, digits[:7], samples=730)
    torch.testing.assert_close(together.nll_nats, apart.nll_nats, rtol=1e-7, atol=1e-6)
    torch.testing.assert_close(together.effective_share, apart.effective_share, rtol=1e-4, atol=0)
