"""Measure where the gamma2 of a linear VAE ends, by batch size, for two rules.

    python benchmarks/released_rule.py

The maximum-likelihood noise variance of probabilistic PCA is the optimum of a linear VAE. The plain
running average is compared with the release's rule, which starts at 1 and never raises gamma2.
Standardised columns of the wine and breast cancer data, and the digits. Takes ten minutes of a
core, and writes results/bench-released-rule.json.
"""

import argparse
import json
import warnings
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from measuring import machine, write_report
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.decomposition import PCA
from sklearn.preprocessing import StandardScaler
from torch import Tensor

import poise
from poise.studies.comparison.tables import markdown

REPORT = Path("results/bench-released-rule.json")
RULES = {
    "average": poise.ComputedBalance,
    "released": lambda: poise.ComputedBalance(start=1.0, monotone=True),
}
BATCHES = (8, 16, 32, 64, 128)
LATENTS = {"wine": 4, "breast cancer": 8, "digits": 16}
SEEDS, STEPS = 3, 6_000


def tables() -> dict[str, Tensor]:
    """Return the data, (n, d) float32 each."""
    made = {
        "wine": StandardScaler().fit_transform(load_wine(return_X_y=True)[0]),
        "breast cancer": StandardScaler().fit_transform(load_breast_cancer(return_X_y=True)[0]),
        "digits": load_digits(return_X_y=True)[0] / 16,
    }
    return {name: torch.from_numpy(values).float() for name, values in made.items()}


def likeliest(data: Tensor, latents: int) -> float:
    """Return the maximum-likelihood noise variance of probabilistic PCA (moments over n)."""
    found = PCA(latents).fit(data.double().numpy()).noise_variance_
    return float(found * (len(data) - 1) / len(data))


def final_gamma2(rule: str, data: Tensor, latents: int, batch: int, seed: int, steps: int) -> float:
    """Return gamma2 after training a linear VAE with Adam and a cosine schedule to zero."""
    torch.manual_seed(seed)
    encoder, decoder = poise.networks.mlp(data.shape[1], latents, hidden=(), output="linear")
    vae, balance = poise.VAE(encoder, decoder), RULES[rule]()
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    per_epoch = len(data) // batch
    order = torch.empty(0)
    for step in range(steps):
        if step % per_epoch == 0:
            order = torch.randperm(len(data))[: per_epoch * batch].view(per_epoch, batch)
        rows = data[order[step % per_epoch]]
        reconstruction, posterior = vae(rows)
        loss = balance(reconstruction, rows, posterior.mean, posterior.logvar).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return float(balance.gamma2)


def measure(steps: int) -> list[dict[str, Any]]:
    rows = []
    for name, data in tables().items():
        best = likeliest(data, LATENTS[name])
        for batch in BATCHES:
            for rule in RULES:
                found = [
                    final_gamma2(rule, data, LATENTS[name], batch, seed, steps) / best
                    for seed in range(SEEDS)
                ]
                rows.append({"data": name, "batch": batch, "rule": rule, "ratios": found})
                print(name, batch, rule, np.round(found, 3), flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Return the table of gamma2 over the optimum: a row per data set and rule."""
    head = ["data, latents", "rule", *(f"batch {batch}" for batch in BATCHES)]
    body = [
        [
            f"{name}, {LATENTS[name]}", rule,
            *(
                f"{mean(row['ratios']):.2f} ± {stdev(row['ratios']):.2f}"
                for row in rows
                if (row["data"], row["rule"]) == (name, rule)
            ),
        ]
        for name in LATENTS
        for rule in RULES
    ]  # fmt: skip
    return markdown([head, *body])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path, default=REPORT)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", "MSE .* above the variance")
    rows = measure(options.steps)
    report = machine(torch.device("cpu")) | {"steps": options.steps, "rows": rows}
    write_report(options.json, report)
    print(table(json.loads(options.json.read_text())["rows"]))


if __name__ == "__main__":
    main()
