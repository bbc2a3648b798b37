"""Precision, recall, density and coverage of generated samples, in float64.

The manifold of a set is the union of closed balls around its samples. The radius of a ball is the
distance to the sample's k-th nearest neighbour in the set, the sample itself not counted. With x
real, y generated, r_k the radius of a sample's ball and m generated samples:

    precision   share of y with |x - y| <= r_k(x) for some x
    recall      share of x with |x - y| <= r_k(y) for some y
    density     number of pairs (x, y) with |x - y| <= r_k(x), over k m
    coverage    share of x with |x - y| <= r_k(x) for some y

Sources: Kynkaanniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2; Naeem et al. 2020, arXiv
2002.09797, section 3.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.errors import InputError
from poise.metrics.blocks import ROWS, checked, mean_of
from poise.shapes import Features

DISTANCES = 2**22  # distances held at a time: 32 MiB in float64
# As a share of |x|^2 + |y|^2. Squared distances that differ by less count as equal. Their rounding
# is about 1e-15.
TIE = 1e-13


@dataclass(frozen=True)
class Manifold:
    """Precision, recall, density and coverage of generated samples.

    Attributes:
        precision: share of generated samples within the real manifold, in [0, 1].
        recall: share of real samples within the generated manifold, in [0, 1].
        density: number of real balls that hold a generated sample, over k, mean over generated
            samples. About 1 for equal distributions; it can be larger.
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
    """Return improved precision and recall, density and coverage, from one pass over the distances.

    Balls are closed: ties count as within, as in torch-fidelity. The released code of Naeem et al.
    uses open balls. The two differ only if distances tie, for example with repeated images. All
    four metrics depend on n, so compare models at equal numbers of samples.

    Args:
        real, generated: (n, d) each. n may differ, and must be larger than both numbers of
            neighbours.
        neighbours: k of precision and recall, at least 1.
        density_neighbours: k of density and coverage, at least 1.
        real_reaches: `squared_reaches` of the real samples for the two numbers of neighbours;
            None: computed here.

    Raises:
        InputError: k below 1, n <= k, differing d, or values that are not finite.
    """
    real, generated = checked(real, generated)
    most = max(neighbours, density_neighbours)
    if min(neighbours, density_neighbours) < 1:
        raise InputError(
            "neighbours must be at least 1, "
            f"not {neighbours} (and {density_neighbours} for density)"
        )
    if min(len(real), len(generated)) <= most:
        given = f"{len(real)} real and {len(generated)} generated samples"
        raise InputError(
            f"{given} are too few for {most} neighbours: "
            f"give at least {most + 1} of each, or ask for fewer neighbours"
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
    """Return the squared distances (n,) to the k-th nearest neighbours, for each k.

    A sample is not its own neighbour. It is in the list of distances, so the k-th neighbour is the
    (k + 1)-th entry.
    """
    most = max(neighbours) + 1
    blocks = _squared_distances(features, features, mean_of(features))
    nearest = torch.cat([squared.topk(most, largest=False).values for squared in blocks])
    return [nearest[:, k] for k in neighbours]


def _squared_distances(
    rows: Tensor, columns: Tensor, centre: Tensor, *, tie: float = 0.0
) -> Iterator[Tensor]:
    """Yield squared distances in blocks of rows, (rows of the block, columns).

    Computes |x|^2 + |y|^2 - 2 x.y about a common centre. Without the centre, rounding of the
    squares would hide small distances. Subtracts `tie` times |x|^2 + |y|^2, so that `<=` includes
    ties despite rounding.
    """
    for block in rows.split(max(1, DISTANCES // len(columns))):
        x = block.double() - centre
        x_squared = x.square().sum(1, keepdim=True) * (1 - tie)
        squared = torch.empty(len(x), len(columns), dtype=torch.float64, device=x.device)
        for into, part in zip(squared.split(ROWS, 1), columns.split(ROWS), strict=True):
            y = part.double() - centre
            torch.addmm(y.square().sum(1) * (1 - tie), x, y.T, alpha=-2, out=into)
        yield squared.add_(x_squared)
