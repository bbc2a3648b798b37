"""How long a run takes on this machine, and lengths that fit a budget.

Before a run begins, some steps of both stages are taken with copies of its networks, and thrown away. A run then takes

    T = (a_1 + n_1 s_1) + (a_2 + n_2 s_2) + r                                                                       (1)

where stage k has n_k steps of s_k seconds, checkpoints included, a_k is what its first steps take longer (compilation,
recording, memory), and r is the time for codes, pictures and figures. A budget gives n_1 s_1 + n_2 s_2; stage 2 gets the share
that it has in the recipe, but at least a tenth: at 64 pixels on two cores the recipe's 3 % would be some hundred steps.
"""

import copy
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from poise.balance import Balance
from poise.data import Dataset
from poise.errors import InputError
from poise.recipes.settings import Recipe, Stage, from_json, to_json
from poise.runs.checkpoint import write_folder
from poise.runs.folder import read_config
from poise.runs.options import Options
from poise.support.progress import hours_minutes
from poise.training import (
    Batches,
    CodeBatches,
    Engine,
    ImageBatches,
    TrainingState,
    Watch,
    distributed,
    fit,
    new_state,
    state_tensors,
    threads,
    usual_threads,
)
from poise.vae import VAE

SECONDS = 2.0  # of each measurement, at least
SHARE_OF_BUDGET = 0.015  # for measuring the steps of a stage
FIRST_STEPS = 5  # in which an engine compiles or records
ENOUGH = (
    2,
    100,
)  # steps: so many at least, and no more; one is enough if it takes three times as long as all may
CLEARLY = 0.75  # more threads must take less than this share of the time: two lose 3 to 5 times when a core becomes busy
LEAST_SECOND_SHARE = 0.1
PICTURES_SECONDS = (
    6.0  # importing Matplotlib, drawing, writing, and what else does not depend on the run
)
PASSES = {
    "train": (1, 0),
    "test": (2, 3),
}  # of encoder and decoder over the images after stage 1 (`Run.evaluate`)
SECOND_PASSES = (2, 2)  # of stage 2 over the training codes
LEAST_STEPS = 10
SHARE_OF_AVERAGE = 0.1  # of stage 1, that BatchNorm's running averages are taken over
MARGIN = 0.02  # of a budget, for starting the interpreter and what is not measured


class Plan(NamedTuple):
    """What is chosen when a run begins and kept in its config.json: the recipe with its lengths, CPU threads (None: usual)."""

    recipe: Recipe
    threads: int | None


def earlier_plan(folder: Path, recipe: Recipe, checksum: str) -> Plan | None:
    """What an earlier start of this very run chose; None: there was none."""
    with suppress(InputError):  # a file that is damaged, or of a newer version: see `open_folder`
        config = read_config(folder)
        earlier: Recipe = from_json(Recipe, config["recipe"])
        earlier = replace(earlier, data=replace(earlier.data, source=recipe.data.source))
        if recipe.minutes is not None and recipe.minutes == earlier.minutes:
            first, second = (
                with_length(recipe.first, earlier.first),
                with_length(recipe.second, earlier.second),
            )
            network = replace(recipe.network, norm_decay=earlier.network.norm_decay)
            recipe = replace(recipe, first=first, second=second, network=network)
        if config["data"]["checksum"] == checksum and to_json(recipe) == to_json(earlier):
            return Plan(recipe, config.get("threads"))
    return None


def make_plan(
    recipe: Recipe,
    stages: list[tuple[VAE, Balance]],
    dataset: Dataset,
    folder: Path,
    device: torch.device,
    options: Options,
    began: float,
    talks: bool,
) -> Plan:
    """Measure some steps; choose the number of threads and, where there is a budget, the lengths; tell the time it takes.

    Args:
        recipe, stages, dataset, folder, device, options: of the run.
        began: see `prepare`.
        talks: whether to tell.
    """
    count, num_images = options.threads, len(dataset.train)
    if count == 0:
        usual = usual_threads(stages[0][0])
        several = device.type == "cpu" and usual > 1
        data = ImageBatches(dataset.train, device)
        count = choose_threads([1, usual], *stages[0], recipe, data) if several else usual
    count = distributed.on_first(lambda: count)
    if recipe.minutes is None and options.quiet:  # nobody asks
        return Plan(recipe, count)
    measured = measure(
        recipe,
        stages,
        dataset,
        folder,
        device=device,
        engine=options.engine,
        count=count,
        save_seconds=options.save_seconds,
    )
    if recipe.minutes is not None:
        left = 60 * recipe.minutes * (1 - MARGIN) - (time.monotonic() - began)
        recipe = distributed.on_first(
            lambda: lengths_within_budget(recipe, measured, num_images, left)
        )
    if talks:
        print(estimate(recipe, measured, num_images), file=sys.stderr)
    return Plan(recipe, count)


def with_length(stage: Any, other: Stage | None) -> Any:
    """A stage with the length and halvings of another one; None where one of them is."""
    return (
        stage
        and other
        and replace(stage, epochs=other.epochs, steps=other.steps, halve_every=other.halve_every)
    )


