"""What results say: one number of a run, ratios paired by seed, how soon an error is reached, means and intervals."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import final

from poise.errors import InputError
from poise.studies.comparison.statistics import bootstrap, spread
from poise.studies.results import Result

Quantity = Callable[[Result], float]
SETTLED = 500  # steps until the running average has forgotten its start: 0.99^500 = 0.7 %
TOLERANCE = (
    1.02  # times an error, where it counts as reached: a point of a curve is noisy by about as much
)


@final
class Evidence:
    """All results, by experiment, label and seed."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.results = list(results)
        self._runs = {
            (result.experiment, result.label, result.seed): result for result in self.results
        }

    def runs(self, experiment: str, label: str) -> dict[int, Result]:
        """By seed, ascending."""
        found = {
            seed: r for (e, name, seed), r in self._runs.items() if (e, name) == (experiment, label)
        }
        return dict(sorted(found.items()))

    def values(self, experiment: str, label: str, quantity: Quantity) -> dict[int, float]:
        """A number of each run, by seed; runs of which it was not measured, or is undefined, are left out."""
        found = {
            seed: number(result, quantity) for seed, result in self.runs(experiment, label).items()
        }
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def mean(self, experiment: str, label: str, quantity: Quantity) -> float:
        """Over seeds; NaN where there are no runs."""
        found = spread(list(self.values(experiment, label, quantity).values()))
        return found.mean if found else math.nan

    def ratios(self, experiment: str, label: str, other: str, quantity: Quantity) -> list[float]:
        """label / other, for each seed that both have."""
        return quotients(
            self.values(experiment, label, quantity), self.values(experiment, other, quantity)
        )

    def pairs(self, experiment: str, label: str, other: str) -> list[tuple[Result, Result]]:
        """The runs of two labels, seed by seed."""
        one, two = self.runs(experiment, label), self.runs(experiment, other)
        return [(one[seed], two[seed]) for seed in one if seed in two]


def number(result: Result, quantity: Quantity) -> float:
    """NaN where it was not measured."""
    try:
        return quantity(result)
    except InputError:
        return math.nan


def quotients(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """one / other, for each seed that both have."""
    return [one[seed] / other[seed] for seed in sorted(set(one) & set(other))]


def of_page(name: str) -> Quantity:
    """A figure of a page, by its dotted name."""
    return lambda result: result.value(name)


def distance(of: str, extractor: str) -> Quantity:
    """The Frechet distance of a set of images."""
    return lambda result: result.value(f"FD-{extractor}", of)


def relative(one: Quantity, other: Quantity) -> Quantity:
    """one / other - 1 within a run."""
    return lambda result: one(result) / other(result) - 1


TEST_MSE = of_page("reconstruction.mse")
KL = of_page("reconstruction.kl_nats")
GAMMA2 = of_page("reconstruction.gamma2")


def evidence_bound(result: Result) -> float:
    """The ELBO in nats per image at the decoder variance that suits the run best, its sampled MSE: for any gamma2 it had."""
    num_dims = math.prod(result.data["shape"])
    error = result.value("reconstruction.mse_sampled")
    return -num_dims / 2 * (1 + math.log(2 * math.pi * error)) - KL(result)


def explained(result: Result) -> float:
    """The share of the pixels' variance that reconstructions have."""
    return 1 - TEST_MSE(result) / result.value("claims.pixel_variance")


def own_balance(result: Result) -> float:
    """gamma2 at the end over the MSE of the training images then."""
    return GAMMA2(result) / result.value("claims.train_mse_sampled")


def balanced_share(result: Result, tolerance: float, *, settled: bool = True) -> float:
    """The share of stage 1's points at which the quadratic term is within so much of D/2, that is, MSE / gamma2 near 1.

    Args:
        result: of a run.
        tolerance: as a share: 0.1.
        settled: leave out the points of the first 500 steps.
    """
    curve, first = (
        result.curves["1"],
        SETTLED * result.settings["first"]["batch_size"] if settled else 0,
    )
    quotient = [
        m / g
        for m, g, n in zip(curve["mse"], curve["gamma2"], curve["images_seen"], strict=True)
        if n > first
    ]
    return sum(abs(q - 1) <= tolerance for q in quotient) / len(quotient) if quotient else math.nan


def late_fall(result: Result) -> float:
    """By what share the training MSE falls in the second half of stage 1."""
    curve = result.curves["1"]
    half = curve["images_seen"][-1] / 2
    middle = next(
        mse
        for mse, images in zip(curve["mse"], curve["images_seen"], strict=True)
        if images >= half
    )
    return 1 - curve["mse"][-1] / middle


def speed_up(slow: Result, fast: Result, part: float) -> float:
    """How many times fewer images one run needs than another, for the training MSE that the other has after a part of stage 1.

    Both count until they first come within 2 % of it, so that a run beside itself gives 1. 0 where it never gets there. A
    point is the mean over a hundredth of stage 1: this is as fine as it gets.
    """
    curve = slow.curves["1"]
    whole = curve["images_seen"][-1]
    place = next(
        k for k, images in enumerate(curve["images_seen"]) if images >= part * whole * (1 - 1e-9)
    )
    goal = curve["mse"][place] * TOLERANCE
    return images_to(slow, goal) / images_to(fast, goal)


def images_to(result: Result, mse: float) -> float:
    """Images seen until the training MSE was first this small; infinite if it never was."""
    curve = result.curves["1"]
    return next(
        (n for n, value in zip(curve["images_seen"], curve["mse"], strict=True) if value <= mse),
        math.inf,
    )


def gap_closed(slow: Result, fast: Result, other: Result) -> float:
    """The share of the slow run's extra images that a third saves: 1 if it is as soon as the fast one where the slow one ends.

    NaN where there is no gap. Less than 0 where the third is later still; one that never gets there counts as if it got there
    at its end.
    """
    goal = slow.curves["1"]["mse"][-1] * TOLERANCE
    late, soon, third = (
        min(images_to(run, goal), run.curves["1"]["images_seen"][-1]) for run in (slow, fast, other)
    )
    return (late - third) / (late - soon) if late > soon else math.nan


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Spearman's, ties sharing their mean rank; NaN of fewer than three pairs, or where one side is constant."""
    if len(one) < 3:
        return math.nan
    a, b = _centred_ranks(one), _centred_ranks(other)
    size = math.sqrt(sum(x * x for x in a) * sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / size if size else math.nan


def _centred_ranks(values: Sequence[float]) -> list[float]:
    middle = (len(values) - 1) / 2
    return [
        sum(w < v for w in values) + (sum(w == v for w in values) - 1) / 2 - middle for v in values
    ]


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The bootstrap interval (95 %) of the mean; None of fewer than three values."""
    return bootstrap(values) if len(values) >= 3 else None
