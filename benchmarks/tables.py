"""Compare the held-out log-likelihood of tables under a VAE, probabilistic PCA and a mixture.

    python benchmarks/tables.py [--splits 5] [--json FILE]

The tables come with scikit-learn. Columns are standardised over all rows, except the digits'
pixels, which share one unit. Each split holds out a fifth of the rows. The VAE (with its defaults)
and PCA have the same number of latents; BIC chooses the mixture's number of components (1 to 10,
full covariances). Printed are mean log densities of the held-out rows, in nats per row, with the
standard deviation over splits, and differences split by split.
"""

import argparse
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine, show, write_report
from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import train_test_split

from poise import VAEEstimator
from poise.studies.comparison.statistics import spread
from poise.studies.comparison.tables import show as mean_and_spread

TABLES: dict[str, tuple[Callable[..., Any], int]] = {  # loader, number of latents
    "iris": (load_iris, 2),
    "wine": (load_wine, 3),
    "breast cancer": (load_breast_cancer, 8),
    "digits": (load_digits, 16),
}


def mixture(seen: np.ndarray, seed: int) -> GaussianMixture:
    """Return the fitted mixture with the lowest BIC."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = [
            GaussianMixture(k, reg_covar=1e-3, random_state=seed).fit(seen) for k in range(1, 11)
        ]
    return min(fitted, key=lambda model: model.bic(seen))


def scores(rows: np.ndarray, latents: int, steps: int, seed: int) -> dict[str, float]:
    """Return each model's mean log density of the held-out rows, in nats per row."""
    split: list[Any] = train_test_split(rows, test_size=0.2, random_state=seed)
    seen, unseen = split
    models = {
        "VAE": VAEEstimator(latents, steps=steps, device="cpu", random_state=seed).fit(seen),
        "PCA": PCA(latents).fit(seen),
        "mixture": mixture(seen, seed),
    }
    return {name: float(model.score(unseen)) for name, model in models.items()}


def measured(name: str, splits: int, steps: int) -> dict[str, Any]:
    loader, latents = TABLES[name]
    rows = np.asarray(loader(return_X_y=True)[0])
    rows = rows if name == "digits" else (rows - rows.mean(0)) / rows.std(0)
    found = [scores(rows, latents, steps, seed) for seed in range(splits)]
    columns = {model: [values[model] for values in found] for model in found[0]}
    differences = {
        f"VAE - {model}": [values["VAE"] - values[model] for values in found]
        for model in ("PCA", "mixture")
    }
    figures = {
        label: [round(v, 3) for v in values] for label, values in (columns | differences).items()
    }
    return {"rows": len(rows), "columns": rows.shape[1], "latents": latents} | figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--steps", type=int, default=VAEEstimator().steps)
    parser.add_argument("--only", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    tables = {name: measured(name, options.splits, options.steps) for name in options.only}
    head = [key for key in next(iter(tables.values())) if key not in ("rows", "columns", "latents")]
    rows = [
        [
            name,
            *(str(found[key]) for key in ("rows", "latents")),
            *(mean_and_spread(spread(found[k])) for k in head),
        ]
        for name, found in tables.items()
    ]
    show([["nats a row", "rows", "latents", *head], *rows])
    if options.json:
        write_report(
            options.json,
            machine(torch.device("cpu")) | {"splits": options.splits, "tables": tables},
        )


if __name__ == "__main__":
    main()
