"""Measure how long a fit of 500 rows takes, and the density of 20,000 rows of 30 columns.

    python benchmarks/scoring_rate.py [--rows 20000] [--latents 8] [--rounds 3] [--json FILE]

The rows are a random network's output for five latents, plus noise. The estimator has its defaults,
but the one whose densities are measured trains for `--steps` steps, on the rows that it scores.
Bars on two cores: a fit in seconds, 2 s with the encoder's proposal, 20 s with refined ones.
"""

import argparse
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine, seconds, show, summary, write_report

from poise import VAEEstimator

COLUMNS, NOISE = 30, 0.3


def table(rows: int) -> np.ndarray:
    draws = np.random.default_rng(0)
    hidden = np.tanh(draws.normal(size=(rows, 5)) @ draws.normal(size=(5, 40)))
    smooth = hidden @ draws.normal(size=(40, COLUMNS)) / 4
    return smooth + NOISE * draws.normal(size=smooth.shape)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--latents", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, device = table(options.rows), torch.device("cpu")
    warnings.simplefilter("ignore")  # of convergence
    first = VAEEstimator(options.latents, device="cpu", random_state=0)
    fit = seconds(lambda: first.fit(rows[:500]), device)
    print(f"fit of 500 rows: {fit:.1f} s, {first.history_[-1]['step']:.0f} steps")
    model = VAEEstimator(options.latents, steps=options.steps, device="cpu", random_state=0)
    model.fit(rows)
    figures = {name: getattr(options, name) for name in ("rows", "latents", "steps")}
    figures |= {"fit_of_500_rows_seconds": round(fit, 2)}
    figures |= {"hidden": list(model.hidden_), "n_iter": model.n_iter_}
    shown: list[list[Any]] = [["proposal", "seconds", "nats a row", "certain"]]
    for proposal in ("encoder", "refined"):
        model.set_params(score_proposal=proposal)
        scores = model.score_details(rows)
        density, certain = float(scores.log_density.mean()), float(scores.certain.mean())
        times = [seconds(lambda: model.score_samples(rows), device) for _ in range(options.rounds)]
        figures[proposal] = {"seconds": summary(times), "density": density, "certain": certain}
        shown.append([proposal, summary(times), f"{density:.3f}", f"{certain:.3f}"])
    show(shown)
    if options.json:
        write_report(options.json, machine(device) | figures)


if __name__ == "__main__":
    main()
