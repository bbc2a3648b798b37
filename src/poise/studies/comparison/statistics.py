"""What several seeds say: means and spreads, differences paired by seed, and when an error was first reached.

A difference between two labels is taken seed by seed (same weights at the start where the networks are the same, same order,
same noise), so that what a seed does to both cancels. Its interval is the percentile bootstrap over seeds (Efron 1979): of
10,000 resamples of the n differences with replacement, the means' 2.5th and 97.5th percentile. Of few seeds it is too narrow.
"""

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from poise.errors import InputError
from poise.metrics.listed import FIGURES, is_compared
from poise.protocols import DEFAULT
from poise.studies.results import Result
from poise.variants import PRIORS

DRAWS = 10_000
BOOTSTRAP_SEED = 2020
COVERED = 0.95
FEWEST = 3  # seeds, of which an interval is given
NEAR = 1.1  # times the reference's final training error: where "reached" begins


def figures(result: Result, ambiguous: Collection[str]) -> dict[str, float]:
    """The numbers of a result that tables show, by name; those that were not measured, or are undefined, are left out.

    Args:
        result: of a run.
        ambiguous: `namesakes` of all results of the table.
    """
    values = {f.in_compare: _value(result, f.key) for f in FIGURES if f.in_compare}
    values |= {
        f"{name} {code}" if name in ambiguous else name: math.nan if value is None else value
        for name, code, value in _compared(result)
    }
    values["training seconds"] = _value(result, "seconds.training")
    return {name: value for name, value in values.items() if math.isfinite(value)}


def namesakes(results: Iterable[Result]) -> set[str]:
    """Return the names that stand for several protocols. Tables add the protocol's hash to them."""
    codes: dict[str, set[str]] = {}
    for result in results:
        for name, code, _ in _compared(result):
            codes.setdefault(name, set()).add(code)
    return {name for name, found in codes.items() if len(found) > 1}


def _compared(result: Result) -> Iterator[tuple[str, str, float | None]]:
    """Yield name, protocol's hash and value of each measurement that tables show.

    The name has that of the protocol if it is not the default one.
    """
    sets = ("REC", *(prior.label for prior in PRIORS.values()))
    for m in result.measurements():
        if is_compared(m["metric"]) and m["of"] in sets:
            protocol = result.evaluation["protocols"][m["protocol"]]["name"]
            under = "" if protocol == DEFAULT.name else f", {protocol}"
            yield f"{m['metric']} of {m['of']}{under}", m["protocol"], m["value"]


def _value(result: Result, *where: str) -> float:
    try:
        return result.value(*where)
    except InputError:
        return math.nan


@dataclass(frozen=True)
class Spread:
    """Mean and sample standard deviation of n values; the deviation of one value is None."""

    mean: float
    deviation: float | None
    n: int


def spread(values: Sequence[float]) -> Spread | None:
    """Of no values None."""
    if not values:
        return None
    return Spread(
        statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)
    )


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences and its bootstrap interval; None: of fewer than three there is none."""

    mean: float
    interval: tuple[float, float] | None
    n: int


def difference(values: Sequence[float]) -> Difference | None:
    """The mean of paired differences; of no pairs None."""
    if not values:
        return None
    return Difference(
        statistics.fmean(values), bootstrap(values) if len(values) >= FEWEST else None, len(values)
    )


def bootstrap(values: Sequence[float]) -> tuple[float, float]:
    """The percentile bootstrap interval (95 %) of the mean, the same at every call.

    Example:
        >>> bootstrap([1.0, 1.0, 1.0])
        (1.0, 1.0)
    """
    given = np.asarray(values, np.float64)
    chosen = np.random.default_rng(BOOTSTRAP_SEED).integers(len(given), size=(DRAWS, len(given)))
    low, high = np.quantile(given[chosen].mean(1), [(1 - COVERED) / 2, (1 + COVERED) / 2])
    return float(low), float(high)


def by_label(results: Iterable[Result]) -> dict[str, dict[int, Result]]:
    """Results by label, in the order in which labels first come, and seed."""
    groups: dict[str, dict[int, Result]] = {}
    for result in results:
        groups.setdefault(result.label, {})[result.seed] = result
    return groups


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """one - other, for each seed that both have, seeds ascending."""
    return [one[seed] - other[seed] for seed in sorted(set(one) & set(other))]


def threshold(reference: Iterable[Result]) -> float | None:
    """1.1 times the training MSE at the end of stage 1 (its last hundredth), mean over the reference's runs; None: no runs."""
    last = [result.curves["1"]["mse"][-1] for result in reference]
    return NEAR * statistics.fmean(last) if last else None


@dataclass(frozen=True)
class Reached:
    """Where in stage 1 a training error was first reached."""

    images: float
    seconds: float


def reached(result: Result, mse: float) -> Reached | None:
    """The first point of a run's curve with a training MSE of at most `mse`; None: it was never reached.

    A point is the mean over a hundredth of stage 1, so that this is as fine as it gets.
    """
    curve = result.curves["1"]
    place = next((k for k, value in enumerate(curve["mse"]) if value <= mse), None)
    return None if place is None else Reached(curve["images_seen"][place], curve["seconds"][place])
