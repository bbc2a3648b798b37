"""The Gaussian posterior q(z|x) = N(mean, diag(exp(logvar))), its KL divergence and variance law.

Notation: mu and s^2 are the posterior mean and variance of one latent for one image x.

KL divergence from the prior N(0, I), per image, summed over latents, in nats:

    KL = 1/2 sum (mu^2 + s^2 - log s^2 - 1).

Variance law. If the aggregate posterior equals the prior, then the law of total variance gives, for
each latent,

    Var_x(mu) + E_x[s^2] = 1.

An active latent carries information: Var_x(mu) is large and E_x[s^2] is small. An inactive latent
has Var_x(mu) near 0 and E_x[s^2] near 1. The released code averages s instead of s^2. To reproduce
it, use `variance_law(..., released=True)`.

Path between two codes a and b, for t from 0 to 1, where w is the angle between them (White 2016,
arXiv 1609.04468):

    z(t) = [sin((1 - t) w) a + sin(t w) b] / sin w.

In many dimensions the codes of images lie near a sphere about 0, and so does this arc. The middle
of a straight line is nearer to 0. There the decoder gives average images.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from poise.shapes import Batch, Latents, PerImage, PerLatent

ACTIVE_VARIANCE = 0.01  # a latent is active if Var_x(mu) > 0.01 (Burda et al. 2016, section 5.1)


@dataclass(frozen=True)
class DiagonalGaussian:
    """Represent Gaussians with diagonal covariance, one per image.

    Args:
        mean: (n, latents), or (n, ...) for latent maps.
        logvar: like mean, the log *variance* (not the log standard deviation).
    """

    mean: Tensor
    logvar: Tensor

    def __len__(self) -> int:
        return len(self.mean)

    @property
    def std(self) -> Batch:
        """Return the standard deviation of each latent, like `mean`."""
        return (0.5 * self.logvar).exp()

    def sample(self, noise: Batch) -> Batch:
        """Return latents mean + std * noise, like `mean`.

        Args:
            noise: like `mean`, standard normal.
        """
        return self.mean + self.std * noise

    def kl(self) -> PerImage:
        """Return the KL divergence from N(0, I) of each image, summed over latents, in nats."""
        return gaussian_kl(self.mean, self.logvar)


def gaussian_kl(mean: Batch, logvar: Batch) -> PerImage:
    """Return KL(N(mean, exp(logvar)) || N(0, I)) of each image, summed over latents, in nats.

    Computed in float32 or better.

    Args:
        mean, logvar: (n, ...). logvar is the log *variance*.

    Source: Kingma & Welling 2014, appendix B.
    """
    dtype = torch.promote_types(mean.dtype, torch.float32)
    mean, logvar = mean.to(dtype), logvar.to(dtype)
    return 0.5 * (mean.square() + logvar.exp() - logvar - 1.0).flatten(1).sum(1)


def variance_law(mean: Latents, logvar: Latents, *, released: bool = False) -> PerLatent:
    """Return Var_x(mu) + E_x[s^2] of each latent over all images, (latents,), float64.

    It is 1 if the aggregate posterior equals the prior.

    Args:
        mean, logvar: (n, latents), the posterior of every image of a data set.
        released: use E[s] in place of E[s^2], as the released code does. The result is too large.
    """
    mean, logvar = mean.double(), logvar.double()
    noise = (0.5 * logvar).exp().mean(0) if released else logvar.exp().mean(0)
    return mean.var(0, correction=0) + noise


def spherical_path(start: Tensor, end: Tensor, steps: int) -> Latents:
    """Return points on the arc between two codes, (steps, latents), equally spaced in angle.

    The ends are exact. If the codes point in the same or in opposite directions, or one of them is
    0, the path is a straight line.

    Args:
        start, end: (latents,) each.
        steps: number of points, at least 2.

    Source: White 2016, arXiv 1609.04468, section 2.1.

    Example:
        >>> spherical_path(torch.tensor([3.0, 0.0]), torch.tensor([0.0, 3.0]), 3)[1]
        tensor([2.1213, 2.1213])
    """
    a, b = start.double(), end.double()
    t = torch.linspace(0, 1, steps, dtype=torch.float64, device=a.device)[:, None]
    cosine = a @ b / (a.norm() * b.norm()).clamp_min(torch.finfo(torch.float64).tiny)
    angle = cosine.clamp(-1, 1).acos()
    if angle.sin() < 1e-6 or not (a.any() and b.any()):
        path = (1 - t) * a + t * b
    else:
        path = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    path[0], path[-1] = a, b
    return path.to(start.dtype)
