"""How well a VAE gives back what it is given, and how likely it finds it. Statistics are float64."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from poise.balance import Balance, negative_log_likelihood
from poise.images import PixelMoments
from poise.metrics.encoding import encoded
from poise.shapes import PerImage
from poise.vae import VAE


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
    for batch, posterior, noise in encoded(vae, images, seed):
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


def _summed(difference: Tensor, power: float) -> PerImage:
    return difference.cpu().double().abs().pow(power).flatten(1).sum(1)
