"""Samples against images: Frechet distances between pixels, as shares of the images' variance.

Pixels, averaged down to 16x16, are a coarse measure, but need no network, and tell priors of one decoder apart.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor

from poise.diagnosis.subject import Seen, device_of, small
from poise.latent import DiagonalGaussian
from poise.metrics import frechet_distance
from poise.priors import MixturePrior, Prior, RenormalisedPrior, fit_mixture, renormalisation_factor
from poise.sampling import sample
from poise.support.seeds import derive
from poise.vae import VAE

MOST_SAMPLES = 1_000  # of each prior
SAME = 1e-6  # variance of averaged images over that of images: with less, they differ in a pattern that averages out
FEWEST_IMAGES = 50  # of fewer, the distance between two halves of the images is larger than any gap


@dataclass(frozen=True)
class Comparison:
    """How far from the images a VAE's products are, all as shares of the images' variance.

    Attributes:
        halves: distance between two halves of the images, halved: what the numbers of images alone would give.
        reconstructions: of the images, from posterior samples.
        priors: of samples from each prior.
        renormalised: of samples from each prior, renormalised.
        factors: the priors' renormalisation factors.
    """

    halves: float
    reconstructions: float
    priors: Mapping[str, float]
    renormalised: Mapping[str, float]
    factors: Mapping[str, float]


def compare(vae: VAE, seen: Seen, codes: DiagonalGaussian, priors: Mapping[str, Prior], seed: int) -> Comparison | None:
    """Distances from images of reconstructions and of samples from the given priors and a mixture of Gaussians.

    None where the images are the same once averaged down. Without a mixture where none can be fitted to the codes.

    Args:
        vae: in evaluation mode.
        seen: at least 50 images.
        codes: of the training images, to which the mixture is fitted.
        priors: by name, on the VAE's device.
        seed: of the samples: the same ones with and without renormalisation.
    """
    device = device_of(vae)
    images = small(seen.images[:MOST_SAMPLES]).double()
    variance = float(images.var(0).sum())
    if variance / images.shape[1] <= SAME * seen.variance:
        return None

    def distance(produced: Tensor) -> float:
        if not produced.isfinite().all():
            return math.inf
        return frechet_distance(images, small(produced)) / variance

    def sampled(prior: Prior) -> float:
        return distance(sample(vae, prior, len(images), seed=derive("diagnosis", seed)))

    mixture = _mixture(codes)
    mixtures = {} if mixture is None else {"mixture": mixture.to(device)}
    factors = {name: renormalisation_factor(prior, codes, device=device) for name, prior in priors.items()}
    return Comparison(
        halves=frechet_distance(images[::2], images[1::2]) / variance / 2,  # it goes like 1/n + 1/n, and the halves have n/2
        reconstructions=distance(seen.restored[:MOST_SAMPLES]),
        priors={name: sampled(prior) for name, prior in {**priors, **mixtures}.items()},
        renormalised={name: sampled(RenormalisedPrior(prior, factors[name])) for name, prior in priors.items()},
        factors=factors,
    )


def _mixture(codes: DiagonalGaussian) -> MixturePrior | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # it is compared, whatever it has converged to
        warnings.simplefilter("ignore", RuntimeWarning)  # of codes so large that their squares overflow
        try:
            return fit_mixture(codes)
        except (ValueError, RuntimeError):  # covariances that are singular to rounding: codes far too large
            return None


def largest_variance(images: Tensor) -> float:
    """Variance of images along the direction in which they vary most: the largest eigenvalue of their covariance."""
    return float(spectrum(images)[-1])


def spectrum(images: Tensor) -> Tensor:
    """Return the eigenvalues of the images' covariance, ascending, of min(n, dimensions) directions."""
    centred = images.flatten(1).double()
    centred = centred - centred.mean(0)
    gram = centred.T @ centred if centred.shape[1] < len(centred) else centred @ centred.T
    return torch.linalg.eigvalsh(gram) / len(images)


def linear_mse(eigenvalues: Tensor, num_latents: int, num_dims: int) -> float:
    """Return the error per dimension of the best linear VAE with so many latents.

    It is the noise variance of probabilistic PCA, the mean of the discarded eigenvalues (Tipping &
    Bishop 1999), and so the MSE of reconstructions from posterior samples. 0 where none is discarded.
    """
    discarded = eigenvalues[: max(0, len(eigenvalues) - num_latents)].clamp_min(0).sum()
    return float(discarded / max(1, num_dims - num_latents))
