"""Reconstruction error, image similarity, ELBO and lost variance of a VAE. Statistics are float64.

Variance lost. Let x^ = f(z) be the reconstruction from a posterior sample z ~ q(z|x). Let the
decoder be least-squares optimal for these codes, f(z) = E[x|z]. Then by the law of total variance,
in each dimension,

    Var(x) = Var(x^) + E[(x - x^)^2],

so the variance lost, Var(x) - Var(x^), equals the MSE. This is the claim of Asperti & Trentin.
It is exact for probabilistic PCA, where both are sigma^2 in every dimension.

The law holds for sampled reconstructions only. Reconstructions from the posterior mean have less
error, and even less variance. For pPCA, on an axis of variance v, their MSE is sigma^4 / v, but
they lose sigma^2 (2 - sigma^2 / v) of variance. Hence `variance_lost_share` divides by
`mse_sampled`.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from poise.balance import Balance, negative_log_likelihood
from poise.data.decoding import PixelMoments
from poise.errors import InputError
from poise.metrics.encoding import encoded
from poise.shapes import Batch, Images, PerImage, Values
from poise.support.kernels import own_kernels
from poise.vae import VAE

SSIM_WINDOW, SSIM_SIGMA, SSIM_K1, SSIM_K2 = 11, 1.5, 0.01, 0.03  # Wang et al. 2004, section III
SSIM_VALUES = 2**22  # values of the images that a GPU compares at a time
# (2^-24)^2, where 2^-24 is half the step of float32 below 1. The PSNR of equal images is 144.5 dB,
# not infinity.
LEAST_MSE = 2.0**-48


@dataclass(frozen=True)
class Reconstruction:
    """Reconstruction metrics of a VAE, as means over images.

    Attributes:
        mse: MSE of reconstructions from the posterior mean, per dimension.
        mse_sampled: MSE of reconstructions from one posterior sample per image, per dimension.
        psnr_db: peak signal-to-noise ratio of reconstructions from the posterior mean; None if the
            data are not images.
        ssim: structural similarity of the same reconstructions; None if the data are not images.
        kl_nats: KL(q(z|x) || N(0, I)) per image. None if the model has no posterior, as are
            `elbo_nats` and `bits_per_dim`.
        elbo_nats: evidence lower bound per image: log density of values in [0, 1], KL weight 1,
            one posterior sample. None if the error is no likelihood.
        bits_per_dim: -ELBO in bits per dimension, see `bits_per_dim`; None if the data are not
            images.
        gamma2: the decoder variance used; with groups, their mean; that of the pixels if the error
            is one of features.
        quadratic_share: quadratic term of the loss over D/power, its value at balance. It is 1 if
            gamma2 equals the error.
        variance_lost: variance of images minus variance of sampled reconstructions, mean per
            dimension.
        variance_lost_share: variance_lost / mse_sampled. It is 1 if the decoder returns E[x|z];
            None if mse_sampled is 0.
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
        """Return a copy without KL and likelihood, for a deterministic model."""
        return replace(self, kl_nats=None, elbo_nats=None, bits_per_dim=None)


@torch.no_grad()
def reconstruction(vae: VAE, balance: Balance, images: Any, *, seed: int = 0) -> Reconstruction:
    """Return reconstruction error, similarity, KL, ELBO and lost variance, as means over images.

    Args:
        vae, balance: used in evaluation mode.
        images: (n, channels, height, width), uint8 or float in [0, 1]; or (n, features), any
            values, such as the latents that stage 2 encodes.
        seed: seed of the posterior samples. The noise of image i depends on (seed, i) only.

    Raises:
        InputError: there are no images.

    Example:
        >>> vae = poise.VAE(*poise.networks.mlp((1, 8, 8), latent_dim=4))
        >>> figures = reconstruction(vae, poise.ComputedBalance(), torch.rand(10, 1, 8, 8))
        >>> figures.mse < figures.mse_sampled + 1
        True
    """
    real, produced, batches, errors = PixelMoments(), PixelMoments(), [], []
    likelihood = balance.error.is_likelihood
    for batch, posterior, noise in encoded(vae, images, seed):
        with own_kernels(batch.device):
            restored, sampled = (
                vae.decode(latents).float() for latents in (posterior.mean, posterior.sample(noise))
            )
        batches.append({"kl": posterior.kl().cpu().double()} | _per_image(batch, restored, sampled))
        difference = sampled - batch
        error = grouped_error(difference, balance) if likelihood else summed_error(difference, 2)
        errors.append(error.cpu())
        real.add(batch)
        produced.add(sampled)
    mean = {
        name: float(torch.cat([batch[name] for batch in batches]).mean()) for name in batches[0]
    }

    num_dims = math.prod(images.shape[1:])
    gamma2 = balance.gamma2.cpu().double()
    gamma2 = gamma2 if likelihood else gamma2[0]  # the pixels'
    error, dims_of_group = torch.cat(errors).mean(0), num_dims // gamma2.numel()
    nats = negative_log_likelihood(error, gamma2, dims_of_group, power=balance.power)
    elbo = -float(nats.sum()) - mean["kl"] if likelihood else None
    mse_sampled = mean["squared_sampled"] / num_dims
    variance_lost = float((real.variance() - produced.variance()).mean())
    return Reconstruction(
        mse=mean["squared"] / num_dims,
        mse_sampled=mse_sampled,
        psnr_db=mean.get("psnr_db"),
        ssim=mean.get("ssim"),
        kl_nats=mean["kl"],
        elbo_nats=elbo,
        bits_per_dim=None if elbo is None or "ssim" not in mean else bits_per_dim(-elbo, num_dims),
        gamma2=float(gamma2.mean()),
        quadratic_share=float((error / (dims_of_group * gamma2)).mean()),
        variance_lost=variance_lost,
        variance_lost_share=variance_lost / mse_sampled if mse_sampled else None,
    )


