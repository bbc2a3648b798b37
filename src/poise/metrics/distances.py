"""Distances between two sets of features, in float64."""

import torch
from torch import Tensor

from poise.errors import InputError
from poise.shapes import Features


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