@dataclass(frozen=True)
class Pace:
    """Seconds that a stage takes: `start` more for its first steps, `step` for each."""

    start: float
    step: float

    def seconds(self, steps: int) -> float:
        return self.start + steps * self.step


@dataclass(frozen=True)
class Timing:
    """Seconds of each part of a run: eq. 1."""

    stages: tuple[Pace, ...]
    rest: float

    def seconds(self, recipe: Recipe, num_images: int) -> list[float]:
        """Of each stage at the recipe's lengths."""
        lengths = [
            stage.total_steps(num_images) for stage in (recipe.first, recipe.second) if stage
        ]
        return [pace.seconds(steps) for pace, steps in zip(self.stages, lengths, strict=True)]


def lengths_within_budget(
    recipe: Recipe, timing: Timing, num_images: int, seconds: float
) -> Recipe:
    """The recipe with lengths, in steps, that take so many seconds in all; learning rates are halved at the same shares.

    Where stage 1 has fewer than 1,000 steps, BatchNorm's running averages are over a tenth of them: at a decay of 0.99, 85
    steps had a test MSE of 0.076 and a training MSE of 0.038 (faces, 2026-11-26).

    Raises:
        InputError: that is not enough for some steps.
    """
    left = seconds - timing.rest - sum(pace.start for pace in timing.stages)
    parts = [
        pace.step * stage.total_steps(num_images)
        for pace, stage in zip(timing.stages, stages_of(recipe), strict=True)
    ]
    shares = [part / sum(parts) for part in parts]
    if len(shares) > 1:
        second = max(shares[1], LEAST_SECOND_SHARE)
        shares = [1 - second, second]
    lengths = [
        int(share * left / pace.step) for share, pace in zip(shares, timing.stages, strict=True)
    ]
    if min(lengths) < LEAST_STEPS:
        least = max(
            LEAST_STEPS * pace.step / share
            for share, pace in zip(shares, timing.stages, strict=True)
        )
        minutes = (recipe.minutes or 0) + (least - left) / 60
        raise InputError(
            f"a budget of {recipe.minutes:g} min is too short on this machine for {LEAST_STEPS} steps of each stage, codes and "
            f"pictures: give {minutes + 1:.0f} or more, a smaller --size, or another --network"
        )
    first = recipe.first.lasting(steps=lengths[0])
    second = recipe.second and recipe.second.lasting(steps=lengths[1])
    decay = min(recipe.network.norm_decay, 1 - 1 / max(1.0, SHARE_OF_AVERAGE * lengths[0]))
    return replace(
        recipe, first=first, second=second, network=replace(recipe.network, norm_decay=decay)
    )


def stages_of(recipe: Recipe) -> list[Stage]:
    return [stage for stage in (recipe.first, recipe.second) if stage]


def estimate(recipe: Recipe, timing: Timing, num_images: int) -> str:
    """How long everything takes, in a line."""
    times = [*timing.seconds(recipe, num_images), timing.rest]
    names = [f"stage {number}" for number in range(1, len(times))] + ["codes and pictures"]
    parts = ", ".join(
        f"{name} {hours_minutes(part)}" for name, part in zip(names, times, strict=True)
    )
    rate = recipe.first.batch_size / timing.stages[0].step
    lengths = " + ".join(f"{stage.total_steps(num_images):,}" for stage in stages_of(recipe))
    line = f"{lengths} steps take about {hours_minutes(sum(times))} here: {parts} ({rate:.3g} images/s in stage 1)"
    return (
        line if recipe.minutes is not None else line + hint(recipe, timing, num_images, sum(times))
    )


def hint(recipe: Recipe, timing: Timing, num_images: int, seconds: float) -> str:
    """What a budget of 20 or 5 minutes would do, where that is less than half the time."""
    minutes = next((minutes for minutes in (20, 5) if seconds > 2 * 60 * minutes), None)
    if minutes is None:
        return "; --minutes chooses lengths that take so many"
    try:
        shorter = lengths_within_budget(
            replace(recipe, minutes=minutes), timing, num_images, 60 * minutes
        )
    except InputError:
        return ""
    lengths = " + ".join(f"{stage.steps:,}" for stage in stages_of(shorter))
    return f"; --minutes {minutes} would take {lengths} steps, its learning rates halved at the same shares of them"


def choose_threads(
    candidates: Sequence[int], vae: VAE, balance: Balance, recipe: Recipe, data: Batches
) -> int:
    """The number of CPU threads with which a few steps of stage 1 take the least time, or a smaller one that is as good."""
    chosen, least = candidates[0], float("inf")
    for count in sorted(candidates):
        state = throwaway(vae, balance, recipe.first, data, torch.device("cpu"))
        pace = measure_pace(state, data, recipe.first, 1, recipe.seed, "eager", count, SECONDS / 4)
        if pace.step < CLEARLY * least:
            chosen, least = count, pace.step
    return chosen


