"""MNIST, a few epochs of stage 1 with each balance: MSE, KL, gamma2, active latents. One JSON per run, one table.

    python benchmarks/mnist_balances.py [--epochs 2] [--seeds 3] [--runs runs/mnist-balances] [--results results]

Network, batch size and learning rate are those of the recipe `mnist` (InfoGAN-type net, batch 64, Adam 5e-4). Finished runs are
not done again. The figures are on the 10,000 test images.
"""

import argparse
import json
import platform
import statistics
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import poise
from poise.recipes import RECIPES

BALANCES = ("computed", "learned", "fixed:gamma2=1")
COLUMNS = (
    ("mse", ".4f"),
    ("kl_nats", ".2f"),
    ("gamma2", ".4f"),
    ("quadratic_share", ".3f"),
    ("elbo_nats", ".0f"),
    ("active_units", ".1f"),
)


def one_run(balance: str, seed: int, epochs: int, runs: Path) -> dict[str, Any]:
    recipe = RECIPES["mnist"]
    recipe = replace(
        recipe, first=replace(recipe.first, epochs=epochs, balance=balance), second=None, seed=seed
    )
    run = poise.train(
        "mnist", recipe=recipe, out=runs / f"{balance}-{seed}", options=poise.Options(device="cpu")
    )
    summary = json.loads((run.folder / "summary.json").read_text())
    config = json.loads((run.folder / "config.json").read_text())
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    provenance = {
        "versions": config["versions"],
        "commit": commit,
        "machine": f"{platform.machine()}, {summary['device']}",
    }
    return {
        "experiment": "mnist-balances",
        "settings": config["recipe"],
        "data": config["data"]["checksum"],
        **provenance,
    } | summary


def figures(result: dict[str, Any]) -> dict[str, float]:
    return result["reconstruction"] | result["latents"]


def table(results: list[dict[str, Any]]) -> str:
    """A Markdown table: mean and standard deviation over seeds."""
    lines = [
        "| balance | n | " + " | ".join(name for name, _ in COLUMNS) + " |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    for balance in BALANCES:
        mine = [
            figures(result)
            for result in results
            if result["settings"]["first"]["balance"] == balance
        ]
        cells = [spread([row[name] for row in mine], style) for name, style in COLUMNS]
        lines.append(f"| {balance} | {len(mine)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float], style: str) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):{style}} ± {deviation:{style}}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs/mnist-balances"))
    parser.add_argument("--results", type=Path, default=Path("results"))
    options = parser.parse_args()
    results = []
    options.results.mkdir(parents=True, exist_ok=True)
    for seed in range(options.seeds):
        for balance in BALANCES:
            result = one_run(balance, seed, options.epochs, options.runs)
            name = f"mnist-balances-{balance.replace(':', '-').replace('=', '-')}-{seed}.json"
            (options.results / name).write_text(json.dumps(result, indent=1) + "\n")
            results.append(result)
    print(
        f"torch {torch.__version__}, {options.epochs} epochs, test images, mean ± standard deviation over {options.seeds} seeds"
    )
    print(table(results))


if __name__ == "__main__":
    main()
