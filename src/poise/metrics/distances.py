"""Frechet distance, kernel distance and Inception Score, in float64.

    Frechet distance     |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))
    kernel distance      E k(x, x') + E k(y, y') - 2 E k(x, y),  k(x, y) = (x.y/d + 1)^3
    Inception Score      exp E_x KL(p(y|x) || p(y))

m is the mean of a set of features and S its covariance. With S = F F^T, the last trace of the
Frechet distance is the sum of the singular values of F_a^T F_b. This holds for all shapes and
ranks of the factors F and needs no matrix square root. Means and covariances are summed over
blocks of rows.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from poise.errors import InputError
from poise.metrics.blocks import ROWS, checked, mean_of
from poise.shapes import Features

# Relative variance. Rounding of a covariance is about 1e-14, that of float32 features 4e-15.
SINGULAR = 1e-12


def frechet_distance(features_a: Features, features_b: Features) -> float:
    """Return the Frechet distance of two sets of features, which is FID for features of Inception.

        |m_a - m_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2)),  S with n - 1 in the denominator

    Exact for any rank: sets smaller than d, constant and repeated features are allowed. Values that
    rounding makes negative (about 1e-14 of the traces) become zero. The value is biased upwards, by
    about 1/n: see `frechet_infinity`.

    Args:
        features_a, features_b: (n, d) each. n may differ, and may be smaller than d. The distance
            is symmetric.

    Returns:
        The squared distance, at least 0, in the features' units squared.

    Raises:
        InputError: fewer than two samples, differing d, or values that are not finite.

    Source: Heusel et al. 2017, arXiv 1706.08500, eq. 6.
    """
    a, b = checked(features_a, features_b)
    return distance_between(fit_gaussian(a), fit_gaussian(b))


@dataclass(frozen=True)
class Gaussian:
    """Gaussian as its mean (d,) and a factor F (d, rank) of its covariance F F^T.

    Both are float64 on the CPU.
    """

    mean: Tensor
    factor: Tensor


def distance_between(a: Gaussian, b: Gaussian) -> float:
    """Return the Frechet distance between two Gaussians, at least 0."""
    cross = torch.linalg.svdvals(a.factor.T @ b.factor).sum()
    traces = a.factor.square().sum() + b.factor.square().sum()
    return float(((a.mean - b.mean).square().sum() + traces - 2 * cross).clamp_min(0))


def fit_gaussian(features: Tensor) -> Gaussian:
    """Fit a Gaussian to features (n, d). Its covariance has n - 1 in the denominator."""
    mean = mean_of(features)
    if len(features) > features.shape[1]:
        return Gaussian(mean.cpu(), covariance_factor(covariance(features, mean).cpu()))
    # The covariance of so few samples is singular. The centred samples are an exact factor of it.
    return Gaussian(mean.cpu(), ((features.double() - mean).T / math.sqrt(len(features) - 1)).cpu())


def covariance(features: Tensor, mean: Tensor) -> Tensor:
    """Return the covariance (d, d) of features (n, d), n - 1 in the denominator, float64."""
    total = torch.zeros(len(mean), len(mean), dtype=torch.float64, device=features.device)
    for block in features.split(ROWS):
        centred = block.double() - mean
        total.addmm_(centred.T, centred)
    return total.div_(len(features) - 1)


def covariance_factor(covariance: Tensor) -> Tensor:
    """Return a factor F (d, rank) of a covariance F F^T, (d, d).

    Uses Cholesky, or eigenvalues if the covariance is singular. The Cholesky pivot of a linearly
    dependent feature is rounding noise of either sign. If it is positive, its square root, 1e-8, no
    longer looks like rounding. So a pivot below SINGULAR times the feature's variance means a
    singular covariance. Eigenvalues below SINGULAR times the largest are dropped.
    """
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if not failed and (factor.diagonal().square() > SINGULAR * covariance.diagonal()).all():
        return factor
    values, vectors = torch.linalg.eigh(covariance)
    kept = values > SINGULAR * values[-1]
    return vectors[:, kept] * values[kept].sqrt()


@dataclass(frozen=True)
class Extrapolation:
    """Value extrapolated to infinitely many samples, and its standard error from the residuals."""

    value: float
    standard_error: float


def frechet_infinity(
    real: Features, generated: Features, *, seed: int = 0, points: int = 15, smallest: int = 5000
) -> Extrapolation:
    """Return the Frechet distance extrapolated to infinitely many generated samples.

        FID(N) = FID(infinity) + slope / N

    Least squares over `points` sizes N, evenly spaced from `smallest` to all samples. The bias of
    FID is about 1/N, and its slope depends on the generator. So even the order of two models can
    depend on N.

    The result is still biased. The real set is used whole, so its own bias (about 1/n) remains.
    Terms in 1/N^2 remain and grow with d/N. The subsets come from one set and overlap, so the
    standard error from the line's residuals is smaller than the spread over generated sets. The
    value is not clamped: it can be negative if the distributions are equal.

    Args:
        real: (n, d), fixed.
        generated: (n, d), at least 2 * smallest samples.
        seed: seed of the subsets, each drawn without replacement.
        points: number of sizes, at least 3. Each costs one Frechet distance.
        smallest: size of the smallest subset, more than d. The paper uses 5,000 of 50,000.

    Raises:
        InputError: too few points or samples, `smallest` not above d, or features that
            `frechet_distance` refuses.

    Source: Chong & Forsyth 2020, arXiv 1911.07023, for FID. The subsets here are ordinary random
    subsets.
    """
    real, generated = checked(real, generated)
    n, d = generated.shape
    if points < 3:
        raise InputError(
            f"a line through {points} points has no residuals: points must be at least 3"
        )
    if smallest <= d:
        raise InputError(
            f"the 1/N law needs subsets of more than d = {d} samples: "
            f"smallest must be larger than that, not {smallest}"
        )
    if n < 2 * smallest:
        raise InputError(
            f"{n} generated samples are too few: "
            f"give at least {2 * smallest}, twice smallest, or lower smallest"
        )
    sizes = torch.linspace(smallest, n, points, dtype=torch.float64).round().long()
    source, fixed = torch.Generator().manual_seed(seed), fit_gaussian(real)
    subsets = (torch.randperm(n, generator=source)[:size].to(generated.device) for size in sizes)
    values = [distance_between(fixed, fit_gaussian(generated[subset])) for subset in subsets]
    return _intercept(1 / sizes.double(), torch.tensor(values, dtype=torch.float64))


def _intercept(x: Tensor, y: Tensor) -> Extrapolation:
    """Return the intercept of the least-squares line through (x, y), with its standard error."""
    centred = x - x.mean()
    slope = (centred * y).sum() / centred.square().sum()
    residual_variance = (y - y.mean() - slope * centred).square().sum() / (len(x) - 2)
    variance = residual_variance * (1 / len(x) + x.mean().square() / centred.square().sum())
    return Extrapolation(float(y.mean() - slope * x.mean()), float(variance.sqrt()))


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n in the denominator) over subsets or splits."""

    mean: float
    std: float


