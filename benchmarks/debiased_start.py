"""Compare the two starts of `ComputedBalance`'s running average: first batch and debiased.

The average that starts at the first batch has the following value after t batches with mean
squared errors MSE_1 ... MSE_t and decay d:

    gamma2 = d^(t-1) MSE_1 + (1 - d) sum_{k=2..t} d^(t-k) MSE_k.

After 30 batches at d = 0.99 the first batch's error still has a weight of three quarters. The
debiased average starts at 0 and is divided by the sum of its weights, as Adam's moments are:

    gamma2 = (1 - d) / (1 - d^t) sum_{k=1..t} d^(t-k) MSE_k.

Both are measured on the computed runs of docs/claims.md (three seeds, same order and noise), on
the oracle of tests/test_oracle.py, and on a training of 30 steps:

    POISE_DATA=... python -m benchmarks.debiased_start [--only claims-digits]

The first-batch runs are repeated here, so that both starts are measured on one machine. The digits
alone need no POISE_DATA. Takes about 25 minutes of one core.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

import poise
from benchmarks.measuring import machine, show, write_report
from claims.__main__ import work
from claims.design import (
    COMPUTED,
    DIGITS,
    FASHION,
    LEARNED,
    MNIST,
    design,
)
from claims.design import compared as compared_sets
from claims.figures import (
    KL,
    TEST_MSE,
    Evidence,
    balanced_share,
    distance,
    evidence_bound,
    images_to,
    speed_up,
)
from poise.balance import make_balance
from poise.studies.comparison.experiment import Experiment
from poise.studies.results import read_results

PLAIN, DEBIASED = "computed:start=first-batch", "computed"
DEFAULT = Path("results/bench-debiased-start.json")
CLAIMS = Path("results/claims")
SEEDS = (0, 1, 2)
SETS = ("REC", "GEN-1", "GEN-2", "GEN-mixture")


def experiments(label: str, names: Sequence[str]) -> Iterator[Experiment]:
    """Yield the computed experiments of the claims, with balance `label` in both stages."""
    for experiment in design():
        if experiment.name in names:
            second = experiment.base.second
            both = {"second_balance": label} if second and second.balance == COMPUTED else {}
            (pixels,) = (
                c.protocol
                for c in experiment.compared[COMPUTED]
                if c.protocol.extractor == "pixels"
            )
            sets = replace(compared_sets("pixels", SETS, 2_000), protocol=pixels)
            yield replace(
                experiment, labels={label: {"balance": label} | both}, compared={label: (sets,)}
            )


def compared_runs(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """Train with both averages on the networks and schedules of the claims."""
    for label in (PLAIN, DEBIASED):
        work(list(experiments(label, names)), folder / "runs", folder / "results", jobs=1)
    evidence = Evidence([*read_results([folder / "results"])])
    slow = Evidence(r for r in read_results([CLAIMS]) if r.label == LEARNED)
    return {name: _figures(evidence, slow, name) for name in names}


def _figures(evidence: Evidence, slow: Evidence, experiment: str) -> dict[str, Any]:
    """Return each figure for both labels, one value per seed."""
    quantities = {"test MSE": TEST_MSE, "KL": KL, "ELBO at the best gamma2": evidence_bound}
    quantities |= {f"FD-pixels of {of}": distance(of, "pixels") for of in SETS}
    quantities["balanced within 10 %, from the first step"] = lambda run: balanced_share(
        run, 0.1, settled=False
    )
    figures: dict[str, Any] = {}
    for label in (PLAIN, DEBIASED):
        found = {
            name: list(evidence.values(experiment, label, q).values())
            for name, q in quantities.items()
        }
        for part in (0.05, 0.25, 0.5, 1.0):
            found[f"images to the MSE of first-batch after {part:.0%}"] = [
                images_to(run, _reached(plain, part))
                for plain, run in evidence.pairs(experiment, PLAIN, label)
            ]
            found[f"C1: fewer images than learned after {part:.0%}"] = [
                speed_up(slow.runs(experiment, LEARNED)[seed], run, part)
                for seed, run in evidence.runs(experiment, label).items()
            ]
        figures[label] = found
    return figures


def _reached(run: Any, part: float) -> float:
    """Return the training MSE after a part of stage 1, plus a tolerance of 2 %."""
    curve = run.curves["1"]
    goal = part * curve["images_seen"][-1] * (1 - 1e-9)
    place = next(k for k, images in enumerate(curve["images_seen"]) if images >= goal)
    return curve["mse"][place] * 1.02


def oracle() -> dict[str, list[float]]:
    """Return gamma2 of a linear VAE over the noise variance of probabilistic PCA, per seed."""
    sys.path.append(str(Path(__file__).parent.parent / "tests"))
    test_oracle = import_module("test_oracle")
    digits = torch.from_numpy(load_digits(return_X_y=True)[0]).float() / 16
    fitted = PCA(test_oracle.LATENTS).fit(digits.double().numpy())
    right = fitted.noise_variance_ * (len(digits) - 1) / len(digits)
    found: dict[str, list[float]] = {PLAIN: [], DEBIASED: []}
    for seed in SEEDS:
        for label in (PLAIN, DEBIASED):
            balance = make_balance(label)
            torch.manual_seed(seed)
            test_oracle.train_linear_vae(balance, digits, batch=599)
            found[label].append(float(balance.gamma2) / right)
    return found


def thirty_steps() -> dict[str, list[dict[str, float]]]:
    """Return gamma2, MSE and KL after 30 steps of an MLP on the digits, per seed."""
    digits = torch.from_numpy(load_digits(return_X_y=True)[0]).float().div(16).view(-1, 1, 8, 8)
    found: dict[str, list[dict[str, float]]] = {PLAIN: [], DEBIASED: []}
    for seed in SEEDS:
        for label in (PLAIN, DEBIASED):
            balance = make_balance(label)
            torch.manual_seed(seed)
            vae = poise.VAE(*poise.networks.mlp((1, 8, 8), latent_dim=8))
            optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
            last: dict[str, float] = {}
            for _ in range(30):
                images = digits[torch.randint(len(digits), (100,))]
                reconstruction, posterior = vae(images)
                terms = balance(reconstruction, images, posterior.mean, posterior.logvar)
                optimizer.zero_grad()
                terms.loss.backward()
                optimizer.step()
                last = {
                    "gamma2": float(balance.gamma2),
                    "mse": float(terms.error),
                    "kl": float(terms.kl),
                }
            found[label].append(last)
    return found


def table(figures: dict[str, Any]) -> list[list[str]]:
    """Return rows of mean ± standard deviation: both labels, and their ratio seed by seed."""
    rows = [["", "first-batch", "debiased", "debiased / first-batch - 1"]]
    for experiment, labels in figures.items():
        for name, plain in labels[PLAIN].items():
            other = labels[DEBIASED][name]
            ratios = [b / a - 1 for a, b in zip(plain, other, strict=True)]
            rows.append([f"{experiment}: {name}", _spread(plain), _spread(other), _percent(ratios)])
    return rows


def _spread(values: list[float]) -> str:
    return f"{mean(values):.4g} ± {stdev(values):.2g}"


def _percent(values: list[float]) -> str:
    return f"{mean(values):+.1%} ± {stdev(values):.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=(DIGITS, MNIST, FASHION), metavar="NAME")
    parser.add_argument("--json", type=Path, default=DEFAULT)
    parser.add_argument("--folder", type=Path, help="keep runs and results here, to continue later")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        figures = compared_runs(options.folder or Path(temporary), options.only)
    report = machine(torch.device("cpu")) | {"seeds": len(SEEDS), "claims": figures}
    report |= {"oracle": oracle(), "thirty_steps": thirty_steps()}
    write_report(options.json, report)
    show(table(figures))
    print("gamma2 / pPCA:", {name: _spread(values) for name, values in report["oracle"].items()})
    print("30 steps:", report["thirty_steps"])


if __name__ == "__main__":
    main()
