"""When a claim holds. Written before the runs; what a page says follows from the figures by these rules alone.

A check compares the mean of n values, one for each seed (or each pair of runs of one seed), with a bound, by its bootstrap
interval (percentile, 95 %, 10,000 resamples; of three values that is about their range, so that with three seeds "the interval
lies below" means "every seed lies below"):

    holds            the interval lies on the claim's side of the bound
    does not hold    it lies on the other side
    undecided        the bound lies inside it
    not measured     fewer than three values

A claim with several checks *holds* if all hold, *does not hold* if none does and at least one fails, is *undecided* if all are;
otherwise it *depends*, and the verdict lists the checks by what came out. Checks that were not measured are named, and do not
count.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from claims.figures import interval


class Outcome(Enum):
    """What became of a check."""

    HOLDS = "holds"
    FAILS = "does not hold"
    OPEN = "undecided"
    ABSENT = "not measured"


@dataclass(frozen=True)
class Check:
    """One question that figures answer.

    Attributes:
        what: in words.
        rule: what is asked of the figure: "below 0 %".
        figure: mean, interval and n, in words.
        outcome: by the rule.
    """

    what: str
    rule: str
    figure: str
    outcome: Outcome


@dataclass(frozen=True)
class Style:
    """How a figure is written: its scale, digits and unit."""

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


def below(what: str, values: Iterable[float], bound: float, style: Style = PLAIN) -> Check:
    """Holds if the mean is clearly below the bound."""
    values, (low, high) = _interval(values)
    outcome = _outcome(values, high < bound, low > bound)
    return Check(what, f"below {style.bound(bound)}", describe(values, style), outcome)


def above(what: str, values: Iterable[float], bound: float, style: Style = PLAIN) -> Check:
    """Holds if the mean is clearly above the bound."""
    values, (low, high) = _interval(values)
    outcome = _outcome(values, low > bound, high < bound)
    return Check(what, f"above {style.bound(bound)}", describe(values, style), outcome)


def near(
    what: str, values: Iterable[float], target: float, tolerance: float, style: Style = PLAIN
) -> Check:
    """Holds if the interval lies within the tolerance of the target; does not if it lies outside."""
    values, (low, high) = _interval(values)
    least, most = target - tolerance, target + tolerance
    outcome = _outcome(values, least <= low and high <= most, high < least or low > most)
    return Check(
        what, f"{style.bound(least)} to {style.bound(most)}", describe(values, style), outcome
    )


def less(what: str, ratios: Iterable[float]) -> Check:
    """Holds if the first is clearly less than the second; of ratios first / second, one for each pair."""
    return below(what, [ratio - 1 for ratio in ratios], 0, PERCENT)


def no_worse(what: str, ratios: Iterable[float], margin: float) -> Check:
    """Holds if the first (of which less is better) exceeds the second by clearly less than the margin."""
    return below(what, [ratio - 1 for ratio in ratios], margin, PERCENT)


def _interval(values: Iterable[float]) -> tuple[list[float], tuple[float, float]]:
    """Finite values, and their interval."""
    finite = [value for value in values if math.isfinite(value)]
    return finite, interval(finite) or (math.nan, math.nan)


def _outcome(values: Sequence[float], holds: bool, fails: bool) -> Outcome:
    if len(values) < 3:
        return Outcome.ABSENT
    return Outcome.HOLDS if holds else Outcome.FAILS if fails else Outcome.OPEN


def describe(values: Sequence[float], style: Style) -> str:
    """Mean, interval and n of values."""
    if not values:
        return "-"
    mean, limits = sum(values) / len(values), interval(values)
    shown = style.show(mean) + style.unit
    return (
        f"{shown} [{style.show(limits[0])}, {style.show(limits[1])}], n = {len(values)}"
        if limits
        else shown
    )


def verdict(checks: Sequence[Check]) -> Outcome | None:
    """What the checks of a claim come to; None: it depends."""
    outcomes = {check.outcome for check in checks} - {Outcome.ABSENT}
    if not outcomes:
        return Outcome.ABSENT
    if Outcome.FAILS in outcomes and Outcome.HOLDS not in outcomes:
        return Outcome.FAILS
    return outcomes.pop() if len(outcomes) == 1 else None


def verdict_text(checks: Sequence[Check]) -> str:
    """The verdict in words, with the checks behind it where they disagree or are not measured."""
    outcome = verdict(checks)
    absent = _listed(checks, Outcome.ABSENT)
    if outcome is Outcome.ABSENT:
        return "**not measured yet**"
    left_out = f" (not measured: {absent})" if absent else ""
    if outcome is None:
        parts = [
            f"{kind.value} for {names}"
            for kind in (Outcome.HOLDS, Outcome.FAILS, Outcome.OPEN)
            if (names := _listed(checks, kind))
        ]
        return f"**depends**: {'; '.join(parts)}{left_out}"
    undecided = _listed(checks, Outcome.OPEN) if outcome is Outcome.FAILS else ""
    return f"**{outcome.value}**" + (f"; undecided for {undecided}" if undecided else "") + left_out


def _listed(checks: Sequence[Check], outcome: Outcome) -> str:
    return ", ".join(check.what for check in checks if check.outcome is outcome)
