"""Monotone transforms of the numeric columns of a table, y = T(x), chosen on held-out rows.

The density of a row is that of its transformed numbers times the slopes,

    log p(x) = log p(y) + sum over observed columns of log T'(x).                               (1)

Kinds. With u = (x - m) / s, the standardised values of a column,

    none       x
    power      the Yeo-Johnson transform of u, with the likeliest exponent (Yeo & Johnson 2000)
    bounded    log(x - a) for values above a, or log((x - a) / (b - x)) for values between a and b
    quantile   the normal quantile of the column's distribution function, a monotone cubic through
               `KNOTS` quantiles, plus a share of u; straight beyond the last ones.

Choice. A Gaussian is fitted to T(x), and each kind is scored by the density (1) of held-out rows in
`FOLDS`-fold cross-validation. The best is chosen if it beats "none" by one standard error.

Whole numbers are dequantised: the fit adds uniform noise from -1/2 to 1/2. `score` takes the
density at the number itself. If the other columns determine a column, this density exceeds 1, while
the average over the numbers that round to it does not.
"""

import math
from typing import Any, Literal, Protocol, get_args, runtime_checkable

import numpy as np
from scipy.interpolate import PchipInterpolator
from scipy.special import ndtri
from scipy.stats import yeojohnson, yeojohnson_normmax

Kind = Literal["none", "power", "bounded", "quantile"]
KNOTS, ROWS_PER_KNOT, FOLDS, FEWEST_ROWS = 16, 20, 5, 40
STRAIGHT = 0.05  # share of u in a quantile transform, so that its slope is never 0
STEEPEST = 5.0  # largest exponent of the Yeo-Johnson transform, either sign: inverses stay exact
LEAST_NATS = -20.0  # of a standardised value, so that one outlier does not decide
# Distance of a guessed bound from the nearest value, in standard deviations of the column.
MARGIN = 0.05
# Within this distance of a guessed bound the logarithm is continued straight. A value one standard
# deviation beyond the bound is then some standard deviations from the mean, and not twenty.
EDGE = 0.25


@runtime_checkable
class Transform(Protocol):
    """A strictly increasing function of the values of one column; NaN stays NaN."""

    kind: Kind

    def __call__(self, x: np.ndarray) -> np.ndarray: ...
    def inverse(self, y: np.ndarray) -> np.ndarray: ...
    def log_slope(self, x: np.ndarray) -> np.ndarray: ...


class Identity:
    kind: Kind = "none"

    def __init__(self, x: np.ndarray) -> None: ...

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return x

    def inverse(self, y: np.ndarray) -> np.ndarray:
        return y

    def log_slope(self, x: np.ndarray) -> np.ndarray:
        return np.where(np.isnan(x), np.nan, 0.0)


class Power:
    """The Yeo-Johnson transform with the likeliest exponent.

    Args:
        x: values of the fit, without NaN.
    """

    kind: Kind = "power"

    def __init__(self, x: np.ndarray) -> None:
        self.mean, self.std = float(x.mean()), _std(x) or 1.0
        likeliest: Any = yeojohnson_normmax((x - self.mean) / self.std)
        exponent = float(likeliest)
        self.exponent = min(max(exponent, -STEEPEST), STEEPEST)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return np.asarray(yeojohnson((x - self.mean) / self.std, self.exponent))

    def inverse(self, y: np.ndarray) -> np.ndarray:
        k = self.exponent
        # Values beyond the image of the transform have no inverse: take the last that has one.
        above, below = np.maximum(y, 0.0), np.maximum(-y, 0.0)
        with np.errstate(over="ignore", invalid="ignore"):
            up = np.expm1(above) if k == 0 else np.maximum(1 + k * above, 1e-9) ** (1 / k) - 1
            j = 2 - k
            down = np.expm1(below) if j == 0 else np.maximum(1 + j * below, 1e-9) ** (1 / j) - 1
        return self.mean + self.std * np.where(np.isnan(y), np.nan, np.where(y >= 0, up, -down))

    def log_slope(self, x: np.ndarray) -> np.ndarray:
        u = (x - self.mean) / self.std
        return np.sign(u) * (self.exponent - 1) * np.log1p(np.abs(u)) - math.log(self.std)


