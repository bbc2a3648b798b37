"""Compare the computed balance of several errors with weights that are tuned by hand.

    python benchmarks/groups.py [--only TASK ...] [--seeds 3] [--mnist FILE] [--json FILE]

It continues a JSON file of fewer seeds.

Each task has errors of different units and scales:

- sequences: simulated sequences of 8 to 20 steps, padded with zeros and masked. Three positions
  have noise of 0.02, a force has noise of 0.3: one group each.
- images: the 8x8 digits, with an error of pixels and one of the features of a random, fixed
  network: one group each.
- table: the 30 columns of the breast cancer data, standardised: one group for each column.

The computed balance has one gamma2 for each group and nothing to tune. Three grids of seven
values are tuned by hand:

- "kl_weight, gamma2 computed": the same balance with kl_weight from 1/8 to 8.
- "kl_weight, fixed": half the sum of all squared errors, plus kl_weight * KL, from 0.001 to 1.
- "weight of the second error, fixed": the best of the previous grid, with a factor from 0.01 to
  100 on the error of the second group (not for the table).

Early stopping on validation rows prevents overfitting, by the same rule for all.

Held-out ELBO. A fixed weight says nothing about the variances of the decoder. So every trained
model gets the variances that are best for its training errors: gamma2 of a group is its sum of
errors over its sum of dimensions, on the training rows, with sampled latents. The ELBO of the test
rows under these variances, with KL weight 1, is comparable across weights. It favours the grids,
which get for nothing what the computed balance computes. The best value of a grid is chosen on the
test rows, which favours the grids too. Figures are in nats per observed dimension.

With --mnist, a likelihood without a scale is compared as well: the binary cross-entropy of MNIST,
given to the balance as nats (`nll=`) and, wrongly, as an error.

The tasks take about 10 minutes of one core, MNIST another 5.
"""

import argparse
import copy
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn

import poise
from poise.balance import Balance, ComputedBalance, FixedBalance
from poise.studies.results import provenance
from poise.support.files import write_json

OF_COMPUTED = "kl_weight, gamma2 computed"
OF_FIXED = "kl_weight, fixed"
OF_ERRORS = "weight of the second error, fixed"
AS_NATS, AS_ERROR = "as nats (nll=)", "as an error"
GRIDS: dict[str, tuple[float, ...]] = {
    OF_COMPUTED: (0.125, 0.25, 0.5, 1, 2, 4, 8),
    OF_FIXED: (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1),
    OF_ERRORS: (0.01, 0.05, 0.2, 1, 5, 20, 100),
}
DRAWS = 16  # latents per row in the ELBO
CHECKED = 100  # steps between checks of the validation ELBO
BATCH = 100


@dataclass(frozen=True)
class Task:
    """Rows of a task, and their errors.

    Attributes:
        rows, validation, test: (n, width), the values, and 0 where a value is not observed.
        observed, validation_observed, test_observed: (n, width), 1 where a value is observed and 0
            elsewhere.
        errors: function of reconstruction, rows and observed. It returns the squared errors,
            (n, groups), and their numbers of dimensions, (n, groups).
        groups: number of groups.
        latents, hidden, steps: size of the network, and length of the training.
    """

    rows: Tensor
    observed: Tensor
    validation: Tensor
    validation_observed: Tensor
    test: Tensor
    test_observed: Tensor
    errors: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
    groups: int
    latents: int
    hidden: tuple[int, ...]
    steps: int