def kernel_distance(
    real: Features,
    generated: Features,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 2020,
) -> Spread:
    """Return the kernel distance over random subsets, which is KID for features of Inception.

    The kernel distance is the unbiased squared MMD with a cubic kernel:

        mean_{i != j} k(x_i, x_j) + mean_{i != j} k(y_i, y_j) - 2 mean_{i, j} k(x_i, y_j),
        k(x, y) = (x.y/d + 1)^3

    It is unbiased at any size. For equal distributions it varies around zero and can be negative.
    The spread is over subsets of one pair of sets. Divided by sqrt(subsets) it is not a standard
    error, because the subsets overlap.

    Args:
        real, generated: (n, d) each; n may differ.
        subsets: number of pairs of subsets, at least 1.
        subset_size: samples in each subset, drawn without replacement; from 2 to the smaller n.
        seed: seed of the subsets. The default and the order of draws are torch-fidelity's: first
            the generated subset, then the real one.

    Raises:
        InputError: a set smaller than subset_size, a subset size below 2, no subsets, or features
            that cannot be compared.

    Source: Binkowski et al. 2018, arXiv 1801.01401; Gretton et al. 2012, JMLR 13:723, eq. 3.
    """
    real, generated = checked(real, generated)
    if subsets < 1 or subset_size < 2:
        raise InputError(
            "the kernel distance needs subsets >= 1 of subset_size >= 2, "
            f"not {subsets} of {subset_size}"
        )
    if subset_size > min(len(real), len(generated)):
        sizes = f"{len(real)} real and {len(generated)} generated samples"
        raise InputError(
            f"subset_size {subset_size} is larger than a set, {sizes}: "
            "give more samples, or lower subset_size"
        )
    draws = np.random.RandomState(seed)
    pairs = (
        [_drawn(features, subset_size, draws) for features in (generated, real)]
        for _ in range(subsets)
    )
    return _spread([_squared_mmd(x, y) for x, y in pairs])