def measure(
    recipe: Recipe,
    stages: Sequence[tuple[VAE, Balance]],
    dataset: Dataset,
    folder: Path,
    *,
    device: torch.device,
    engine: Engine,
    count: int | None,
    save_seconds: float,
) -> Timing:
    """The seconds of eq. 1, by some steps of both stages and a checkpoint of each.

    Args:
        recipe, stages, dataset, folder: of the run; its networks and balances are copied.
        device, engine, save_seconds: see `poise.Options`.
        count: CPU threads; None: the usual number.
    """
    seconds = max(SECONDS, 60 * SHARE_OF_BUDGET * (recipe.minutes or 0))
    paces, rest = [], PICTURES_SECONDS
    for number, ((vae, balance), stage) in enumerate(
        zip(stages, stages_of(recipe), strict=True), 1
    ):
        data = (
            ImageBatches(dataset.train, device)
            if number == 1
            else blank_codes(len(dataset.train), recipe, device)
        )
        state = throwaway(vae, balance, stage, data, device)
        pace = measure_pace(
            state,
            data,
            stage,
            number,
            recipe.seed,
            engine,
            count,
            seconds if number == 1 else SECONDS,
        )
        saving = checkpoint_seconds(state, folder)
        paces.append(Pace(pace.start, pace.step * (1 + saving / (save_seconds + saving))))
        encode, decode = inference_seconds(state.vae, data, count)
        if number == 1:
            for side, (encoded, decoded) in PASSES.items():
                rest += len(getattr(dataset, side)) * (encoded * encode + decoded * decode)
        else:
            rest += len(dataset.train) * (SECOND_PASSES[0] * encode + SECOND_PASSES[1] * decode)
    return Timing(tuple(paces), rest)


def blank_codes(number: int, recipe: Recipe, device: torch.device) -> CodeBatches:
    """Standard normal codes in place of those that are not there yet: a step takes as long."""
    zeros = torch.zeros(number, recipe.network.latent_dim)
    return CodeBatches(zeros, zeros, device)


def throwaway(
    vae: VAE, balance: Balance, stage: Stage, data: Batches, device: torch.device
) -> TrainingState:
    """A state to try steps with; the networks given stay as they are."""
    return new_state(copy.deepcopy(vae), copy.deepcopy(balance), stage, device)


def measure_pace(
    state: TrainingState,
    data: Batches,
    stage: Stage,
    number: int,
    seed: int,
    engine: Engine,
    count: int | None,
    seconds: float,
) -> Pace:
    """What steps take, by taking some for about so many seconds."""
    clock = Clock(state, seconds)
    watch = Watch(
        stop=clock, fell_back=lambda reason: None, quiet=True
    )  # the run itself will say it
    fit(state, data, stage, number=number, seed=seed, watch=watch, engine=engine, threads=count)
    return clock.pace()


class Clock:
    """Asks `fit` to stop after so many seconds of steps, the first ones not counted, and tells their pace."""

    def __init__(self, state: TrainingState, seconds: float) -> None:
        self._state, self._seconds = state, seconds
        self._began = self._warm = now(state.sums)
        self._first = 1 if state.sums.device.type == "cpu" else FIRST_STEPS
        self._step = 0

    def __call__(self) -> bool:
        if self._step == 0:
            if self._state.step >= self._first:
                self._step, self._warm = self._state.step, now(self._state.sums)
            return False
        taken, (least, most) = self._state.step - self._step, ENOUGH
        passed = time.monotonic() - self._warm
        return (
            taken >= most
            or (taken >= least and passed >= self._seconds)
            or (taken >= 1 and passed >= 3 * self._seconds)
        )

    def pace(self) -> Pace:
        """Of the steps taken; of a stage that was over before the first ones were, of all."""
        ended, taken = now(self._state.sums), self._state.step - self._step
        if self._step == 0 or taken == 0:
            return Pace(0.0, (ended - self._began) / self._state.step)
        step = (ended - self._warm) / taken
        return Pace(max(0.0, self._warm - self._began - self._step * step), step)


def now(tensor: Tensor) -> float:
    """Seconds, when the tensor's device has done all that is queued."""
    tensor.sum().item()
    return time.monotonic()


def checkpoint_seconds(state: TrainingState, folder: Path) -> float:
    """What it takes to write a checkpoint of this state."""
    if distributed.rank() > 0:
        return 0.0
    probe, began = (
        folder / ".writing-timing",
        time.monotonic(),
    )  # what bears such a name is cleared by the next start
    write_folder(probe, state_tensors(state), {})
    seconds = time.monotonic() - began
    shutil.rmtree(probe)
    return seconds


@torch.no_grad()
def inference_seconds(vae: VAE, data: Batches, count: int | None) -> tuple[float, float]:
    """Seconds of the encoder and of the decoder for one image."""
    device, number = next(vae.parameters()).device, min(32, len(data))
    images = data.place(
        data.fetch(torch.arange(number)),
        lambda columns: torch.randn(number, columns, device=device),
    )
    vae.eval()
    with threads(count or usual_threads(vae)):
        latents = vae.encode(images).mean
        vae.decode(latents)
        began = now(images)
        latents = vae.encode(images).mean
        between = now(latents)
        ended = now(vae.decode(latents))
    return (between - began) / number, (ended - between) / number
