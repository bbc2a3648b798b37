"""Figures of results: numbers of a run, paired ratios, images until an error, means, intervals."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, final

from scipy.stats import spearmanr

from poise.errors import InputError
from poise.studies.comparison.statistics import FEWEST, mean_interval, spread
from poise.studies.results import Result

Quantity = Callable[[Result], float]
SETTLED = 500  # steps until the running average forgets its start: 0.99^500 = 0.7 %
# An error counts as reached at this multiple of it. The points of a curve are about as noisy.
TOLERANCE = 1.02


@final
class Evidence:
    """Results by experiment, label and seed."""

    def __init__(self, results: Iterable[Result]) -> None:
        self.results = list(results)
        self._runs = {
            (result.experiment, result.label, result.seed): result for result in self.results
        }

    def runs(self, experiment: str, label: str) -> dict[int, Result]:
        """Return the results of a label by ascending seed."""
        found = {
            seed: r for (e, name, seed), r in self._runs.items() if (e, name) == (experiment, label)
        }
        return dict(sorted(found.items()))

    def values(self, experiment: str, label: str, quantity: Quantity) -> dict[int, float]:
        """Return a number of each run by seed, without unmeasured and undefined ones."""
        found = {
            seed: number(result, quantity) for seed, result in self.runs(experiment, label).items()
        }
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def mean(self, experiment: str, label: str, quantity: Quantity) -> float:
        """Return the mean of a number over seeds, NaN if there are no runs."""
        found = spread(list(self.values(experiment, label, quantity).values()))
        return found.mean if found else math.nan

    def ratios(self, experiment: str, label: str, other: str, quantity: Quantity) -> list[float]:
        """Return the ratio label / other of a number for each seed that both have."""
        return quotients(
            self.values(experiment, label, quantity), self.values(experiment, other, quantity)
        )

    def pairs(self, experiment: str, label: str, other: str) -> list[tuple[Result, Result]]:
        """Return the pairs of runs of two labels, seed by seed."""
        one, two = self.runs(experiment, label), self.runs(experiment, other)
        return [(one[seed], two[seed]) for seed in one if seed in two]


def number(result: Result, quantity: Quantity) -> float:
    """Return a number of a result, NaN if it was not measured."""
    try:
        return quantity(result)
    except InputError:
        return math.nan


def quotients(one: dict[int, float], other: dict[int, float]) -> list[float]:
    """Return one / other for each seed that both have."""
    return [one[seed] / other[seed] for seed in sorted(set(one) & set(other))]


def of_page(name: str) -> Quantity:
    """Return the quantity that reads a figure of a page by its dotted name."""
    return lambda result: result.value(name)


def distance(of: str, extractor: str) -> Quantity:
    """Return the quantity that reads the Frechet distance of a set of images."""
    return lambda result: result.value(f"FD-{extractor}", of)


def relative(one: Quantity, other: Quantity) -> Quantity:
    """Return the quantity one / other - 1 within a run."""
    return lambda result: one(result) / other(result) - 1


TEST_MSE = of_page("reconstruction.mse")
KL = of_page("reconstruction.kl_nats")
GAMMA2 = of_page("reconstruction.gamma2")
ELBO = of_page("reconstruction.elbo_nats")


def evidence_bound(result: Result) -> float:
    """Return the ELBO in nats per image at the run's best decoder variance, its sampled MSE.

    It does not depend on the gamma2 that the run ended with.
    """
    num_dims = math.prod(result.data["shape"])
    error = result.value("reconstruction.mse_sampled")
    return -num_dims / 2 * (1 + math.log(2 * math.pi * error)) - KL(result)


def explained(result: Result) -> float:
    """Return the share of the pixels' variance that reconstructions explain."""
    return 1 - TEST_MSE(result) / result.value("claims.pixel_variance")


def own_balance(result: Result) -> float:
    """Return final gamma2 over the final MSE of training images."""
    return GAMMA2(result) / result.value("claims.train_mse_sampled")


def balanced_share(result: Result, tolerance: float, *, settled: bool = True) -> float:
    """Return the share of stage 1's points with MSE / gamma2 near 1 (quadratic term near D/2).

    Args:
        result: result of a run.
        tolerance: largest distance from 1, above 0, such as 0.1.
        settled: leave out the points of the first 500 steps.

    Returns:
        A share in [0, 1], NaN if there are no points.
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
    """Return the share by which the training MSE falls in the second half of stage 1."""
    curve = result.curves["1"]
    half = curve["images_seen"][-1] / 2
    middle = next(
        mse
        for mse, images in zip(curve["mse"], curve["images_seen"], strict=True)
        if images >= half
    )
    return 1 - curve["mse"][-1] / middle


def speed_up(slow: Result, fast: Result, part: float) -> float:
    """Return the ratio of images that two runs need to reach the same training MSE, slow / fast.

    The MSE is that of the slow run after a part of stage 1. For both runs it counts as reached
    within 2 %, so a run compared with itself gives 1. A point is the mean over a hundredth of stage
    1, which limits the resolution.

    Args:
        slow: result of the run that sets the MSE.
        fast: result of the other run.
        part: share of stage 1, in (0, 1].

    Returns:
        The ratio, 0 if `fast` never reaches the MSE.
    """
    curve = slow.curves["1"]
    whole = curve["images_seen"][-1]
    place = next(
        k for k, images in enumerate(curve["images_seen"]) if images >= part * whole * (1 - 1e-9)
    )
    goal = curve["mse"][place] * TOLERANCE
    return images_to(slow, goal) / images_to(fast, goal)


def images_to(result: Result, mse: float) -> float:
    """Return the images seen until the training MSE is first at most `mse`, else infinity."""
    curve = result.curves["1"]
    return next(
        (n for n, value in zip(curve["images_seen"], curve["mse"], strict=True) if value <= mse),
        math.inf,
    )


def gap_closed(slow: Result, fast: Result, other: Result) -> float:
    """Return the share of the slow run's extra images that a third run saves.

    Images are counted until the final training MSE of the slow run, within 2 %. A run that never
    reaches it counts with all its images.

    Args:
        slow: result of the run that sets the MSE.
        fast: result of the run with the full gain.
        other: result of the third run.

    Returns:
        1 if the third run is as fast as the fast one, below 0 if it is slower than the slow one,
        NaN if there is no gap.
    """
    goal = slow.curves["1"]["mse"][-1] * TOLERANCE
    late, soon, third = (
        min(images_to(run, goal), run.curves["1"]["images_seen"][-1]) for run in (slow, fast, other)
    )
    return (late - third) / (late - soon) if late > soon else math.nan


def rank_correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Return Spearman's rank correlation. Ties share their mean rank.

    Args:
        one, other: paired values.

    Returns:
        A value in [-1, 1], NaN for fewer than three pairs or if one side is constant.
    """
    if len(one) < 3 or len(set(one)) == 1 or len(set(other)) == 1:
        return math.nan
    found: Any = spearmanr(one, other)
    return float(found.statistic)


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return Student's interval (95 %) of the mean, None for fewer than three values."""
    return mean_interval(values) if len(values) >= FEWEST else None