def _drawn(features: Tensor, size: int, draws: np.random.RandomState) -> Tensor:
    chosen = draws.choice(len(features), size, replace=False)
    return features[torch.from_numpy(chosen).to(features.device)].double()


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """Return the unbiased squared MMD of two sets of equal size, (m, d) each, float64."""
    m = len(x)
    within = sum(
        kernel.sum() - kernel.trace() for kernel in (_cubic_kernel(x, x), _cubic_kernel(y, y))
    )
    return float(within / (m * (m - 1)) - 2 * _cubic_kernel(x, y).mean())


def _cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1).pow(3)


def _spread(values: Sequence[float]) -> Spread:
    return Spread(float(np.mean(values)), float(np.std(values)))


def inception_score(logits: Features, *, splits: int = 10, seed: int = 2020) -> Spread:
    """Return the Inception Score of generated images, with its spread over splits.

        exp( H(p(y)) - mean_x H(p(y|x)) ),  p(y) = mean_x p(y|x), H the entropy in nats

    The score is between 1 and the number of classes. It is biased downwards for small splits,
    because it is at most the number of images in a split. It compares nothing with real images: it
    measures only variety and the confidence of an ImageNet classifier.

    Args:
        logits: (n, classes), finite, before the softmax.
        splits: number of parts of (almost) equal size, from 1 to n.
        seed: seed of the order in which images go into splits. The default and the draw are
            torch-fidelity's.

    Returns:
        Mean and standard deviation over splits.

    Raises:
        InputError: logits that are not (n, classes) or not finite, or splits outside 1 ... n.

    Source: Salimans et al. 2016, arXiv 1606.03498, section 4.
    """
    logits = torch.as_tensor(logits).detach().cpu()
    if logits.dim() != 2 or not logits.isfinite().all():
        raise InputError(
            f"logits must be (n, classes) and finite; these are {tuple(logits.shape)}, "
            "or have NaN or infinite values"
        )
    if not 1 <= splits <= len(logits):
        raise InputError(
            f"splits must be from 1 to {len(logits)}, the number of images, not {splits}"
        )
    order = torch.from_numpy(np.random.RandomState(seed).permutation(len(logits)))
    bounds = [split * len(logits) // splits for split in range(splits + 1)]
    return _spread([_score(logits[order[first:last]]) for first, last in pairwise(bounds)])


def _score(logits: Tensor) -> float:
    probabilities = logits.double().softmax(1)
    # entr(0) is 0, whereas p log(p/q) is NaN at p = 0.
    entropy_of_mean = torch.special.entr(probabilities.mean(0)).sum()
    return float((entropy_of_mean - torch.special.entr(probabilities).sum(1).mean()).exp())