class Bounded:
    """The logarithm of the distance from a bound, or the difference of those of two bounds.

    Near a bound the logarithm is continued straight: of the bound 0, nearer than any value of the
    fit; of others, which are guesses, within `EDGE`. So values beyond are unlikely, not impossible.

    Args:
        x: values of the fit, without NaN. If the least is positive and near 0, the lower bound is
            0, else it is a little below the least.
        upper: whether there is an upper bound too, a little above the largest value.
    """

    kind: Kind = "bounded"

    def __init__(self, x: np.ndarray, *, upper: bool = False) -> None:
        std = _std(x) or 1.0
        margin, edge = MARGIN * std, EDGE * std
        least, most = float(x.min()), float(x.max())
        positive = 0 < least < std
        self.lower = 0.0 if positive else least - margin
        self.upper = most + margin if upper else math.inf
        self.nearest = least if positive else edge, edge

    def __call__(self, x: np.ndarray) -> np.ndarray:
        low = _straight_log(x - self.lower, self.nearest[0])
        return (
            low if math.isinf(self.upper) else low - _straight_log(self.upper - x, self.nearest[1])
        )

    def log_slope(self, x: np.ndarray) -> np.ndarray:
        slope = 1 / np.maximum(x - self.lower, self.nearest[0])
        if math.isfinite(self.upper):
            slope = slope + 1 / np.maximum(self.upper - x, self.nearest[1])
        return np.log(slope)

    def inverse(self, y: np.ndarray) -> np.ndarray:
        nearest = self.nearest[0]
        if math.isfinite(self.upper):
            width = self.upper - self.lower
            reach = (10 + np.abs(y) + abs(math.log(width))) * width
            return _bisected(self, y, self.lower - reach, self.upper + reach)
        low = math.log(nearest)
        straight = nearest * (1 + np.minimum(y - low, 0.0))
        return self.lower + np.where(y < low, straight, np.exp(np.clip(y, low, 700.0)))


def _straight_log(distance: np.ndarray, nearest: float) -> np.ndarray:
    """Return log(distance), continued straight below `nearest`."""
    straight = math.log(nearest) + np.minimum(distance - nearest, 0.0) / nearest
    return np.where(distance < nearest, straight, np.log(np.maximum(distance, nearest)))


