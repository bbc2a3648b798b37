"""Held-out negative log-likelihood, -log p(x), estimated by importance sampling.

The proposal is the posterior q(z|x). With z_1 ... z_K drawn from it,

    -log p(x)  ~  -log 1/K sum_k w_k,        w_k = p(x|z_k) p(z_k) / q(z_k|x).                (1)

(Burda et al. 2016, arXiv 1509.00519, eq. 8.) For K = 1 its expectation is the negative ELBO. The
expectation falls as K grows and converges to -log p(x) from above.

How many samples. If q(z|x) is the true posterior, every w_k is p(x) and K = 1 is enough. Otherwise
K must be of the order of exp(KL(p(z|x) || q(z|x))) (Chatterjee & Diaconis 2018, arXiv 1511.01437).
A KL of ten nats, usual for large images, needs tens of thousands of samples.

When to trust the estimate. The effective sample size is (sum w)^2 / sum w^2. Divided by K it is 1
if all samples have equal weight, and 1/K if one sample outweighs all others. In the second case (1)
is still an upper bound, but its value means little. A share near 1 is no proof. All samples can
miss a part of the true posterior, such as a second mode, or tails wider than those of q. They then
agree with each other. As a check, double the samples: the estimate must not change. This check can
also fail to detect a missed part.

p(x|z) is the likelihood of `poise.balance`, with its gamma2 and power; p(z) is N(0, I). Weights and
sums are float64; decoders run in their own precision.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poise.balance import Balance, negative_log_likelihood
from poise.errors import InputError
from poise.latent import DiagonalGaussian
from poise.metrics.encoding import posteriors
from poise.metrics.reconstruction import bits_per_dim, grouped_error, in_float64
from poise.shapes import Noise, PerImage
from poise.support.progress import progress
from poise.support.seeds import generator
from poise.vae import VAE

# Samples of one image whose noise is drawn together. Another size gives other noise.
BLOCK = 100
BLOCKS_AT_ONCE = {"cpu": 1, "mps": 1}  # blocks decoded together, by type of device
BLOCKS_AT_ONCE_ELSEWHERE = 20


@dataclass(frozen=True)
class ImportanceWeightedNLL:
    """Importance-weighted estimate of -log p(x), with its standard error and effective sample size.

    Attributes:
        mean_nats: mean of -log p(x) over images, in nats per image, for values in [0, 1].
        standard_error_nats: standard error of that mean, from the spread over images. It does not
            include the bias of the estimate, which is never negative.
        bits_per_dim: `mean_nats` in bits per dimension, see `bits_per_dim`; None if the data are
            not images.
        samples: K, the number of samples per image.
        effective_share: effective sample size over K, between 1/K and 1, mean over images.
    """

    mean_nats: float
    standard_error_nats: float
    bits_per_dim: float | None
    samples: int
    effective_share: float


def importance_weighted_nll(
    vae: VAE,
    balance: Balance,
    images: Any,
    *,
    samples: int = 1000,
    seed: int = 0,
    quiet: bool = True,
) -> ImportanceWeightedNLL:
    """Return the mean of -log p(x) over images, estimated with importance weights (eq. 1).

    Args:
        vae, balance: used in evaluation mode.
        images: (n, channels, height, width), uint8 or float in [0, 1], or (n, features); n >= 2.
        samples: K, at least 1. Each image is encoded once, and K of its latents are decoded,
            `BLOCK` at a time.
        seed: seed of the samples; see `nll_per_image`.
        quiet: show no progress.

    Raises:
        InputError: fewer than two images, samples < 1, or codes that are not finite.

    Example:
        >>> vae = poise.VAE(*poise.networks.mlp((1, 8, 8), latent_dim=4))
        >>> images = torch.rand(10, 1, 8, 8)
        >>> likelihood = importance_weighted_nll(vae, poise.FixedBalance(), images, samples=200)
        >>> 1 / 200 <= likelihood.effective_share <= 1
        True
    """
    if len(images) < 2:
        raise InputError(f"a mean with a standard error needs at least 2 images, not {len(images)}")
    nll, share = nll_per_image(vae, balance, images, samples=samples, seed=seed, quiet=quiet)
    return ImportanceWeightedNLL(
        mean_nats=float(nll.mean()),
        standard_error_nats=float(nll.std() / math.sqrt(len(nll))),
        bits_per_dim=bits_per_dim(float(nll.mean()), math.prod(images.shape[1:]))
        if len(images.shape) == 4
        else None,
        samples=samples,
        effective_share=float(share.mean()),
    )


class NLLPerImage(NamedTuple):
    """Importance-weighted estimate of each image, float64 on the CPU.

    Attributes:
        nll_nats: the estimate of -log p(x), in nats.
        effective_share: effective sample size over K, between 1/K and 1.
    """

    nll_nats: Tensor
    effective_share: Tensor


@torch.no_grad()
def nll_per_image(
    vae: VAE,
    balance: Balance,
    images: Any,
    *,
    samples: int = 1000,
    seed: int = 0,
    quiet: bool = True,
) -> NLLPerImage:
    """Return -log p(x) of each image, estimated with importance weights (eq. 1).

    The noise of image i depends on (seed, i) only. A larger K keeps the samples of a smaller K and
    adds more. So the value of an image does not depend on the other images or their number. The
    memory needed depends neither on the number of images nor on K.

    Args:
        vae, balance, images, samples, seed, quiet: as for `importance_weighted_nll`, but n >= 1.

    Raises:
        InputError: no images, samples < 1, or codes that are not finite.
    """
    if samples < 1:
        raise InputError(f"the number of samples must be at least 1, not {samples}")
    sums, device = [], next(vae.parameters()).device
    at_once = BLOCKS_AT_ONCE.get(device.type, BLOCKS_AT_ONCE_ELSEWHERE)
    place = device if at_once > 1 else torch.device("cpu")  # where the float64 weights are computed
    with progress("likelihood", len(images), quiet=quiet) as bar:
        for batch, posterior in posteriors(vae, images):
            codes = DiagonalGaussian(posterior.mean.float().cpu(), posterior.logvar.float().cpu())
            if not (codes.mean.isfinite().all() and codes.logvar.isfinite().all()):
                raise InputError(
                    "the codes must be finite; "
                    "the encoder gives NaN or infinite values for some image"
                )
            for image, mean, logvar in zip(batch, codes.mean, codes.logvar, strict=True):
                noise = _noise_in_blocks(samples, len(mean), seed, len(sums))
                code = DiagonalGaussian(mean[None].to(place), logvar[None].to(place))
                together = (torch.cat(blocks).to(place) for blocks in _grouped(noise, at_once))
                sums.append(
                    _log_sums(_log_weights(vae, balance, image, code, draws) for draws in together)
                )
                bar.update(len(sums), {})
    log_sum, log_sum_of_squares = torch.stack(sums).cpu().unbind(1)
    return NLLPerImage(
        math.log(samples) - log_sum, (2 * log_sum - log_sum_of_squares).exp() / samples
    )


def _noise_in_blocks(samples: int, latents: int, seed: int, image: int) -> Iterator[Noise]:
    for block, start in enumerate(range(0, samples, BLOCK)):
        source = generator("likelihood", seed, image, block)
        # Draw a full block and cut it: torch draws other values if asked for fewer.
        yield torch.randn(BLOCK, latents, generator=source)[: samples - start]


def _grouped(blocks: Iterator[Noise], size: int) -> Iterator[list[Noise]]:
    while group := list(islice(blocks, size)):
        yield group


def _log_sums(log_weights: Iterable[Tensor]) -> Tensor:
    """Return log sum w and log sum w^2 over all blocks, (2,)."""
    sums = None
    for block in log_weights:
        of_block = torch.stack([block, 2 * block]).logsumexp(1)
        sums = of_block if sums is None else sums.logaddexp(of_block)
    assert sums is not None
    return sums


def _log_weights(
    vae: VAE, balance: Balance, image: Tensor, code: DiagonalGaussian, noise: Noise
) -> PerImage:
    """Return log p(x|z) + log p(z) - log q(z|x) of each sample.

    The terms L/2 log 2 pi of the last two cancel.
    """
    latents = code.sample(noise)
    difference = vae.decode(latents.to(image.device)).float() - image
    error = grouped_error(difference, balance).to(latents.device)
    gamma2 = in_float64(balance.gamma2).to(latents.device)
    num_dims = image.numel() // gamma2.numel()
    log_likelihood = -negative_log_likelihood(error, gamma2, num_dims, power=balance.power)
    if balance.groups is not None:
        log_likelihood = log_likelihood.sum(1)
    log_ratio = 0.5 * (
        noise.double().square() + code.logvar.double() - latents.double().square()
    ).sum(1)
    return log_likelihood + log_ratio
