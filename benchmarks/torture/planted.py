"""Part 4: plant NaN and infinity, and train at absurd rates.

A planted run must stop with one line, keep an intact checkpoint, and end with the weights of an
undisturbed run when the same command runs again. A run at an absurd rate must end with finite
weights, or stop with one line. Bad data are refused before training.
"""

import argparse
import math
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import poise
from benchmarks.torture.cases import ENVIRONMENT, FAILURES, OK, REFUSED, Case, forked, spread
from benchmarks.torture.kills import LONG, compared, contents
from benchmarks.torture.material import IMAGES, OPTIONS, RECIPE
from poise.recipes import Network, Recipe
from poise.training import TrainingState, engines

COUNTS = {"data": 20, "planted": 48, "rates": 24, "one of two ranks": 4}
STEPS = 8  # of each stage
PLACES = ("weights", "optimizer", "gamma2", "batch", "noise", "BatchNorm")
VALUES = {"NaN": math.nan, "inf": math.inf, "-inf": -math.inf}
RATES = (1e2, 1e4, 1e10, 1e20, 1e30, 1e38, 3e38)
BALANCES = ("computed", "learned", "fixed:beta=4", "controlled:target_bits=3")


def cases(seed: int, jobs: int, scale: float = 1.0) -> tuple[list[Case], dict[str, Any]]:
    os.environ.update(ENVIRONMENT)
    torch.set_num_threads(1)
    counts = {name: max(1, round(count * scale)) for name, count in COUNTS.items()}
    with tempfile.TemporaryDirectory() as scratch:
        works: list[Callable[[], Case]] = [
            partial(act, seed, number, Path(scratch, f"{name}{number}"))
            for name, act in (("data", bad_data), ("planted", plant), ("rates", absurd_rate))
            for number in range(counts[name])
        ]
        found = spread(_call, works, jobs)
        found += plant_in_one_rank(seed, counts["one of two ranks"], Path(scratch, "ranks"))
    return found, {}


def _call(work: Callable[[], Case]) -> Case:
    return work()


# Data


def bad_data(seed: int, number: int, folder: Path) -> Case:
    """Train on images with odd values: they are refused, and nothing is written."""
    rng = random.Random(f"{seed}/data/{number}")
    images = (IMAGES[:, 0] / 255).astype(rng.choice((np.float32, np.float64, np.float16)))
    name = rng.choice([*VALUES, "-1", "2", "1e30"])
    value = VALUES.get(name) or float(name)
    with np.errstate(over="ignore"):
        for _ in range(rng.choice((1, 5))):
            images.flat[rng.randrange(images.size)] = value
    given: Any = images if rng.random() < 0.5 else torch.from_numpy(images)
    ended = forked(lambda: train(given, RECIPE, folder), seconds=60)
    outcome, detail = ended.outcome, ended.message
    if outcome == OK:
        outcome, detail = "wrong", "it was trained on"
    elif folder.exists():
        outcome, detail = "wrong", "it left a folder"
    return Case("bad values in data", f"{name} in {images.dtype}", outcome, detail[-300:])


def train(images: Any, recipe: Recipe, folder: Path) -> str:
    run = poise.train(images, recipe=recipe, out=folder, options=OPTIONS)
    return "finite" if torch.isfinite(run.sample(8)).all() else "not finite"


# Weights, optimizer, balance, batches


def plant(seed: int, number: int, folder: Path) -> Case:
    """Plant a value before a random step, and run the same command again without it."""
    rng = random.Random(f"{seed}/planted/{number}")
    recipe = varied(rng)
    place, value = rng.choice(PLACES), rng.choice(sorted(VALUES))
    step = rng.randrange(2 * STEPS)
    whole = forked(lambda: train(IMAGES, recipe, folder / "whole"), seconds=60)
    assert whole.outcome == OK, whole.err

    def planted() -> str:
        with planting(place, VALUES[value], step, random.Random(number)):
            return train(IMAGES, recipe, folder / "run")

    ended = forked(planted, seconds=60)
    what = f"{value} in {place} before step {step}, {described(recipe)}"
    outcome, detail = ended.outcome, ended.message
    if outcome == OK and ended.value != "finite":
        outcome, detail = "wrong", "it ended, and its samples are not finite"
    elif outcome in (OK, REFUSED):
        stopped = outcome == REFUSED
        again = forked(lambda: train(IMAGES, recipe, folder / "run"), seconds=60)
        if again.outcome != OK:
            outcome, detail = "wrong", f"after {detail!r} the same command says {again.message!r}"
        elif stopped:
            difference = compared(contents(folder / "whole"), contents(folder / "run"))
            outcome, detail = ("wrong", difference[1]) if difference[1] else (REFUSED, detail)
    group = f"planted in {recipe.first.precision}"
    return Case(group, what, outcome, detail[-400:])


def varied(rng: random.Random) -> Recipe:
    """Return a tiny recipe of a random network, balance and precision."""
    network = rng.choice((RECIPE.network, Network("resnet", latent_dim=2, second_hidden=8)))
    changes: dict[str, Any] = {"precision": rng.choice(("float32", "bfloat16"))}
    if rng.random() < 0.3:
        changes["ema_decay"] = 0.9
    first = replace(RECIPE.first, balance=rng.choice(BALANCES), steps=STEPS, **changes)
    assert RECIPE.second is not None
    second = replace(RECIPE.second, steps=STEPS, **changes)
    return replace(RECIPE, network=network, first=first, second=second)


