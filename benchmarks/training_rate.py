"""Images per second of the training loop beside a bare hand-written PyTorch loop of the same network, in one run.

    python benchmarks/training_rate.py cifar10.npz --network resnet --batch-size 100 --steps 200 [--json FILE]

The loops take turns, round by round, so that a change of the machine's pace hits all alike. Each keeps its own weights,
optimiser and balance. Printed are the median rate of each, its spread over rounds, and the ratio round by round. The bare loop
reads uint8 from memory, scales, runs forward, loss and backward and steps Adam; it logs nothing, saves nothing and checks
nothing. It is run twice: with weights and images as PyTorch makes them (NCHW), and in channels_last.
"""

import argparse
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from poise import datasets
from poise.balance import ComputedBalance
from poise.build import first_stage
from poise.recipes import Network, Recipe, Stage
from poise.recipes.images import IMAGES
from poise.training import ImageBatches, TrainingState, Watch, fit, new_state

Round = Callable[[], None]


def poise_rounds(recipe: Recipe, data: datasets.Dataset, steps: int, device: torch.device) -> tuple[Round, TrainingState]:
    state = new_state(first_stage(recipe, list(data.shape)), ComputedBalance(), recipe.first, device)
    batches = ImageBatches(data.train, device)

    def run() -> None:
        stage = replace(recipe.first, steps=state.step + steps)
        fit(state, batches, stage, number=1, seed=0, watch=Watch(quiet=True, save_seconds=math.inf))

    return run, state


def bare_rounds(recipe: Recipe, data: datasets.Dataset, steps: int, device: torch.device, layout: torch.memory_format) -> Round:
    vae = first_stage(recipe, list(data.shape)).to(device=device).to(memory_format=layout)  # pyright: ignore[reportCallIssue]
    optimizer = torch.optim.Adam(vae.parameters(), lr=recipe.first.learning_rate)
    images, batch = torch.from_numpy(data.train[:]), recipe.first.batch_size
    num_dims = images[0].numel()
    gamma2 = 1.0
    order = itertools.chain.from_iterable(
        torch.randperm(len(images))[: len(images) // batch * batch].split(batch) for _ in itertools.count()
    )

    def run() -> None:
        nonlocal gamma2
        vae.train()
        for indices in itertools.islice(order, steps):
            x = (images[indices].to(device).float() / 255).contiguous(memory_format=layout)
            mean, logvar = vae.encoder(x)
            z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
            error = (x - vae.decoder(z)).square().sum((1, 2, 3))
            kl = 0.5 * (mean.square() + logvar.exp() - logvar - 1).sum(1)
            loss = (error / (2 * gamma2) + num_dims / 2 * math.log(2 * math.pi * gamma2) + kl).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            gamma2 = 0.99 * gamma2 + 0.01 * error.mean().item() / num_dims

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="anything `poise train` takes")
    parser.add_argument("--network", default="resnet")
    parser.add_argument("--latent-dim", type=int, default=64)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--steps", type=int, default=200, help="of each loop, in all")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    device, steps = torch.device(options.device), options.steps // options.rounds
    hidden = (256, 256) if options.network == "mlp" else ()
    network = Network(options.network, latent_dim=options.latent_dim, hidden=hidden)
    recipe = replace(IMAGES, network=network, first=Stage(steps=1, batch_size=options.batch_size, learning_rate=1e-4))
    data = datasets.load(options.data)
    run_poise, state = poise_rounds(recipe, data, steps, device)
    loops = {
        "poise": run_poise,
        "bare": bare_rounds(recipe, data, steps, device, torch.contiguous_format),
        "bare, channels_last": bare_rounds(recipe, data, steps, device, torch.channels_last),
    }
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(options.rounds):
        for name, run in loops.items():
            began = time.perf_counter()
            run()
            rates[name].append(steps * options.batch_size / (time.perf_counter() - began))
    report = {
        "data": data.name,
        "shape": data.shape,
        "network": options.network,
        "batch_size": options.batch_size,
        "steps_of_each": steps * options.rounds,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, {options.device}",
        "images_per_second": {name: summary(values) for name, values in rates.items()},
        "poise_over": {
            name: summary([p / b for p, b in zip(rates["poise"], values, strict=True)])
            for name, values in rates.items()
            if name != "poise"
        },
        "gamma2_at_the_end": float(state.balance.gamma2),
    }
    print(json.dumps(report, indent=2))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


def summary(values: list[float]) -> dict[str, float]:
    return {"median": round(statistics.median(values), 3), "min": round(min(values), 3), "max": round(max(values), 3)}


if __name__ == "__main__":
    main()
