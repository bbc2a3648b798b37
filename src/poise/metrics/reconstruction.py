"""How well a VAE gives back what it is given, and how likely it finds it. Statistics are float64.

Variance lost. Let x^ = f(z) be the reconstruction from a posterior sample z ~ q(z|x). If the decoder is least-squares
optimal for these codes, f(z) = E[x|z], then by the law of total variance, in each dimension,

    Var(x) = Var(x^) + E[(x - x^)^2],

so that the variance lost, Var(x) - Var(x^), *is* the MSE: the claim of Asperti & Trentin, and exact for probabilistic PCA,
where both are sigma^2 in every dimension. It holds for sampled reconstructions only. Decoded from the posterior mean they
have less error and less variance still: for pPCA, on an axis of variance v, an MSE of sigma^4 / v, but
sigma^2 (2 - sigma^2 / v) of the variance lost. Hence `variance_lost_share` divides by `mse_sampled`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from poise.balance import Balance, negative_log_likelihood
from poise.data.decoding import PixelMoments
from poise.metrics.encoding import encoded
from poise.shapes import Images, PerImage, Values
from poise.vae import VAE

SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03  # Wang et al. 2004, section III
SSIM_VALUES = 2**22  # of the images that a GPU compares at a time
LEAST_MSE = (
    2.0**-48
)  # (2^-24)^2, half the step of float32 below 1: an exact image has a PSNR of 144.5 dB, not infinity


@dataclass(frozen=True)
class Reconstruction:
    """What a VAE makes of images it is given. Means over images.

    Attributes:
        mse: of reconstructions from the posterior mean, per dimension.
        mse_sampled: of reconstructions from one posterior sample per image, per dimension.
        psnr_db: peak signal-to-noise ratio of reconstructions from the posterior mean; None where the data are no images.
        ssim: structural similarity of the same; None where the data are no images.
        kl_nats: KL(q(z|x) || N(0, I)) per image; like the next two None where there is no posterior.
        elbo_nats: evidence lower bound per image: log density of values in [0, 1], KL weight 1, one posterior sample.
        bits_per_dim: -ELBO in bits per dimension, see `bits_per_dim`; None where the data are no images.
        gamma2: the decoder variance used.
        quadratic_share: quadratic term of the loss over D/power, its value at balance: 1 where gamma2 is the error.
        variance_lost: variance of images minus that of reconstructions from samples, mean per dimension.
        variance_lost_share: variance_lost / mse_sampled: 1 where the decoder gives the mean of all that its latents may
            stand for, E[x|z]; None where mse_sampled is 0.
    """

    mse: float
    mse_sampled: float
    psnr_db: float | None
    ssim: float | None
    kl_nats: float | None
    elbo_nats: float | None
    bits_per_dim: float | None
    gamma2: float
    quadratic_share: float
    variance_lost: float
    variance_lost_share: float | None

    def without_posterior(self) -> "Reconstruction":
        """These figures for a model whose codes are points: KL and likelihood left out."""
        return replace(self, kl_nats=None, elbo_nats=None, bits_per_dim=None)


@torch.no_grad()
def reconstruction(vae: VAE, balance: Balance, images: Any, *, seed: int = 0) -> Reconstruction:
    """Reconstruction error, similarity, KL, ELBO and lost variance over images.

    Args:
        vae, balance: used in evaluation mode.
        images: (n, channels, height, width), uint8 or float in [0, 1]; or (n, features), any values, as latents for stage 2.
        seed: of the posterior samples; image i gets the same noise whatever the order of work.

    Raises:
        InputError: there are none.

    Example:
        >>> vae = poise.VAE(*poise.networks.mlp((1, 8, 8), latent_dim=4))
        >>> figures = reconstruction(vae, poise.ComputedBalance(), torch.rand(10, 1, 8, 8))
        >>> figures.mse < figures.mse_sampled + 1
        True
    """
    real, produced, batches = PixelMoments(), PixelMoments(), []
    for batch, posterior, noise in encoded(vae, images, seed):
        restored, sampled = (
            vae.decode(latents).float() for latents in (posterior.mean, posterior.sample(noise))
        )
        batches.append(
            {"kl": posterior.kl().cpu().double()}
            | _per_image(batch, restored, sampled, balance.power)
        )
        real.add(batch)
        produced.add(sampled)
    mean = {
        name: float(torch.cat([batch[name] for batch in batches]).mean()) for name in batches[0]
    }

    num_dims = math.prod(images.shape[1:])
    gamma2 = balance.gamma2.cpu().double()
    error = torch.tensor(mean["error"], dtype=torch.float64)
    elbo = (
        -float(negative_log_likelihood(error, gamma2, num_dims, power=balance.power)) - mean["kl"]
    )
    mse_sampled = mean["squared_sampled"] / num_dims
    variance_lost = float((real.variance() - produced.variance()).mean())
    return Reconstruction(
        mse=mean["squared"] / num_dims,
        mse_sampled=mse_sampled,
        psnr_db=mean.get("psnr_db"),
        ssim=mean.get("ssim"),
        kl_nats=mean["kl"],
        elbo_nats=elbo,
        bits_per_dim=bits_per_dim(-elbo, num_dims) if "ssim" in mean else None,
        gamma2=float(gamma2),
        quadratic_share=mean["error"] / (num_dims * float(gamma2)),
        variance_lost=variance_lost,
        variance_lost_share=variance_lost / mse_sampled if mse_sampled else None,
    )


def _per_image(
    batch: Values, restored: Values, sampled: Values, power: float
) -> dict[str, PerImage]:
    errors = {
        "squared": summed_error(restored - batch, 2).cpu(),
        "squared_sampled": summed_error(sampled - batch, 2).cpu(),
        "error": summed_error(sampled - batch, power).cpu(),
    }
    if batch.dim() != 4:  # vectors, as stage 2's
        return errors
    return errors | {
        "psnr_db": peak_signal_to_noise(batch, restored),
        "ssim": structural_similarity(batch, restored),
    }


def summed_error(difference: Values, power: float) -> PerImage:
    """sum |difference|^power over the dimensions of each image: float64, where the difference is if that has float64."""
    return in_float64(difference).abs().pow(power).flatten(1).sum(1)


def in_float64(tensor: Tensor) -> Tensor:
    """In float64 where it is, or on the CPU where its device has none (Apple's)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def bits_per_dim(nats: float, num_dims: int) -> float:
    """-log density of values in [0, 1], in bits per dimension for 8-bit values: over the 1/255 between two of them.

    Args:
        nats: -log p(x), or a bound on it, summed over the image's dimensions.
        num_dims: D.
    """
    return nats / (num_dims * math.log(2)) + math.log2(255)


def peak_signal_to_noise(images: Images, others: Images) -> PerImage:
    """10 log10(1 / MSE_i) in decibels, for values whose peak is 1: float64, on the CPU.

    An MSE below 2^-48, which is rounding in float32, counts as 2^-48: images that are equal have 144.5 dB.
    """
    mse = summed_error(images - others, 2).cpu() / images[0].numel()
    return -10 * mse.clamp_min(LEAST_MSE).log10()


def structural_similarity(images: Images, others: Images) -> PerImage:
    """SSIM of each pair of images, mean over channels and over all places of the window: at most 1; float64, on the CPU.

        (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2)),    C1 = 0.01^2, C2 = 0.03^2

    with means m, variances s^2 and covariance s_xy under a Gaussian window of 11 x 11 pixels and sigma 1.5 that lies whole
    in the image. Where a side is shorter the window is the largest odd one that fits. Source: Wang et al. 2004, eq. 13, for
    values in [0, 1]. Equal to scikit-image's with `gaussian_weights=True, use_sample_covariance=False, data_range=1`.

    Args:
        images, others: (n, channels, height, width), values in [0, 1].
    """
    size = (
        10 if images.device.type == "cpu" else max(10, SSIM_VALUES // images[0].numel())
    )  # several maps of each are held
    pairs = zip(images.split(size), others.split(size), strict=True)
    return torch.cat([_structural_similarity(in_float64(x), in_float64(y)) for x, y in pairs]).cpu()


def _structural_similarity(x: Tensor, y: Tensor) -> Tensor:
    width = min(SSIM_WINDOW, (min(x.shape[2:]) - 1) // 2 * 2 + 1)
    rows, columns = (_window_at_each_place(side, width, x) for side in x.shape[2:])
    mean_x, mean_y, square_x, square_y, product = (
        rows @ z @ columns.T for z in (x, y, x * x, y * y, x * y)
    )
    variances, covariance = square_x - mean_x**2 + square_y - mean_y**2, product - mean_x * mean_y
    c1, c2 = SSIM_K1**2, SSIM_K2**2
    brightness = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return (brightness * (2 * covariance + c2) / (variances + c2)).flatten(1).mean(1)


def _window_at_each_place(side: int, width: int, like: Tensor) -> Tensor:
    """(places, side): a matrix product with it is the filter.

    In float64 on one core, for sides of 32, 64 and 256, this takes 1/4 to 1/2 of the time of a separable grouped convolution
    and 1/20 or less of a full window's (torch 2.13).
    """
    places = side - width + 1
    offsets = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    window = (-offsets.square() / (2 * SSIM_SIGMA**2)).exp()
    matrix = torch.zeros(places, side, dtype=torch.float64)
    for place in range(places):
        matrix[place, place : place + width] = window / window.sum()
    return matrix.to(like)
