"""Latent priors: what latents are drawn from. Each is a map from standard normal noise to latents.

GEN-1 draws z ~ N(0, I). The aggregate posterior of the training images differs from that; GEN-2 draws z from a second VAE
that has learned it (Dai & Wipf 2019), and a mixture of Gaussians fitted to the training codes is the cheap rival.

Latent renormalisation. Autoencoders lose variance, by about their MSE, and so does stage 2. The remedy of Asperti & Trentin
scales the latents by one scalar, without centring, to the standard deviation t that the variance law of the codes demands:
for GEN-2, z <- z t / (mean over dimensions of the standard deviation of z); for GEN-1, z <- z t. The release measures the
standard deviation over each generated batch; here it comes from a reference draw, so that image i does not depend on how
many others are drawn.
"""

from typing import Protocol, final, runtime_checkable

import torch
from torch import Tensor, nn

from poise.latent import DiagonalGaussian, variance_law
from poise.seeds import REFERENCE_SEED, derive, generator, noise_per_image
from poise.shapes import Latents, Noise, Scalar
from poise.vae import VAE

REFERENCE_DRAWS = 10_000
MOST_CODES = 20_000  # that a mixture is fitted to
LOST_SHARE = 0.25  # of stage 2's MSE: the released rule renormalises where more variance than this was lost


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
        return mean if self.gamma2 is None else mean + self.gamma2.sqrt() * noise[:, self.latent_dim :]


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


def fit_mixture(codes: DiagonalGaussian, *, components: int = 10, seed: int = 0) -> MixturePrior:
    """A mixture fitted to latents drawn once from each training image's posterior, of 20,000 images chosen at random at most.

    A component of 64 latents has 2,145 parameters, and so as many images: more would move them little, and take their time.

    Args:
        codes: (n, latents), the posteriors of the training images.
        components: at most; fewer where there are fewer than ten images for each.
        seed: of the draw, the choice and scikit-learn's initialisation.
    """
    from sklearn.mixture import GaussianMixture

    source = generator("mixture", seed)
    latents = codes.sample(torch.randn(codes.mean.shape, generator=source))
    if len(latents) > MOST_CODES:
        latents = latents[torch.randperm(len(latents), generator=source)[:MOST_CODES]]
    number = max(1, min(components, len(latents) // 10))
    mixture = GaussianMixture(number, covariance_type="full", random_state=derive("mixture", seed) % 2**32).fit(
        latents.double().numpy()
    )
    factors = torch.linalg.cholesky(torch.as_tensor(mixture.covariances_))
    return MixturePrior(torch.as_tensor(mixture.weights_).float(), torch.as_tensor(mixture.means_).float(), factors.float())


def renormalisation_factor(
    prior: Prior, codes: DiagonalGaussian, *, released: bool = False, device: str | torch.device = "cpu"
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