def sequences(seed: int) -> Task:
    """Return damped oscillations of three positions and a force, with four unknowns each."""
    length, number, generator = 20, 6_000, torch.Generator().manual_seed(seed)
    unknowns = torch.rand(4, number, 1, 1, generator=generator)
    start, speed, stiffness, damping = unknowns.unbind()
    times = torch.linspace(0, 1, length).view(1, length, 1)
    axis = torch.arange(3).view(1, 1, 3)
    decay = (-3 * damping * times).exp()
    angle = 2 * math.pi * ((1 + stiffness) * times + axis / 3)
    positions = start + speed * times + 0.3 * decay * angle.sin()
    force = 2 * decay * angle[..., :1].cos()
    values = torch.cat([positions, force], 2)
    noise = torch.tensor([0.02, 0.02, 0.02, 0.3])
    values = values + noise * torch.randn(values.shape, generator=generator)
    lengths = torch.randint(8, length + 1, (number, 1, 1), generator=generator)
    observed = (torch.arange(length).view(1, length, 1) < lengths).expand_as(values).float()
    parts = torch.tensor([[1.0, 0], [1, 0], [1, 0], [0, 1]]).repeat(length, 1)

    def errors(reconstruction: Tensor, rows: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        return (seen * (reconstruction - rows).square()) @ parts, seen @ parts

    return Task(
        *parts_of((values * observed).flatten(1), observed.flatten(1), seed),
        errors=errors,
        groups=2,
        latents=8,
        hidden=(64, 64),
        steps=2_000,
    )


def images(seed: int) -> Task:
    """Return the digits, with the features of a random network as second error."""
    torch.manual_seed(2020)
    features = nn.Sequential(
        *(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 128), nn.Tanh())
    ).requires_grad_(False)
    digits = torch.from_numpy(load_digits(return_X_y=True)[0]).float() / 16

    def errors(reconstruction: Tensor, rows: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        pixels = (reconstruction - rows).square().sum(1)
        distances = (features(reconstruction) - features(rows)).square()
        numbers = torch.tensor([64.0, distances.shape[1]]).expand(len(rows), 2)
        return torch.stack([pixels, distances.sum(1)], 1), numbers

    return Task(
        *parts_of(digits, torch.ones_like(digits), seed),
        errors=errors,
        groups=2,
        latents=16,
        hidden=(64,),
        steps=2_000,
    )


def table(seed: int) -> Task:
    """Return the breast cancer data, standardised, with one group for each column."""
    values = torch.from_numpy(load_breast_cancer(return_X_y=True)[0])
    values = ((values - values.mean(0)) / values.std(0, correction=0)).float()

    return Task(
        *parts_of(values, torch.ones_like(values), seed),
        errors=lambda reconstruction, rows, seen: ((reconstruction - rows).square(), seen),
        groups=30,
        latents=6,
        hidden=(32,),
        steps=1_500,
    )


TASKS: dict[str, Callable[[int], Task]] = {"sequences": sequences, "images": images, "table": table}


def parts_of(values: Tensor, observed: Tensor, seed: int) -> list[Tensor]:
    """Return values and observed of random training, validation and test rows: 64, 16 and 20 %."""
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    validation, test = int(0.64 * len(values)), int(0.8 * len(values))
    chosen = (order[:validation], order[validation:test], order[test:])
    return [tensor[rows] for rows in chosen for tensor in (values, observed)]


def network(task: Task) -> poise.VAE:
    """Return a dense VAE whose encoder also sees which values are observed."""
    width = task.rows.shape[1]
    encoder, _ = poise.networks.mlp(2 * width, task.latents, hidden=task.hidden)
    _, decoder = poise.networks.mlp(width, task.latents, hidden=task.hidden, output="linear")
    return poise.VAE(encoder, decoder)


def train(task: Task, balance: Balance, seed: int) -> poise.VAE:
    """Train a VAE with Adam, a cosine schedule to zero, and early stopping.

    The network of the highest validation ELBO is returned. `seed` draws the initial weights, the
    order and the noise.
    """
    torch.manual_seed(seed)
    vae = network(task)
    best, kept = -math.inf, vae.state_dict()
    for step, chosen in enumerate(batches(vae, len(task.rows), task.steps), start=1):
        rows, observed = task.rows[chosen], task.observed[chosen]
        posterior = vae.encode(torch.cat([rows, observed], 1))
        reconstruction = vae.decode(posterior.sample(torch.randn_like(posterior.mean)))
        error, num_dims = task.errors(reconstruction, rows, observed)
        balance.combine(error, posterior.kl(), num_dims).loss.backward()
        if step % CHECKED == 0:
            reached = held_out(task, vae, task.validation, task.validation_observed, draws=2)
            if reached["elbo"] > best:
                best, kept = reached["elbo"], copy.deepcopy(vae.state_dict())
    vae.load_state_dict(kept)
    return vae


def batches(vae: poise.VAE, rows: int, steps: int) -> Iterator[Tensor]:
    """Yield the rows of each random batch, and update the network after it."""
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        yield torch.randint(rows, (BATCH,))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def held_out(
    task: Task, vae: poise.VAE, rows: Tensor, observed: Tensor, draws: int = DRAWS
) -> dict[str, Any]:
    """Return the ELBO of rows that were not trained on in nats per dimension, and its parts."""
    error, num_dims, _ = sums(task, vae, task.rows, task.observed, draws)
    gamma2 = error / num_dims
    error, num_dims, kl = sums(task, vae, rows, observed, draws)
    nats = (error / (2 * gamma2) + num_dims / 2 * (2 * math.pi * gamma2).log()).sum()
    return {
        "elbo": round(float(-(nats + kl) / num_dims.sum()), 4),
        "kl": round(float(kl / num_dims.sum()), 4),
        "gamma2": [float(f"{value:.4g}") for value in gamma2],
    }


@torch.no_grad()
def sums(
    task: Task, vae: poise.VAE, rows: Tensor, observed: Tensor, draws: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the errors, averaged over draws, their dimensions and the KL, summed over rows."""
    source = torch.Generator().manual_seed(0)
    posterior = vae.encode(torch.cat([rows, observed], 1))
    error, num_dims = torch.zeros(()), torch.zeros(())
    for _ in range(draws):
        noise = torch.randn(posterior.mean.shape, generator=source)
        drawn, num_dims = task.errors(vae.decode(posterior.sample(noise)), rows, observed)
        error = error + drawn.double().sum(0) / draws
    return error, num_dims.double().sum(0), posterior.kl().double().sum()


def measured(task: Task, seed: int) -> dict[str, dict[str, Any]]:
    """Return the figures of each value of each grid. The first grid has the computed balance."""

    def computed(kl_weight: float) -> dict[str, Any]:
        balance = ComputedBalance(groups=task.groups, kl_weight=kl_weight)
        return held_out(task, train(task, balance, seed), task.test, task.test_observed)

    def fixed(kl_weight: float, second: float = 1.0) -> dict[str, Any]:
        # Error / (2 gamma2) + KL is, but for a factor, weight * error / 2 + kl_weight * KL.
        weights = [1.0, second] if task.groups == 2 else [1.0] * task.groups
        balance = FixedBalance(gamma2=[kl_weight / weight for weight in weights])
        return held_out(task, train(task, balance, seed), task.test, task.test_observed)

    found = {
        OF_COMPUTED: {f"{w:g}": computed(w) for w in GRIDS[OF_COMPUTED]},
        OF_FIXED: {f"{w:g}": fixed(w) for w in GRIDS[OF_FIXED]},
    }
    if task.groups == 2:
        tuned = float(best_of(found[OF_FIXED]))
        found[OF_ERRORS] = {f"{w:g}": fixed(tuned, w) for w in GRIDS[OF_ERRORS]}
    return found


def best_of(grid: dict[str, Any]) -> str:
    return max(grid, key=lambda weight: grid[weight]["elbo"])


def cross_entropy(path: Path, seed: int, steps: int | None) -> dict[str, dict[str, float]]:
    """Return cross-entropy and KL of the test images of binarised MNIST, in nats per image.

    The cross-entropy is given to the balance as nats and, wrongly, as an error.
    """
    generator = torch.Generator().manual_seed(2020)
    with np.load(path) as arrays:
        images, test = (
            torch.from_numpy(arrays[f"x_{part}"])
            .flatten(1)
            .float()
            .div(255)
            .bernoulli(generator=generator)
            for part in ("train", "test")
        )
    found = {}
    for name in (AS_NATS, AS_ERROR):
        torch.manual_seed(seed)
        vae = poise.VAE(*poise.networks.mlp(784, latent_dim=32, output="linear"))
        balance = ComputedBalance()
        for chosen in batches(vae, len(images), steps or 5 * len(images) // BATCH):
            nats, kl = bernoulli(vae, images[chosen])
            if name == AS_NATS:
                balance.combine(None, kl, nll=nats).loss.backward()
            else:
                balance.combine(nats, kl, num_dims=784).loss.backward()
        with torch.no_grad():
            nats, kl = bernoulli(vae, test)
        found[name] = {
            "cross_entropy": round(float(nats.mean()), 2),
            "kl": round(float(kl.mean()), 2),
        }
    return found


def bernoulli(vae: poise.VAE, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy and the KL of each image, in nats."""
    logits, posterior = vae(images)
    nats = F.binary_cross_entropy_with_logits(logits, images, reduction="none")
    return nats.sum(1), posterior.kl()


def tables(report: dict[str, Any]) -> str:
    """Return the tables of docs/balances.md: differences to the best of each grid, and all values.

    Figures are means ± standard deviations over seeds. The best value is chosen for each seed.
    """
    first = [["task", "grid of seven values", "best values", "ELBO", "untuned - best"]]
    second = [["task", "grid", *["value: ELBO"] * 7]]
    for task, seeds in report["tasks"].items():
        untuned = [found[OF_COMPUTED]["1"]["elbo"] for found in seeds]
        first.append([task, "computed, untuned", "", spread(untuned), ""])
        for grid in seeds[0]:
            best = [best_of(found[grid]) for found in seeds]
            elbos = [found[grid][weight]["elbo"] for found, weight in zip(seeds, best, strict=True)]
            lost = [mine - other for mine, other in zip(untuned, elbos, strict=True)]
            chosen = ", ".join(sorted(set(best), key=float))
            first.append([task, grid, chosen, spread(elbos), spread(lost, "+.3f")])
            means = {w: fmean(found[grid][w]["elbo"] for found in seeds) for w in seeds[0][grid]}
            second.append([task, grid, *(f"{w}: {value:.3f}" for w, value in means.items())])
    shown = [first, second]
    if report.get("mnist"):
        shown.append([["binary cross-entropy of MNIST", "negative ELBO", "cross-entropy", "KL"]])
        for name in (AS_NATS, AS_ERROR):
            parts = [found[name] for found in report["mnist"]]
            columns = [[sum(p.values()) for p in parts], *([p[k] for p in parts] for k in parts[0])]
            shown[-1].append([name, *(spread(column, ".1f") for column in columns)])
    return "\n\n".join(map(markdown, shown))


def spread(values: list[float], style: str = ".3f") -> str:
    deviation = f" ± {stdev(values):{style.strip('+')}}" if len(values) > 1 else ""
    return f"{fmean(values):{style}}{deviation}"


def markdown(rows: list[list[str]]) -> str:
    head, *body = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *body))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="*", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="length of every training, for a quick try")
    parser.add_argument("--mnist", type=Path, help="mnist.npz with x_train and x_test")
    parser.add_argument("--json", type=Path, default=Path("results/bench-groups.json"))
    parser.add_argument("--tables", action="store_true", help="print the tables of the JSON file")
    options = parser.parse_args()
    if options.tables:
        print(tables(json.loads(options.json.read_text())))
        return
    torch.set_num_threads(1)
    report: dict[str, Any] = (
        json.loads(options.json.read_text()) if options.json.exists() else {"tasks": {}}
    )
    for seed in range(options.seeds):
        for name in options.only:
            found = report["tasks"].setdefault(name, [])
            if seed >= len(found):
                task = TASKS[name](seed)
                steps = options.steps or task.steps
                found.append(measured(replace(task, steps=steps), seed))
        found = report.setdefault("mnist", [])
        if options.mnist and seed >= len(found):
            found.append(cross_entropy(options.mnist, seed, options.steps))
        write_json(options.json, report | {"provenance": provenance(torch.device("cpu"))})
    print(tables(report))


if __name__ == "__main__":
    main()
