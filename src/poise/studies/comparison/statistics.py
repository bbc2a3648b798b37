"""Statistics over seeds: means and spreads, paired differences, images until an error is reached.

Two labels are compared seed by seed. Runs of one seed have the same order and noise, and the same
initial weights if the networks are the same, so effects that the seed has on both cancel.

The interval of a mean difference is Student's: mean +- t s / sqrt(n), with the sample standard
deviation s and the 97.5th percentile t of Student's distribution with n - 1 degrees of freedom. It
covers the true mean in 95 % of cases if the differences are normal, for few seeds too. A bootstrap
of three seeds covers it in about 75 %.
"""

import math
import statistics
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from scipy.special import stdtrit

from poise.errors import InputError
from poise.metrics.listed import FIGURES, is_compared
from poise.protocols import DEFAULT
from poise.runs.log import error_among
from poise.studies.results import Result
from poise.variants import PRIORS

COVERED = 0.95
FEWEST = 3  # smallest number of seeds with an interval
NEAR = 1.1  # an error counts as reached at this multiple of the reference's final training error


def figures(result: Result, ambiguous: Collection[str]) -> dict[str, float]:
    """Return the numbers that tables show, by name, without unmeasured and undefined ones.

    Args:
        result: result of a run.
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
    """Return the names shared by several protocols. Tables add the protocol's hash to them."""
    codes: dict[str, set[str]] = {}
    for result in results:
        for name, code, _ in _compared(result):
            codes.setdefault(name, set()).add(code)
    return {name for name, found in codes.items() if len(found) > 1}


def _compared(result: Result) -> Iterator[tuple[str, str, float | None]]:
    """Yield name, protocol's hash and value of each measurement that tables show.

    The name includes that of the protocol unless it is the default one.
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
    """Mean and sample standard deviation of n values. For n = 1 the deviation is None."""

    mean: float
    deviation: float | None
    n: int


def spread(values: Sequence[float]) -> Spread | None:
    """Return mean and sample standard deviation, or None if there are no values."""
    if not values:
        return None
    return Spread(
        statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values)
    )


@dataclass(frozen=True)
class Difference:
    """Mean of n paired differences and Student's interval, None for fewer than three."""

    mean: float
    interval: tuple[float, float] | None
    n: int


def difference(values: Sequence[float]) -> Difference | None:
    """Return the mean of paired differences and its interval, or None if there are no pairs."""
    if not values:
        return None
    return Difference(
        statistics.fmean(values),
        mean_interval(values) if len(values) >= FEWEST else None,
        len(values),
    )


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """Return Student's interval (95 %) of the mean of at least two values.

    Example:
        >>> [round(limit, 3) for limit in mean_interval([1.0, 2.0, 3.0])]
        [-0.484, 4.484]
    """
    mean, degrees = statistics.fmean(values), len(values) - 1
    margin = stdtrit(degrees, (1 + COVERED) / 2) * statistics.stdev(values) / math.sqrt(len(values))
    return float(mean - margin), float(mean + margin)


def by_label(results: Iterable[Result]) -> dict[str, dict[int, Result]]:
    """Group results by label, in order of first appearance, and by seed."""
    groups: dict[str, dict[int, Result]] = {}
    for result in results:
        groups.setdefault(result.label, {})[result.seed] = result
    return groups


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> list[float]:
    """Return one - other for each seed that both have, by ascending seed."""
    return [one[seed] - other[seed] for seed in sorted(set(one) & set(other))]


def threshold(reference: Iterable[Result]) -> float | None:
    """Return the training error that counts as reached, or None if there are no runs.

    It is 1.1 times the training error of the last hundredth of stage 1, averaged over the runs of
    the reference.
    """
    curves = [result.curves["1"] for result in reference]
    last = [curve[error_among(curve)][-1] for curve in curves]
    return NEAR * statistics.fmean(last) if last else None


@dataclass(frozen=True)
class Reached:
    """Images and seconds of stage 1 until a training error was first reached."""

    images: float
    seconds: float


def reached(result: Result, name: str, error: float) -> Reached | None:
    """Return the first point of a run's curve with at most a training error, or None.

    A point is the mean over a hundredth of stage 1, which limits the resolution.

    Args:
        result: the run.
        name: of the error in the curve. Runs with another error never reach it.
        error: the training error.
    """
    curve = result.curves["1"]
    place = next((k for k, value in enumerate(curve.get(name, ())) if value <= error), None)
    return None if place is None else Reached(curve["images_seen"][place], curve["seconds"][place])