def described(recipe: Recipe) -> str:
    return f"{recipe.network.kind}, {recipe.first.balance}, {recipe.first.precision}"


@contextmanager
def planting(place: str, value: float, step: int, rng: random.Random) -> Iterator[None]:
    """Plant a value before the step of this number, counted over both stages."""
    real, taken = engines.training_step, [0]

    def training_step(state: TrainingState, batch: Any, noise: Any, *others: Any) -> None:
        if taken[0] == step:
            targets = targets_of(place, state, batch, noise)
            with torch.no_grad():
                for target in targets[:1] if place == "gamma2" else [rng.choice(targets)]:
                    target[tuple(rng.randrange(size) for size in target.shape)] = value
        taken[0] += 1
        real(state, batch, noise, *others)

    engines.training_step = training_step
    try:
        yield
    finally:
        engines.training_step = real


def targets_of(place: str, state: TrainingState, batch: Any, noise: Any) -> list[torch.Tensor]:
    """Return the tensors in which the value is planted; the weights where there are no others."""
    weights = [*state.network.parameters()]
    floating = [buffer for buffer in state.network.buffers() if buffer.is_floating_point()]
    moments = [
        entry
        for entries in state.optimizer.state.values()
        for entry in entries.values()
        if isinstance(entry, torch.Tensor) and entry.dim()
    ]
    found = {
        "weights": weights,
        "optimizer": moments,
        "gamma2": [b for b in state.balance.buffers() if b.is_floating_point() and b.numel()],
        "batch": [batch],
        "noise": [noise],
        "BatchNorm": floating,
    }[place]
    return found or weights


# Absurd rates


def absurd_rate(seed: int, number: int, folder: Path) -> Case:
    rng = random.Random(f"{seed}/rates/{number}")
    recipe, rate = varied(rng), rng.choice(RATES)
    stage = replace(recipe.first, learning_rate=rate)
    recipe = replace(recipe, first=stage)
    ended = forked(lambda: train(IMAGES, recipe, folder), seconds=60)
    outcome, detail = ended.outcome, ended.message
    if outcome == OK and ended.value != "finite":
        outcome, detail = "wrong", "it ended, and its samples are not finite"
    elif outcome == REFUSED:
        again = forked(lambda: train(IMAGES, recipe, folder), seconds=60)
        if again.outcome != REFUSED or "not finite" not in again.message:
            outcome, detail = "wrong", f"after {detail!r} the same command says {again.message!r}"
    elif outcome in FAILURES:
        detail = ended.err[-400:]
    return Case(
        f"absurd rates in {stage.precision}", f"{rate:g}, {described(recipe)}", outcome, detail
    )


# One of two ranks


def plant_in_one_rank(seed: int, count: int, scratch: Path) -> list[Case]:
    """Plant a value in one of two processes: both stop after the same step."""
    scratch.mkdir()
    rng, cases = random.Random(f"{seed}/ranks"), list[Case]()
    whole = two_ranks(scratch / "whole")
    assert whole.returncode == 0, whole.stderr
    for number in range(count):
        place = rng.choice(("weights", "batch", "noise"))
        rank, step, value = rng.randrange(2), rng.randrange(2 * STEPS), rng.choice(sorted(VALUES))
        folder = scratch / f"run{number}"
        planted = two_ranks(folder, f"--plant={rank},{place},{value},{step}")
        errors = [line for line in planted.stderr.splitlines() if "poise: error" in line]
        outcome, detail = REFUSED, errors[0] if errors else planted.stderr[-300:]
        if planted.returncode == 0:
            outcome, detail = "wrong", "it did not stop"
        elif not errors or "not finite" not in errors[0]:
            outcome = "traceback"
        else:
            again = two_ranks(folder)
            if again.returncode != 0:
                outcome, detail = "wrong", again.stderr[-300:]
            elif difference := compared(contents(scratch / "whole"), contents(folder))[1]:
                outcome, detail = "wrong", difference
        what = f"{value} in {place} of rank {rank} before step {step}"
        cases.append(Case("one of two ranks", what, outcome, detail))
    return cases


def two_ranks(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    words = [sys.executable, "-m", *torchrun, "-m", "benchmarks.torture.planted", str(folder)]
    return subprocess.run(
        [*words, *options], capture_output=True, text=True, timeout=LONG, check=False
    )


def main() -> None:
    """Train as one of two processes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plant", default="", metavar="RANK,PLACE,VALUE,STEP")
    options = parser.parse_args()
    try:
        rank, *planted = options.plant.split(",")
        if rank == os.environ["RANK"]:
            place, value, step = planted
            with planting(place, VALUES[value], int(step), random.Random(0)):
                train(IMAGES, RECIPE, options.folder)
        else:
            train(IMAGES, RECIPE, options.folder)
    except poise.errors.RunError as error:
        sys.exit(f"poise: error: {error}")


if __name__ == "__main__":
    main()
