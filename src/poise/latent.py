"""The latent space: the posterior q(z|x) = N(mean, diag(exp(logvar))), and what its codes say about a model.

Notation: mu and s^2 are the posterior's mean and variance of one latent for one image x.

KL divergence from the prior N(0, I), per image, summed over latents, in nats:

    KL = 1/2 sum (mu^2 + s^2 - log s^2 - 1)

Variance law. If the aggregate posterior equals the prior, then by the law of total variance, for each latent,

    Var_x(mu) + E_x[s^2] = 1.

An active latent carries information, so Var_x(mu) is large and E[s^2] small; an inactive one has Var_x(mu) near 0 and
E[s^2] near 1. The released code averages s where the law needs s^2; `variance_law(..., released=True)` does as it does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.shapes import Latents, PerImage, PerLatent

ACTIVE_VARIANCE = 0.01  # Burda et al. 2016, section 5.1: a unit is active if Var_x(mu) > 10^-2


@dataclass(frozen=True)
class DiagonalGaussian:
    """Normal distributions with diagonal covariance, one per image.

    Args:
        mean: (n, latents).
        logvar: (n, latents), the log *variance* (not the log standard deviation).
    """

    mean: Tensor
    logvar: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def std(self) -> Latents:
        return (0.5 * self.logvar).exp()

    def sample(self, noise: Latents) -> Latents:
        """Latents mean + std * noise, for standard normal `noise` of the shape of `mean`."""
        return self.mean + self.std * noise

    def kl(self) -> PerImage:
        """KL divergence from N(0, I): one value per image, summed over latents, in nats."""
        return gaussian_kl(self.mean, self.logvar)


def gaussian_kl(mean: Latents, logvar: Latents) -> PerImage:
    """KL(N(mean, exp(logvar)) || N(0, I)): one value per image, summed over latents, in nats.

    Computed in float32 or better. Source: Kingma & Welling 2014, appendix B.
    """
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, logvar = mean.to(dtype), logvar.to(dtype)
    return 0.5 * (mean.square() + logvar.exp() - logvar - 1.0).flatten(1).sum(1)


def variance_law(mean: Latents, logvar: Latents, *, released: bool = False) -> PerLatent:
    """Var_x(mu) + E_x[s^2] of each latent over all codes, float64. It is 1 where the aggregate posterior fits the prior.

    Args:
        mean, logvar: (n, latents), the posterior of every image of a data set.
        released: use E[s] in place of E[s^2], as the released code does. It overestimates the law.
    """
    mean, logvar = mean.double(), logvar.double()
    noise = (0.5 * logvar).exp().mean(0) if released else logvar.exp().mean(0)
    return mean.var(0, correction=0) + noise
