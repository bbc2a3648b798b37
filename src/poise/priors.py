"""Latent priors: what latents are drawn from. Each is a map from standard normal noise to latents.

GEN-1 draws z ~ N(0, I). The aggregate posterior of the training images differs from that; GEN-2 draws z from a second VAE
that has learned it (Dai & Wipf 2019), and a mixture of Gaussians fitted to the training codes is the cheap rival.

Latent renormalisation. Autoencoders lose variance, by about their MSE, and so does stage 2. The remedy of Asperti & Trentin
scales the latents by one scalar, without centring, to the standard deviation t that the variance law of the codes demands:
for GEN-2, z <- z t / (mean over dimensions of the standard deviation of z); for GEN-1, z <- z t. The release measures the
standard deviation over each generated batch; here it comes from a reference draw, so that image i does not depend on how
many others are drawn.
"""

import math
from typing import Protocol, final, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from poise.latent import DiagonalGaussian, variance_law
from poise.shapes import Latents, Noise, Scalar
from poise.support.seeds import REFERENCE_SEED, derive, generator, noise_per_image
from poise.vae import VAE

REFERENCE_DRAWS = 10_000
MOST_ITERATIONS, LEAST_GAIN, LEAST_VARIANCE = (
    100,
    1e-3,
    1e-6,
)  # scikit-learn's max_iter, tol (nats) and reg_covar
MOST_CODES = 20_000  # that a mixture is fitted to
LOST_SHARE = (
    0.25  # of stage 2's MSE: the released rule renormalises where more variance than this was lost
)


@runtime_checkable
class Prior(Protocol):
    """A distribution of latents: a function of standard normal noise with `noise_dims` columns."""

    @property
    def noise_dims(self) -> int: ...
    def latents(self, noise: Noise) -> Latents: ...


@final
class NormalPrior(nn.Module):
    """z ~ N(0, I): GEN-1."""

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.noise_dims = latent_dim

    def latents(self, noise: Noise) -> Latents:
        return noise


@final
class SecondStagePrior(nn.Module):
    """u ~ N(0, I) decoded by stage 2: GEN-2.

    Args:
        vae: stage 2.
        latent_dim: of stage 1, and as many of stage 2.
        gamma2: stage 2's decoder variance, for noise added to its output (Dai & Wipf); None: no noise (the release).
    """

    def __init__(self, vae: VAE, latent_dim: int, gamma2: Scalar | None) -> None:
        super().__init__()
        self.vae, self.latent_dim, self.gamma2 = vae, latent_dim, gamma2
        self.noise_dims = latent_dim if gamma2 is None else 2 * latent_dim

    @torch.no_grad()
    def latents(self, noise: Noise) -> Latents:
        mean = self.vae.eval().decode(noise[:, : self.latent_dim])
        return (
            mean if self.gamma2 is None else mean + self.gamma2.sqrt() * noise[:, self.latent_dim :]
        )


@final
class MixturePrior(nn.Module):
    """A mixture of Gaussians with full covariances.

    Args:
        weights: (components,), summing to 1.
        means: (components, latents).
        factors: (components, latents, latents), lower Cholesky factors of the covariances.
    """

    weights: Tensor
    means: Tensor
    factors: Tensor

    def __init__(self, weights: Tensor, means: Tensor, factors: Tensor) -> None:
        super().__init__()
        for name, value in (("weights", weights), ("means", means), ("factors", factors)):
            self.register_buffer(name, value)
        self.noise_dims = 1 + means.shape[1]

    def latents(self, noise: Noise) -> Latents:
        uniform = torch.special.ndtr(noise[:, 0])
        bounds = self.weights.cumsum(0)[:-1]
        component = torch.searchsorted(bounds, uniform)
        spread = torch.einsum("nij,nj->ni", self.factors[component], noise[:, 1:])
        return self.means[component] + spread


@final
class RenormalisedPrior(nn.Module):
    """Another prior's latents, scaled."""

    def __init__(self, prior: Prior, factor: float) -> None:
        super().__init__()
        self.prior, self.factor = prior, factor
        self.noise_dims = prior.noise_dims

    def latents(self, noise: Noise) -> Latents:
        return self.factor * self.prior.latents(noise)


