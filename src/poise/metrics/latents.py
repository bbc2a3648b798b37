"""Latent statistics: variance law, active units, KL per latent, and the aggregate posterior.

The latent page of each stage shows them. Statistics are float64.

Notation as in `poise.latent`: mu and s^2 are the posterior's mean and variance of one latent for
one image. The aggregate posterior is the mixture of all posteriors, q(z) = 1/n sum_i q(z|x_i). By
the law of total covariance its mean and covariance are exactly

    m = E[mu],        C = Cov(mu) + diag(E[s^2]),                                             (1)

so moments here divide by n, not n - 1. The prior is normal, so the divergence of the aggregate
posterior from it has two parts:

    KL(q(z) || N(0, I)) = KL(q(z) || N(m, C)) + KL(N(m, C) || N(0, I)).                       (2)

The second part has a closed form, 1/2 (tr C + |m|^2 - L - log det C). It is a lower bound of (2).
The mean over images of KL(q(z|x) || N(0, I)) is an upper bound. It exceeds (2) by the mutual
information of x and z (Hoffman & Johnson 2016).
"""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from poise.errors import InputError
from poise.latent import ACTIVE_VARIANCE, DiagonalGaussian, variance_law


@dataclass(frozen=True)
class AggregatePosterior:
    """Moments of the aggregate posterior, compared with the prior N(0, I).

    Attributes:
        mean_norm: |m|, 0 for the prior.
        covariance_eigenvalues: eigenvalues of C in descending order, each 1 for the prior. Their
            mean is the variance law.
        gaussian_kl_nats: KL(N(m, C) || N(0, I)), the part of the divergence that a rotation,
            scaling and shift of the prior removes. Infinite if C is singular in float64.
    """

    mean_norm: float
    covariance_eigenvalues: tuple[float, ...]
    gaussian_kl_nats: float


@dataclass(frozen=True)
class LatentStatistics:
    """Statistics of the latents over a data set.

    Tuples have one value per latent, in the encoder's order. Values that need the posterior's
    variance (variance law, E[s^2], KL) are None for deterministic codes.

    Attributes:
        variance_law: Var(mu) + E[s^2], mean over latents. It is 1 if the aggregate posterior
            matches the prior.
        variance_law_active: the same over active latents only; None if no latent is active.
        noise_term: noise term in the two laws: "E[s^2]", or "E[s]" for the released law.
        active_units: number of latents with Var(mu) > 0.01.
        latent_dim: number of all latents.
        variance_of_mean: Var(mu).
        mean_variance: E[s^2], for either `noise_term`.
        kl_nats_per_latent: KL(q(z|x) || N(0, I)) of each latent, mean over images. Their sum is
            the KL term of the loss.
        aggregate: moments of the aggregate posterior.
    """

    variance_law: float | None
    variance_law_active: float | None
    noise_term: str | None
    active_units: int
    latent_dim: int
    variance_of_mean: tuple[float, ...]
    mean_variance: tuple[float, ...] | None
    kl_nats_per_latent: tuple[float, ...] | None
    aggregate: AggregatePosterior

    def without_posterior(self) -> "LatentStatistics":
        """Return a copy without the values that need the posterior's variance."""
        none = dict.fromkeys(
            (
                "variance_law",
                "variance_law_active",
                "noise_term",
                "mean_variance",
                "kl_nats_per_latent",
            )
        )
        return replace(self, **none)


def latent_statistics(codes: DiagonalGaussian, *, released: bool = False) -> LatentStatistics:
    """Return the statistics of the latents: variance law, active units, KL, aggregate posterior.

    Args:
        codes: (n, latents), the posteriors of a data set, n >= 2.
        released: use E[s] instead of E[s^2] in the variance law, as the released code does.

    Raises:
        InputError: fewer than two codes, or values that are not finite.

    Example:
        >>> mean = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> codes = DiagonalGaussian(mean, torch.tensor([[-4.0, 0.0], [-4.0, 0.0]]))
        >>> statistics = latent_statistics(codes)
        >>> statistics.active_units, statistics.variance_of_mean, statistics.kl_nats_per_latent[1]
        (1, (1.0, 0.0), 0.0)
    """
    mean, logvar = _checked(codes)
    law = variance_law(mean, logvar, released=released)
    variance_of_mean, kl = (
        mean.var(0, correction=0),
        0.5 * (mean.square() + logvar.exp() - logvar - 1).mean(0),
    )
    active = variance_of_mean > ACTIVE_VARIANCE
    return LatentStatistics(
        variance_law=float(law.mean()),
        variance_law_active=float(law[active].mean()) if active.any() else None,
        noise_term="E[s]" if released else "E[s^2]",
        active_units=int(active.sum()),
        latent_dim=len(law),
        variance_of_mean=tuple(variance_of_mean.tolist()),
        mean_variance=tuple(logvar.exp().mean(0).tolist()),
        kl_nats_per_latent=tuple(kl.tolist()),
        aggregate=_aggregate(codes),
    )


def _checked(codes: DiagonalGaussian) -> tuple[Tensor, Tensor]:
    mean, logvar = codes.mean.detach().cpu().double(), codes.logvar.detach().cpu().double()
    if mean.dim() != 2 or mean.shape != logvar.shape or len(mean) < 2:
        shapes = f"{tuple(mean.shape)} and {tuple(logvar.shape)}"
        raise InputError(
            f"codes must be a mean and a logvar of one shape (n, latents) with n >= 2, not {shapes}"
        )
    if not (mean.isfinite().all() and logvar.isfinite().all() and logvar.exp().isfinite().all()):
        raise InputError(
            "codes and their variances must be finite; there are NaN or infinite values"
        )
    return mean, logvar


def aggregate_moments(codes: DiagonalGaussian) -> tuple[Tensor, Tensor]:
    """Return the mean and covariance of the aggregate posterior (eq. 1), float64.

    Args:
        codes: (n, latents), the posteriors of a data set, n >= 2.

    Returns:
        The mean (latents,) and the covariance (latents, latents).

    Raises:
        InputError: fewer than two codes, or values that are not finite.
    """
    mean, logvar = _checked(codes)
    centred = mean - mean.mean(0)
    return mean.mean(0), centred.T @ centred / len(mean) + logvar.exp().mean(0).diag()


def _aggregate(codes: DiagonalGaussian) -> AggregatePosterior:
    centre, covariance = aggregate_moments(codes)
    eigenvalues = torch.linalg.eigvalsh(covariance).flip(0)
    rounding = torch.finfo(torch.float64).eps * len(eigenvalues) * eigenvalues[0]
    # Eigenvalues below `rounding` are noise of either sign.
    singular = bool(eigenvalues[-1] <= rounding)
    kl = 0.5 * (
        eigenvalues.sum() + centre.square().sum() - len(eigenvalues) - eigenvalues.log().sum()
    )
    return AggregatePosterior(
        mean_norm=float(centre.norm()),
        covariance_eigenvalues=tuple(eigenvalues.clamp_min(0).tolist()),
        gaussian_kl_nats=math.inf if singular else float(kl),
    )