def _per_image(batch: Values, restored: Values, sampled: Values) -> dict[str, PerImage]:
    errors = {
        "squared": summed_error(restored - batch, 2).cpu(),
        "squared_sampled": summed_error(sampled - batch, 2).cpu(),
    }
    if batch.dim() != 4:  # vectors, as in stage 2
        return errors
    return errors | {
        "psnr_db": peak_signal_to_noise(batch, restored),
        "ssim": structural_similarity(batch, restored),
    }


def summed_error(difference: Values, power: float) -> PerImage:
    """Return sum |difference|^power over the dimensions of each image, in float64.

    The result is on the device of `difference`, or on the CPU if that device has no float64.
    """
    return in_float64(difference).abs().pow(power).flatten(1).sum(1)


def grouped_error(difference: Batch, balance: Balance) -> Batch:
    """Return the error of each image under a balance, (n,), or with groups (n, groups).

    Raises:
        InputError: the balance has groups other than channels, or an error that is no likelihood.
    """
    if not balance.error.is_likelihood:
        raise InputError(
            f"the error {balance.error.name} is no likelihood of the images, so there is no ELBO "
            "and no NLL: train with the error squared or absolute"
        )
    if balance.groups is None:
        return summed_error(difference, balance.power)
    if balance.per is None:
        raise InputError(
            f"the figures need to know the dimensions of the {balance.groups} groups of the "
            'balance: construct it with per="channel", or leave groups out'
        )
    channels = difference.reshape(len(difference) * balance.groups, -1)
    return summed_error(channels, balance.power).reshape(-1, balance.groups)


def in_float64(tensor: Tensor) -> Tensor:
    """Convert a tensor to float64. Moves it to the CPU if its device has no float64 (Apple's)."""
    return tensor.cpu().double() if tensor.device.type == "mps" else tensor.double()


def bits_per_dim(nats: float, num_dims: int) -> float:
    """Convert -log p(x) of values in [0, 1] to bits per dimension of 8-bit values.

    Two neighbouring 8-bit values are 1/255 apart, so the probability per dimension is the density
    divided by 255.

    Args:
        nats: -log p(x), or a bound on it, summed over the image's dimensions.
        num_dims: D, the number of dimensions of an image.
    """
    return nats / (num_dims * math.log(2)) + math.log2(255)


def peak_signal_to_noise(images: Images, others: Images) -> PerImage:
    """Return the PSNR of each pair of images in decibels, 10 log10(1 / MSE_i), float64 on the CPU.

    The peak value is 1. An MSE below 2^-48 is rounding in float32 and counts as 2^-48, so the PSNR
    of equal images is 144.5 dB.
    """
    mse = summed_error(images - others, 2).cpu() / images[0].numel()
    return -10 * mse.clamp_min(LEAST_MSE).log10()


def structural_similarity(images: Images, others: Images) -> PerImage:
    """Return the structural similarity (SSIM) of each pair of images, at most 1.

        (2 m_x m_y + C1) (2 s_xy + C2) / ((m_x^2 + m_y^2 + C1) (s_x^2 + s_y^2 + C2)),
        C1 = 0.01^2, C2 = 0.03^2

    with means m, variances s^2 and covariance s_xy under a Gaussian window of 11 x 11 pixels and
    sigma 1.5. The window stays inside the image. If a side is shorter than 11 pixels, the window is
    the largest odd one that fits. Equal to scikit-image's SSIM with `gaussian_weights=True,
    use_sample_covariance=False, data_range=1`.

    Args:
        images, others: (n, channels, height, width), values in [0, 1].

    Returns:
        (n,), float64 on the CPU: the mean over channels and window positions.

    Source: Wang et al. 2004, eq. 13, for values in [0, 1].
    """
    # Several maps of each image are held in memory at a time.
    size = 10 if images.device.type == "cpu" else max(10, SSIM_VALUES // images[0].numel())
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
    """Return the filter as a matrix (places, side); multiplying an image by it applies the filter.

    In float64 on one core, for sides of 32, 64 and 256, this takes 1/4 to 1/2 of the time of a
    separable grouped convolution, and at most 1/20 of that of a full window (torch 2.13).
    """
    places = side - width + 1
    offsets = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    window = (-offsets.square() / (2 * SSIM_SIGMA**2)).exp()
    matrix = torch.zeros(places, side, dtype=torch.float64)
    for place in range(places):
        matrix[place, place : place + width] = window / window.sum()
    return matrix.to(like)