def fit_mixture(
    codes: DiagonalGaussian,
    *,
    components: int = 10,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> MixturePrior:
    """A mixture fitted to latents drawn once from each training image's posterior, of 20,000 images chosen at random at most.

    A component of 64 latents has 2,145 parameters, and so as many images: more would move them little, and take their time.

    Args:
        codes: (n, latents), the posteriors of the training images.
        components: at most; fewer where there are fewer than ten images for each.
        seed: of the draw, the choice and the initialisation.
        device: where it is computed, in float64 (on the CPU where that has none). The mixture is returned on the CPU.
    """
    source, codes = (
        generator("mixture", seed),
        DiagonalGaussian(codes.mean.cpu(), codes.logvar.cpu()),
    )
    latents = codes.sample(torch.randn(codes.mean.shape, generator=source))
    if len(latents) > MOST_CODES:
        latents = latents[torch.randperm(len(latents), generator=source)[:MOST_CODES]]
    number = max(1, min(components, len(latents) // 10))
    place = torch.device(device if torch.device(device).type != "mps" else "cpu")
    return MixturePrior(
        *expectation_maximisation(latents.double(), number, derive("mixture", seed) % 2**32, place)
    )


def expectation_maximisation(
    values: Tensor, components: int, seed: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Fit a mixture of Gaussians with full covariances by expectation maximisation, from k-means on.

    The steps, their order and their end are those of scikit-learn's `GaussianMixture`, and so is the result; but they run on
    any device. On 16 cores scikit-learn took 27 s for 20,000 codes of 64 latents, more than all else that an evaluation of
    10,000 images on an H200 did (2026-11-26).

    Args:
        values: (n, dims), float64.
        components: how many.
        seed: of k-means.
        device: where to compute.

    Returns:
        Weights (components,), means (components, dims) and lower Cholesky factors of the covariances (components, dims,
        dims), float32 on the CPU.
    """
    from sklearn.cluster import KMeans

    kmeans = KMeans(components, n_init=1, random_state=seed)  # pyright: ignore[reportArgumentType]
    labels = kmeans.fit(values.numpy()).labels_
    shares = F.one_hot(torch.from_numpy(labels).long(), components).double().to(device)
    values = values.to(device)
    weights, means, factors = _maximised(values, shares)
    earlier = -math.inf
    for _ in range(MOST_ITERATIONS):
        log_densities = torch.stack(
            [_log_density(values, *part) for part in zip(weights, means, factors, strict=True)], 1
        )
        log_likelihoods = log_densities.logsumexp(1, keepdim=True)
        weights, means, factors = _maximised(values, (log_densities - log_likelihoods).exp())
        likelihood = float(log_likelihoods.mean())
        if abs(likelihood - earlier) < LEAST_GAIN:
            break
        earlier = likelihood
    return weights.float().cpu(), means.float().cpu(), factors.float().cpu()


def _maximised(values: Tensor, shares: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return weights, means and factors of the components, given the share (n, components) of each in each value."""
    counts = shares.sum(0) + 10 * torch.finfo(shares.dtype).eps
    means = shares.T @ values / counts[:, None]
    ridge = LEAST_VARIANCE * torch.eye(values.shape[1], dtype=values.dtype, device=values.device)
    factors = []
    for share, count, mean in zip(shares.T, counts, means, strict=True):
        centred = values - mean
        factors.append(
            torch.linalg.cholesky((share[:, None] * centred).T @ centred / count + ridge)
        )
    return counts / counts.sum(), means, torch.stack(factors)


def _log_density(values: Tensor, weight: Tensor, mean: Tensor, factor: Tensor) -> Tensor:
    """Return the log of a component's weight times its density at each value, (n,)."""
    whitened = torch.linalg.solve_triangular(factor, (values - mean).T, upper=False)
    constant = weight.log() - factor.diagonal().log().sum() - len(mean) / 2 * math.log(2 * math.pi)
    return constant - whitened.square().sum(0) / 2


def renormalisation_factor(
    prior: Prior,
    codes: DiagonalGaussian,
    *,
    released: bool = False,
    device: str | torch.device = "cpu",
) -> float:
    """The scalar that takes a prior's latents to the standard deviation the codes' variance law demands.

    Args:
        prior: a `NormalPrior` is scaled by t; any other by t over its own mean standard deviation.
        codes: the posteriors of the training images.
        released: use the released variance law (E[s] in place of E[s^2]).
        device: where the prior's networks are.
    """
    target = variance_law(codes.mean, codes.logvar, released=released).mean().sqrt()
    if isinstance(prior, NormalPrior):
        return float(target)
    noise = noise_per_image(REFERENCE_DRAWS, prior.noise_dims, seed=REFERENCE_SEED)
    produced = prior.latents(noise.to(device)).cpu().double().std(0, correction=0).mean()
    return float(target / produced)
