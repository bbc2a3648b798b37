"""Rules for when a claim holds. They are committed before the runs, and decide all verdicts.

A check compares the mean of n values with a bound, by Student's interval of the mean (95 %; see
`poise.studies.comparison.statistics`). There is one value per seed, or per pair of runs of one
seed.

    holds            the interval is on the claim's side of the bound
    does not hold    the interval is on the other side
    undecided        the bound is inside the interval
    not measured     fewer than three values

A claim

    holds            if every check holds
    does not hold    if every check fails, that is, does not hold
    is mixed         if some checks hold and others fail
    is undecided     otherwise: some checks are undecided, and the others agree

Checks that are not measured are named and do not count. If the true value of a check lies exactly
on its bound, the check is decided by chance in 5 % of cases, in each direction in 2.5 %. Of the k
checks of a claim, up to 0.05 k are thus expected to be decided by chance.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from claims.figures import interval
from poise.studies.comparison.statistics import COVERED, FEWEST


class Outcome(Enum):
    """Outcome of a check or a claim. Only a claim can be mixed."""

    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "undecided"
    MIXED = "mixed"
    ABSENT = "not measured"


@dataclass(frozen=True)
class Check:
    """A comparison of a figure with a bound.

    Attributes:
        what: name of the figure.
        rule: the condition on the figure: "below 0 %".
        figure: mean, interval and n, as text.
        outcome: outcome by the rule.
    """

    what: str
    rule: str
    figure: str
    outcome: Outcome


@dataclass(frozen=True)
class Style:
    """Number format of a figure: scale, digits and unit."""

    scale: float = 1
    digits: int = 2
    unit: str = ""
    signed: bool = False

    def show(self, value: float) -> str:
        sign = "+" if self.signed else ""
        return f"{value * self.scale:{sign}.{self.digits}f}"

    def bound(self, value: float) -> str:
        return f"{value * self.scale:g}{self.unit}"


PLAIN = Style()
FINE = Style(digits=3)
PERCENT = Style(100, 1, " %", signed=True)
SHARE = Style(100, 1, " %")
NATS = Style(1, 2, " nats", signed=True)
NAMED = 6  # most checks that a verdict names


def below(what: str, values: Iterable[float], bound: float, style: Style = PLAIN) -> Check:
    """Return a check that holds if the interval is below the bound."""
    values, (low, high) = _interval(values)
    outcome = _outcome(values, high < bound, low > bound)
    return Check(what, f"below {style.bound(bound)}", describe(values, style), outcome)


def above(what: str, values: Iterable[float], bound: float, style: Style = PLAIN) -> Check:
    """Return a check that holds if the interval is above the bound."""
    values, (low, high) = _interval(values)
    outcome = _outcome(values, low > bound, high < bound)
    return Check(what, f"above {style.bound(bound)}", describe(values, style), outcome)


def near(
    what: str, values: Iterable[float], target: float, tolerance: float, style: Style = PLAIN
) -> Check:
    """Return a check that holds if the interval is within the tolerance of the target.

    It fails if the interval is entirely outside.
    """
    values, (low, high) = _interval(values)
    least, most = target - tolerance, target + tolerance
    outcome = _outcome(values, least <= low and high <= most, high < least or low > most)
    return Check(
        what, f"{style.bound(least)} to {style.bound(most)}", describe(values, style), outcome
    )


def less(what: str, ratios: Iterable[float]) -> Check:
    """Return a check that holds if the first value is less than the second.

    Args:
        what: name of the figure.
        ratios: first / second, one per pair.
    """
    return below(what, [ratio - 1 for ratio in ratios], 0, PERCENT)


def no_worse(what: str, ratios: Iterable[float], margin: float) -> Check:
    """Return a check that holds if the first value exceeds the second by less than a margin.

    Args:
        what: name of the figure, of which lower is better.
        ratios: first / second, one per pair.
        margin: largest relative excess, such as 0.05.
    """
    return below(what, [ratio - 1 for ratio in ratios], margin, PERCENT)


def _interval(values: Iterable[float]) -> tuple[list[float], tuple[float, float]]:
    """Return the finite values and their interval."""
    finite = [value for value in values if math.isfinite(value)]
    return finite, interval(finite) or (math.nan, math.nan)


def _outcome(values: Sequence[float], holds: bool, fails: bool) -> Outcome:
    if len(values) < FEWEST:
        return Outcome.ABSENT
    return Outcome.HOLDS if holds else Outcome.FAILS if fails else Outcome.OPEN


def describe(values: Sequence[float], style: Style) -> str:
    """Format mean, interval and n of values."""
    if not values:
        return "-"
    mean, limits = sum(values) / len(values), interval(values)
    shown = style.show(mean) + style.unit
    return (
        f"{shown} [{style.show(limits[0])}, {style.show(limits[1])}], n = {len(values)}"
        if limits
        else shown
    )


def verdict(checks: Sequence[Check]) -> Outcome:
    """Return the outcome of a claim from its checks."""
    outcomes = {check.outcome for check in checks} - {Outcome.ABSENT}
    if not outcomes:
        return Outcome.ABSENT
    if len(outcomes) == 1:
        return outcomes.pop()
    return Outcome.MIXED if {Outcome.HOLDS, Outcome.FAILS} <= outcomes else Outcome.OPEN


def verdict_text(checks: Sequence[Check]) -> str:
    """Format the verdict, with the checks of each outcome if they differ, the failed ones first.

    A few checks are named, more are counted.
    """
    outcome = verdict(checks)
    if outcome is Outcome.ABSENT:
        return "**not measured yet**"
    kinds = (Outcome.FAILS, Outcome.OPEN, Outcome.HOLDS)
    listed = [f"{kind.value} for {names}" for kind in kinds if (names := _listed(checks, kind))]
    parts = f": {'; '.join(listed)}" if len(listed) > 1 else ""
    absent = _listed(checks, Outcome.ABSENT)
    return f"**{outcome.value}**{parts}" + (f" (not measured: {absent})" if absent else "")


def decided_by_chance(checks: Sequence[Check]) -> float:
    """Return how many checks are decided by chance if the true values lie on their bounds."""
    return (1 - COVERED) * sum(check.outcome is not Outcome.ABSENT for check in checks)


def _listed(checks: Sequence[Check], outcome: Outcome) -> str:
    names = [check.what for check in checks if check.outcome is outcome]
    if len(checks) <= NAMED or not names:
        return " · ".join(names)
    return f"{len(names)} check{'s' * (len(names) > 1)}"
