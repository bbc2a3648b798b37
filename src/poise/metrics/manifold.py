"""Precision, recall, density and coverage: which samples of one set lie near samples of the other, in float64.

A set's manifold is the union of closed balls around its samples, each reaching to the sample's k-th nearest neighbour within
the set, itself not counted. With x real, y generated, r_k the radius of a sample's ball and m generated samples:

    precision   share of y with |x - y| <= r_k(x) for some x
    recall      share of x with |x - y| <= r_k(y) for some y
    density     number of pairs (x, y) with |x - y| <= r_k(x), over k m
    coverage    share of x with |x - y| <= r_k(x) for some y

Sources: Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2; Naeem et al. 2020, arXiv 2002.09797, section 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError
from poise.metrics.blocks import ROWS, checked, mean_of
from poise.shapes import Features

DISTANCES = 2**24  # distances held at a time: 128 MiB in float64
TIE = 1e-13  # of |x|^2 + |y|^2: squared distances that differ by less are equal; their rounding is some 1e-15


@dataclass(frozen=True)
class Manifold:
    """How two sets cover each other.

    Attributes:
        precision: share of generated samples within the real manifold, in [0, 1].
        recall: share of real samples within the generated manifold, in [0, 1].
        density: real balls around a generated sample over k, mean; around 1 for equal distributions, and may be larger.
        coverage: share of real samples whose ball holds a generated sample, in [0, 1].
    """

    precision: float
    recall: float
    density: float
    coverage: float


@torch.no_grad()
def manifold_figures(
    real: Features,
    generated: Features,
    *,
    neighbours: int = 3,
    density_neighbours: int = 5,
    real_reaches: list[Tensor] | None = None,
) -> Manifold:
    """Improved precision and recall, density and coverage (formulas above); one pass over the distances serves all four.

    Balls are closed: ties count as within, as in torch-fidelity. Naeem et al.'s released code takes open balls instead, which
    differs only where distances tie, as with repeated images. All four depend on n: compare at equal numbers of samples.

    Args:
        real, generated: (n, d) each; n may differ, and must be more than either number of neighbours.
        neighbours: k of precision and recall, at least 1.
        density_neighbours: k of density and coverage, at least 1.
        real_reaches: what `squared_reaches` gives of the real samples for the two numbers, where it is known already.

    Raises:
        InputError: k below 1, n <= k, differing d, or values that are not finite.
    """
    real, generated = checked(real, generated)
    most = max(neighbours, density_neighbours)
    if min(neighbours, density_neighbours) < 1:
        raise InputError(
            f"neighbours must be at least 1, not {neighbours} (and {density_neighbours} for density)"
        )
    if min(len(real), len(generated)) <= most:
        given = f"{len(real)} real and {len(generated)} generated samples"
        raise InputError(
            f"{given} are too few for {most} neighbours: give at least {most + 1} of each, or ask for fewer neighbours"
        )
    real_reach, density_reach = real_reaches or squared_reaches(
        real, [neighbours, density_neighbours]
    )
    (generated_reach,) = squared_reaches(generated, [neighbours])
    precise = torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    recalled = covered = pairs = first = 0
    for squared in _squared_distances(real, generated, mean_of(real), tie=TIE):
        rows = slice(first, first := first + len(squared))
        precise |= (squared <= real_reach[rows, None]).any(0)
        recalled += int((squared <= generated_reach).any(1).sum())
        near = squared <= density_reach[rows, None]
        covered += int(near.any(1).sum())
        pairs += int(near.sum())
    return Manifold(
        precision=int(precise.sum()) / len(generated),
        recall=recalled / len(real),
        density=pairs / (density_neighbours * len(generated)),
        coverage=covered / len(real),
    )


def squared_reaches(features: Features, neighbours: list[int]) -> list[Tensor]:
    """For each k, the squared distances (n,) from samples to their k-th nearest neighbours: the (k + 1)-th with themselves."""
    most = max(neighbours) + 1
    blocks = _squared_distances(features, features, mean_of(features))
    nearest = torch.cat([squared.topk(most, largest=False).values for squared in blocks])
    return [nearest[:, k] for k in neighbours]


def _squared_distances(
    rows: Tensor, columns: Tensor, centre: Tensor, *, tie: float = 0.0
) -> Iterator[Tensor]:
    """Squared distances in blocks of rows, (rows of the block, columns), less `tie` of |x|^2 + |y|^2.

    |x|^2 + |y|^2 - 2 x.y about a common centre, without which the squares' rounding would hide small distances. Taking a little
    off makes `<=` include ties whatever the rounding.
    """
    for block in rows.split(max(1, DISTANCES // len(columns))):
        x = block.double() - centre
        x_squared = x.square().sum(1, keepdim=True) * (1 - tie)
        squared = torch.empty(len(x), len(columns), dtype=torch.float64, device=x.device)
        for into, part in zip(squared.split(ROWS, 1), columns.split(ROWS), strict=True):
            y = part.double() - centre
            torch.addmm(y.square().sum(1) * (1 - tie), x, y.T, alpha=-2, out=into)
        yield squared.add_(x_squared)
