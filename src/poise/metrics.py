"""Numbers: how well a model reconstructs, how likely it finds images, how its samples compare, what its latents do.

Statistics are float64. Nothing here depends on the batch size or the order of images.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.balance import Balance, negative_log_likelihood
from poise.datasets import gather
from poise.errors import InputError
from poise.images import PixelMoments
from poise.latent import DiagonalGaussian, active_units, variance_law
from poise.seeds import noise_per_image
from poise.shapes import Features, PerImage, Values
from poise.vae import VAE

CHUNK = 100


@dataclass(frozen=True)
class Reconstruction:
    """What a VAE makes of images it is given. Means over images.

    Attributes:
        mse: of reconstructions from the posterior mean, per dimension.
        mse_sampled: of reconstructions from one posterior sample per image, per dimension.
        kl_nats: KL(q(z|x) || N(0, I)) per image.
        elbo_nats: evidence lower bound per image: log density of values in [0, 1], KL weight 1, one posterior sample.
        bits_per_dim: -ELBO in bits per dimension for 8-bit values: the density over the 1/255 between two of them.
        gamma2: the decoder variance used.
        quadratic_share: quadratic term of the loss over D/power, its value at balance: 1 where gamma2 is the error.
        variance_lost: variance of images minus that of reconstructions from samples, mean per dimension.
    """

    mse: float
    mse_sampled: float
    kl_nats: float
    elbo_nats: float
    bits_per_dim: float
    gamma2: float
    quadratic_share: float
    variance_lost: float


@torch.no_grad()
def reconstruction(vae: VAE, balance: Balance, images: Any, *, seed: int = 0) -> Reconstruction:
    """Reconstruction error, KL, ELBO and lost variance over images.

    Args:
        vae, balance: used in evaluation mode.
        images: (n, channels, height, width), uint8 or float in [0, 1].
        seed: of the posterior samples; image i gets the same noise whatever the order of work.
    """
    squared, squared_sampled, error, kl = ([] for _ in range(4))
    real, produced = PixelMoments(), PixelMoments()
    for batch, posterior, noise in _encoded(vae, images, seed):
        sampled = vae.decode(posterior.sample(noise)).float()
        squared.append(_summed(vae.decode(posterior.mean).float() - batch, 2))
        squared_sampled.append(_summed(sampled - batch, 2))
        error.append(_summed(sampled - batch, balance.power))
        kl.append(posterior.kl().cpu().double())
        real.add(batch)
        produced.add(sampled)
    num_dims = math.prod(images.shape[1:])
    mean_error, mean_kl, gamma2 = torch.cat(error).mean().cpu(), float(torch.cat(kl).mean()), balance.gamma2.cpu().double()
    elbo = -float(negative_log_likelihood(mean_error, gamma2, num_dims, power=balance.power)) - mean_kl
    return Reconstruction(
        mse=float(torch.cat(squared).mean()) / num_dims,
        mse_sampled=float(torch.cat(squared_sampled).mean()) / num_dims,
        kl_nats=mean_kl,
        elbo_nats=elbo,
        bits_per_dim=-elbo / (num_dims * math.log(2)) + math.log2(255),
        gamma2=float(gamma2),
        quadratic_share=float(mean_error) / (num_dims * float(gamma2)),
        variance_lost=float((real.variance() - produced.variance()).mean()),
    )


def pixel_std(images: Any) -> float:
    """Standard deviation of each dimension over all images, averaged over dimensions.

    Args:
        images: (n, channels, height, width), uint8 or float in [0, 1].
    """
    moments = PixelMoments()
    for start in range(0, len(images), CHUNK):
        moments.add(gather(images, range(start, min(start + CHUNK, len(images)))))
    return moments.std()


@dataclass(frozen=True)
class LatentStatistics:
    """What the codes of a data set say.

    Attributes:
        variance_law: Var(mu) + E[s^2], mean over latents; 1 where the aggregate posterior fits the prior.
        noise_term: "E[s^2]", or "E[s]" for the released law.
        active_units: latents with Var(mu) > 0.01.
        latent_dim: latents in all.
    """

    variance_law: float
    noise_term: str
    active_units: int
    latent_dim: int


def latent_statistics(codes: DiagonalGaussian, *, released: bool = False) -> LatentStatistics:
    """The variance law (with E[s] for E[s^2] if `released`) and the number of active units of codes (n, latents)."""
    law = variance_law(codes.mean, codes.logvar, released=released)
    return LatentStatistics(float(law.mean()), "E[s]" if released else "E[s^2]", active_units(codes.mean), codes.mean.shape[1])


@torch.no_grad()
def encode_all(vae: VAE, images: Any) -> DiagonalGaussian:
    """The posteriors of all images, (n, latents), float32 on the CPU; the networks in evaluation mode.

    Raises:
        InputError: there are none.
    """
    if not len(images):
        raise InputError("there are no images to encode")
    codes = [(posterior.mean.float().cpu(), posterior.logvar.float().cpu()) for _, posterior in _posteriors(vae, images)]
    means, logvars = zip(*codes, strict=True)
    return DiagonalGaussian(torch.cat(means), torch.cat(logvars))


def frechet_distance(features_a: Features, features_b: Features) -> float:
    """Frechet distance between Gaussians fitted to two sets of features, in float64.

        |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

    With S = L L^T, the last trace is the sum of the singular values of L_a^T L_b: no matrix square root.

    Args:
        features_a, features_b: (n, d) each; n may differ, and may be smaller than d.

    Raises:
        InputError: fewer than two samples, differing d, or values that are not finite.

    Source: Heusel et al. 2017, arXiv 1706.08500, eq. 6.
    """
    a, b = (torch.as_tensor(features).double().cpu() for features in (features_a, features_b))
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise InputError(f"features must be (n, d) with n >= 2 and equal d, not {tuple(a.shape)} and {tuple(b.shape)}")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise InputError("features must be finite; there are NaN or infinite values")
    cov_a, cov_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    cross = torch.linalg.svdvals(_factor(cov_a).T @ _factor(cov_b)).sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def _factor(covariance: Tensor) -> Tensor:
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(covariance)  # singular, as with fewer samples than features
    return vectors * values.clamp_min(0).sqrt()


def _posteriors(vae: VAE, images: Any) -> Iterator[tuple[Values, DiagonalGaussian]]:
    device = next(vae.parameters()).device
    vae.eval()
    for start in range(0, len(images), CHUNK):
        batch = gather(images, range(start, min(start + CHUNK, len(images)))).to(device)
        yield batch, vae.encode(batch)


def _encoded(vae: VAE, images: Any, seed: int) -> Iterator[tuple[Values, DiagonalGaussian, Tensor]]:
    first = 0
    for batch, posterior in _posteriors(vae, images):
        noise = noise_per_image(len(batch), posterior.mean.shape[1], seed, first).to(batch.device)
        first += len(batch)
        yield batch, posterior, noise


def _summed(difference: Tensor, power: float) -> PerImage:
    return difference.cpu().double().abs().pow(power).flatten(1).sum(1)