def _bisected(transform: Transform, y: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Return x with T(x) = y between `low` and `high`; NaN where y is."""
    for _ in range(80):
        middle = (low + high) / 2
        above = transform(middle) > y
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    return np.where(np.isnan(y), np.nan, (low + high) / 2)


class Quantile:
    """The normal quantile of the distribution function of the values of the fit.

    Args:
        x: values of the fit, without NaN.
    """

    kind: Kind = "quantile"

    def __init__(self, x: np.ndarray) -> None:
        self.mean, self.std = float(x.mean()), _std(x) or 1.0
        u = (x - self.mean) / self.std
        number = min(KNOTS, max(3, len(x) // ROWS_PER_KNOT))
        share = (np.arange(number) + 0.5) / number
        knots, where = np.unique(np.quantile(u, share), return_inverse=True)
        # Equal values have the mean of their quantiles.
        heights = ndtri(np.bincount(where, share) / np.bincount(where))
        self.curve = PchipInterpolator(knots, heights) if len(knots) > 1 else None
        self.ends = knots[[0, -1]]
        slopes = self.curve(self.ends, 1) if self.curve is not None else np.ones(2)
        mean_slope = np.ptp(heights) / max(float(np.ptp(knots)), 1e-300)
        self.slopes = np.maximum(slopes, 0.1 * mean_slope)

    def _parts(self, u: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the curve and its slope."""
        if self.curve is None:
            return u, np.where(np.isnan(u), np.nan, 1.0)
        (low, high), (of_low, of_high) = self.ends, self.slopes
        inside = u.clip(low, high)
        beyond = of_low * np.minimum(u - low, 0.0) + of_high * np.maximum(u - high, 0.0)
        slope = np.where(u < low, of_low, np.where(u > high, of_high, self.curve(inside, 1)))
        return self.curve(inside) + beyond, slope

    def __call__(self, x: np.ndarray) -> np.ndarray:
        u = (x - self.mean) / self.std
        return (1 - STRAIGHT) * self._parts(u)[0] + STRAIGHT * u

    def log_slope(self, x: np.ndarray) -> np.ndarray:
        slope = self._parts((x - self.mean) / self.std)[1]
        return np.log(((1 - STRAIGHT) * slope + STRAIGHT) / self.std)

    def inverse(self, y: np.ndarray) -> np.ndarray:
        """Return x by bisection. |u| is below |y| / STRAIGHT plus a constant."""
        reach = (np.abs(y) + np.abs(self(self.mean + self.std * self.ends)).max() + 10) / STRAIGHT
        return _bisected(self, y, self.mean - self.std * reach, self.mean + self.std * reach)


def fitted(kind: Kind, x: np.ndarray) -> Transform:
    """Return the transform of a kind for a column's observed values.

    "bounded" has two bounds if these make the values likelier.
    """
    if kind != "bounded":
        return {"none": Identity, "power": Power, "quantile": Quantile}[kind](x)
    one, two = Bounded(x), Bounded(x, upper=True)
    return two if _log_density(two, x, x).sum() > _log_density(one, x, x).sum() else one


def choose(x: np.ndarray) -> Transform:
    """Return the transform that makes held-out values of a column likeliest under a Gaussian.

    Of fewer than `FEWEST_ROWS` values it is "none".
    """
    if len(x) < FEWEST_ROWS or _std(x) == 0:
        return Identity(x)
    order = np.random.default_rng(0).permutation(len(x))
    found = {}
    for kind in get_args(Kind):
        density = np.empty(len(x))
        for fold in range(FOLDS):
            rows = order[fold::FOLDS]
            seen = np.delete(x, rows)
            density[rows] = _log_density(fitted(kind, seen), seen, x[rows])
        found[kind] = (density + math.log(x.std())).clip(LEAST_NATS)
    best = max(found, key=lambda kind: found[kind].mean())
    gain = found[best] - found["none"]
    if not gain.mean() > gain.std() / math.sqrt(len(x)):
        best = "none"
    return fitted(best, x)


def _std(x: np.ndarray) -> float:
    """Return the standard deviation, or 0 if the values differ by rounding only."""
    std = float(x.std())
    return std if std > 1e-12 * float(np.abs(x).max()) else 0.0


def _log_density(transform: Transform, seen: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return (1) of values for the Gaussian that is fitted to the transformed values `seen`."""
    y, of_seen = transform(x), transform(seen)
    std = max(float(of_seen.std()), 1e-300)
    scores = ((y - of_seen.mean()) / std).clip(-1e9, 1e9)
    return transform.log_slope(x) - scores**2 / 2 - math.log(std * math.sqrt(2 * math.pi))


class Transforms:
    """The transforms of all numeric columns of a table.

    Args:
        numbers: values of the fit, (rows, numeric columns), NaN where missing. Each column has an
            observed one.
        chosen: "auto", a kind for all columns, or None.

    Attributes:
        kinds: the kind of each column.
        whole: whether the values of a column are whole numbers that are dequantised, (columns,).
        least, most: limits of `inverse` for each column. A transformed column keeps to the range of
            the values of the fit, widened by its width on both sides: far from them, the inverse of
            a steep transform has no meaning. If no value of the fit was negative, the least is 0.
    """

    def __init__(self, numbers: np.ndarray, chosen: Kind | Literal["auto"] | None) -> None:
        columns = numbers.shape[1]
        self.whole = np.zeros(columns, bool)
        self.least, self.most = np.full(columns, -np.inf), np.full(columns, np.inf)
        self.columns: list[Transform] | None = None
        self.kinds: list[str] = ["none"] * columns
        if chosen is None:
            return
        observed = [column[~np.isnan(column)].astype(np.float64) for column in numbers.T]
        if chosen == "auto":
            # A column of 0 and 1 has no order that a density could use.
            found = [(v == np.round(v)).all() and len(np.unique(v)) > 2 for v in observed]
            self.whole = np.array(found, bool)
        noise = self._noise(numbers)
        observed = [
            (column + more)[~np.isnan(column)]
            for column, more in zip(numbers.T.astype(np.float64), noise.T, strict=True)
        ]
        self.columns = [choose(v) if chosen == "auto" else fitted(chosen, v) for v in observed]
        self.kinds = [transform.kind for transform in self.columns]
        for column, values in enumerate(observed):
            least, most = float(values.min()), float(values.max())
            if self.kinds[column] != "none":
                self.least[column], self.most[column] = 2 * least - most, 2 * most - least
            if least >= -0.5 * self.whole[column]:
                self.least[column] = max(0.0, self.least[column])

    def _noise(self, numbers: np.ndarray) -> np.ndarray:
        draws = np.random.default_rng(0).uniform(-0.5, 0.5, numbers.shape)
        return np.where(self.whole, draws, 0.0)

    def dequantised(self, table: np.ndarray) -> np.ndarray:
        """Return a table with uniform noise added to its whole numbers, the first columns."""
        if not self.whole.any():
            return table
        noise = np.zeros_like(table)
        noise[:, : len(self.whole)] = self._noise(table[:, : len(self.whole)])
        return table + noise

    def __call__(self, numbers: np.ndarray) -> np.ndarray:
        return self._each("__call__", numbers)

    def inverse(self, numbers: np.ndarray) -> np.ndarray:
        """Return the columns' own values. Those of dequantised columns are rounded."""
        if self.columns is None:
            return numbers
        found = self._each("inverse", numbers).clip(self.least, self.most)
        return np.where(self.whole, np.round(found), found)

    def log_slope(self, numbers: np.ndarray) -> np.ndarray:
        """Return the sum over the observed columns of log T'(x), (rows,)."""
        if self.columns is None:
            return np.zeros(len(numbers))
        return np.nansum(self._each("log_slope", numbers.astype(np.float64)), 1)

    def _each(self, name: str, numbers: np.ndarray) -> np.ndarray:
        assert self.columns is not None
        parts = [
            getattr(t, name)(column) for t, column in zip(self.columns, numbers.T, strict=True)
        ]
        return np.stack(parts, 1) if parts else numbers
