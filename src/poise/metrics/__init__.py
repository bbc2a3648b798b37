"""Metrics: reconstruction error, likelihood, quality of samples, and statistics of latents.

Statistics are float64. Nothing here depends on the batch size or the order of images.

In reading order: `encoding` (posteriors of images), `reconstruction` (error and ELBO), `likelihood`
and `proposal` (importance-weighted), `latents` (the latent page), `distances` (Frechet distance,
kernel distance, Inception Score), `manifold` (precision, recall, density, coverage), `copies`
(nearest training images), `reference_statistics` (mean and covariance of real images in a file).
"""

from poise.metrics.distances import (
    Extrapolation,
    Spread,
    frechet_distance,
    frechet_infinity,
    inception_score,
    kernel_distance,
)
from poise.metrics.encoding import encode_all, pixel_std
from poise.metrics.latents import AggregatePosterior, LatentStatistics, latent_statistics
from poise.metrics.likelihood import ImportanceWeightedNLL, importance_weighted_nll, nll_per_image
from poise.metrics.manifold import Manifold, manifold_figures
from poise.metrics.reconstruction import (
    Reconstruction,
    peak_signal_to_noise,
    reconstruction,
    structural_similarity,
)
from poise.metrics.reference_statistics import (
    ReferenceStatistics,
    read_statistics,
    write_statistics,
)

__all__ = [
    "AggregatePosterior",
    "Extrapolation",
    "ImportanceWeightedNLL",
    "LatentStatistics",
    "Manifold",
    "Reconstruction",
    "ReferenceStatistics",
    "Spread",
    "encode_all",
    "frechet_distance",
    "frechet_infinity",
    "importance_weighted_nll",
    "inception_score",
    "kernel_distance",
    "latent_statistics",
    "manifold_figures",
    "nll_per_image",
    "peak_signal_to_noise",
    "pixel_std",
    "read_statistics",
    "reconstruction",
    "structural_similarity",
    "write_statistics",
]
