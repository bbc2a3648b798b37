"""Measure the KL of the first training steps of each network, to see whether it explodes.

    python benchmarks/first_steps.py DATA [--networks resnet conv] [--seeds 3]
        [--initialisations pytorch released] [--sides 28 32 64 128 256] [--device cpu]
        [--json results/bench-first-steps.json]

DATA holds celeba64.npz, cifar10.npz and fashion.npz (x_train, bytes, n h w or n h w c). The other
data sets are generated: gradients of two colours, dark photographs (faces times 0.1), line drawings
on white, uniform noise. Each run has 20 steps of the recipe `images-resnet`, or `images` for
`conv`, with its balance, learning rate and order. Batches have 64 images at 28 and 32 pixels (three
seeds), 16 at more pixels (one seed) and always for `conv`.

A run passes if its KL stays below the larger of 300 nats and 10 times the highest KL of a run with
learning-rate warm-up: 50 steps from 0, same network, same images. The warm-up run is done only if
a KL exceeds 300 or is not finite. Results that the JSON file already has are not repeated.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measuring import machine, show, write_report
from PIL import Image, ImageDraw
from torch import Tensor

from poise.recipes import RECIPES
from poise.recipes.settings import Changes, Recipe, given
from poise.runs.build import first_stage, stage_balance
from poise.support.seeds import derive
from poise.training import ImageBatches, denormals_as_zero, new_state
from poise.training.batches import global_batches
from poise.training.loop import count_latents, set_learning_rate
from poise.training.machine import tuned
from poise.training.step import training_step

NUMBER, STEPS, WARM_UP = 1_500, 20, 50
LEAST_BAR, FACTOR = 300.0, 10.0
CASES: list[tuple[str, int, int, int]] = [  # network, side, batch, seeds
    ("resnet", 28, 64, 3), ("resnet", 32, 64, 3), ("infogan", 28, 64, 3), ("infogan", 32, 64, 3),
    ("resnet", 64, 16, 1), ("infogan", 64, 16, 1), ("wae", 64, 16, 1), ("wae", 32, 64, 3),
    ("resnet", 128, 16, 1), ("conv", 28, 16, 3), ("conv", 32, 16, 3), ("conv", 64, 16, 1),
    ("conv", 128, 16, 1), ("conv", 256, 16, 1),
]  # fmt: skip


def stored(path: Path, side: int) -> np.ndarray:
    images = np.load(path)["x_train"][:NUMBER]
    values = (
        torch.from_numpy(images[..., None] if images.ndim == 3 else images)
        .permute(0, 3, 1, 2)
        .float()
    )
    sized = F.interpolate(values, (side, side), mode="bilinear", antialias=True)
    return sized.round().clamp(0, 255).byte().numpy()


def gradients(side: int, number: int = NUMBER) -> np.ndarray:
    random = np.random.default_rng(0)
    angle, colours = (
        random.uniform(0, 2 * np.pi, number),
        random.integers(0, 256, (number, 2, 3, 1, 1)),
    )
    rows, columns = np.mgrid[:side, :side] / (side - 1) - 0.5
    along = np.cos(angle)[:, None, None] * rows + np.sin(angle)[:, None, None] * columns
    share = (along / np.abs(along).max((1, 2), keepdims=True) + 1)[:, None] / 2
    return (colours[:, 0] * share + colours[:, 1] * (1 - share)).round().astype(np.uint8)


def drawings(side: int) -> np.ndarray:
    random, images = np.random.default_rng(0), []
    for _ in range(NUMBER):
        image = Image.new("RGB", (side, side), "white")
        points = random.integers(0, side, (4, 2, 2))
        for start, end in points.tolist():
            ImageDraw.Draw(image).line([*start, *end], fill="black", width=max(1, side // 32))
        images.append(np.asarray(image))
    return np.stack(images).transpose(0, 3, 1, 2)


def noise(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (NUMBER, 3, side, side), dtype=np.uint8)


def sets(data: Path) -> dict[str, Callable[[int], np.ndarray]]:
    return {
        "faces": lambda side: stored(data / "celeba64.npz", side),
        "cifar10": lambda side: stored(data / "cifar10.npz", side),
        "fashion": lambda side: stored(data / "fashion.npz", side),
        "gradients": gradients,
        "dark": lambda side: (stored(data / "celeba64.npz", side) * 0.1).round().astype(np.uint8),
        "drawings": drawings,
        "noise": noise,
    }


def settings(network: str, initialisation: str, batch: int, seed: int) -> Recipe:
    base = RECIPES["images" if network == "conv" else "images-resnet"]
    recipe = Changes(network=network, batch_size=batch, seed=seed).apply(base)  # pyright: ignore[reportArgumentType]
    return given(recipe, network=given(recipe.network, initialisation=initialisation))


def kls(
    recipe: Recipe, images: np.ndarray, device: torch.device, steps: int, warm_up: int = 0
) -> list[float]:
    """Return the KL of each step in nats per image, up to the first step that is not finite.

    The learning rate rises linearly for `warm_up` steps.
    """
    vae, balance = (
        first_stage(recipe, list(images.shape[1:])),
        stage_balance(recipe.first, recipe, list(images.shape[1:])),
    )
    state = new_state(vae, balance, recipe.first, device)
    data, source, stage, size = (
        ImageBatches(images, device),
        torch.Generator(device),
        recipe.first,
        recipe.first.batch_size,
    )
    order = global_batches(stage, len(images), number=1, seed=recipe.seed, start=0)
    latents = count_latents(vae, data)
    state.network.train()
    values: list[float] = []

    def draw(columns: int) -> Tensor:
        return torch.randn(size, columns, generator=source, device=device)

    with tuned(state.network, device), denormals_as_zero():
        for step, indices in zip(range(steps), order, strict=False):
            source.manual_seed(derive("noise", recipe.seed, 1, step))
            batch = data.place(data.fetch(indices), draw)
            set_learning_rate(
                state.optimizer,
                stage.learning_rate * (min(1, (step + 1) / warm_up) if warm_up else 1),
            )
            training_step(state, batch, draw(latents), stage)
            failed, _, _, kl, *_ = state.verdict.tolist()
            values.append(kl)
            if failed:
                break
    return values


def measure(recipe: Recipe, images: np.ndarray, device: torch.device) -> dict[str, Any]:
    values = kls(recipe, images, device, STEPS)
    stopped, highest = len(values) < STEPS or not all(map(math.isfinite, values)), max(values)
    warm = (
        max(kls(recipe, images, device, WARM_UP, WARM_UP))
        if stopped or highest > LEAST_BAR
        else None
    )
    bar = max(LEAST_BAR, FACTOR * warm) if warm is not None and math.isfinite(warm) else LEAST_BAR
    return {
        "kl": [float(f"{value:.4g}") for value in values],
        "highest": float(f"{highest:.4g}"),
        "warm_up": warm and float(f"{warm:.4g}"),
        "stopped": stopped,
        "passes": not stopped and highest <= bar,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--networks", nargs="+", default=["resnet", "infogan", "wae", "conv"])
    parser.add_argument("--sides", nargs="+", type=int, default=[28, 32, 64, 128, 256])
    parser.add_argument("--initialisations", nargs="+", default=["pytorch"])
    parser.add_argument("--seeds", type=int, default=3, help="largest number of seeds per case")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, default=Path("results/bench-first-steps.json"))
    options = parser.parse_args()
    report = (
        json.loads(options.json.read_text())
        if options.json.exists()
        else machine(options.device) | {"runs": {}}
    )
    wanted = [
        (initialisation, seed, network, side, batch)
        for initialisation in options.initialisations
        for seed in range(options.seeds)
        for network, side, batch, seeds in CASES
        if seed < seeds and network in options.networks and side in options.sides
    ]
    for initialisation, seed, network, side, batch in wanted:
        for name, make in sets(options.data).items():
            key = f"{initialisation} / {network} / {side} / {name} / {seed}"
            if key not in report["runs"]:
                report["runs"][key] = measure(
                    settings(network, initialisation, batch, seed), make(side), options.device
                )
                write_report(options.json, report)
                print(
                    key, report["runs"][key]["highest"], report["runs"][key]["passes"], flush=True
                )
    tabulate(report["runs"])


def tabulate(runs: dict[str, dict[str, Any]]) -> None:
    """Print the highest KL of each network and data set over seeds, and how many seeds pass."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, run in runs.items():
        groups.setdefault(tuple(key.split(" / ")[:4]), []).append(run)
    rows: list[list[Any]] = [
        ["initialisation", "network", "side", "images", "highest KL", "passes"]
    ]
    for key, found in groups.items():
        passed = sum(run["passes"] for run in found)
        rows.append([*key, max(run["highest"] for run in found), f"{passed} of {len(found)}"])
    show(rows)


if __name__ == "__main__":
    main()
