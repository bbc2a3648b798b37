"""Data, held-out figures and tables that all integrations share.

Figures are those of held-out rows, with one latent sampled from each posterior.

- error: mean of the error over observed dimensions, of the first group if there are several.
- kl_nats: KL from the prior, per row.
- elbo: evidence lower bound in nats per observed dimension. A loss with a fixed weight says nothing
  about the variances of the decoder. So the gamma2 of each group is the mean error of the training
  rows, for both losses. This favours the library's own loss.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from poise.balance import negative_log_likelihood

Figures = dict[str, float]
Train = Callable[[int, int], Figures]
MARK = "# poise"  # ends the lines that the balance needs, or begins a comment on them
HELD_OUT = 297


@dataclass(frozen=True)
class Outputs:
    """Errors of rows: error and dims (n, groups), kl and nll (n,), each summed over dimensions."""

    error: Tensor
    dims: Tensor
    kl: Tensor
    nll: Tensor | None = None


@torch.no_grad()
def figures(train: Outputs, test: Outputs, power: float = 2) -> Figures:
    """Return the figures of a trained model, see above."""
    gamma2 = train.error.sum(0) / train.dims.sum(0)
    nats = negative_log_likelihood(test.error, gamma2, test.dims, power=power).sum(1) + test.kl
    nats = nats if test.nll is None else nats + test.nll
    return {
        "error": float(test.error[:, 0].sum() / test.dims[:, 0].sum()),
        "kl_nats": float(test.kl.mean()),
        "elbo": float(-nats.sum() / test.dims.sum()),
    }


def digits(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the 8x8 digits in [0, 1], (n, 1, 8, 8), and labels: of training, of held-out rows."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16, dtype=torch.float32).view(-1, 1, 8, 8)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    images, classes = images[order], torch.as_tensor(labels)[order]
    return images[HELD_OUT:], classes[HELD_OUT:], images[:HELD_OUT], classes[:HELD_OUT]


def batches(rows: int, steps: int, seed: int, size: int = 100) -> Iterator[Tensor]:
    """Yield the indices of each batch, the same for both losses."""
    source = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(rows, (size,), generator=source)


def changed_lines(path: Path) -> int:
    """Return how many lines of an integration are for the balance."""
    return sum(f"  {MARK}" in line for line in path.read_text().splitlines())


def tables(report: dict[str, Any]) -> str:
    """Return the table of docs/your-loop.md: means ± standard deviations over seeds."""
    rows = [
        [
            "where",
            "lines",
            "steps",
            "minutes",
            "loss",
            "test error",
            "KL (nats)",
            "ELBO / dimension",
        ]
    ]
    for name, found in report["integrations"].items():
        for loss in ("own", "balanced"):
            seeds = found[loss]
            cells = [
                spread([figures[key] for figures in seeds], style)
                for key, style in (("error", ".4f"), ("kl_nats", ".1f"), ("elbo", ".3f"))
            ]
            label = found["own_loss"] if loss == "own" else "computed balance"
            told = [name, str(found["lines"]), str(found["steps"]), f"{found['minutes']:.1f}"]
            where = told if loss == "own" else [""] * len(told)
            rows.append([*where, label, *cells])
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def spread(values: list[float], style: str) -> str:
    deviation = f" ± {stdev(values):{style}}" if len(values) > 1 else ""
    return f"{fmean(values):{style}}{deviation}"


def main(own: Train, balanced: Train, steps: int) -> None:
    """Train with both losses and write the figures of each seed as JSON. Called by a script."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {"steps": options.steps}
    for name, train in (("own", own), ("balanced", balanced)):
        began = time.perf_counter()
        report[name] = [train(seed, options.steps) for seed in range(options.seeds)]
        report[f"{name}_seconds"] = round(time.perf_counter() - began, 1)
    text = json.dumps(report, indent=1)
    print(text)
    if options.json:
        options.json.write_text(text)
