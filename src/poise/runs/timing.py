"""Estimate how long a run takes on this machine, and choose stage lengths that fit a time budget.

Before a run begins, copies of its networks take some steps of both stages. The copies are then
discarded. The run takes

    T = (a_1 + n_1 s_1) + (a_2 + n_2 s_2) + r                                                (1)

seconds. Stage k has n_k steps of s_k seconds, checkpoints included. a_k is the extra time of its
first steps (compilation, recording, memory). r is the time for codes, pictures and figures.

A budget for T gives n_1 s_1 + n_2 s_2. Stage 2 gets the same share of it as in the recipe, but at
least a tenth. At 64 pixels on two cores, the recipe's 3 % would be only some hundred steps.
"""

import copy
import shutil
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
from poise.flow import Flow
from poise.latent import DiagonalGaussian
from poise.priors.flow_prior import FlowPrior, evaluations
from poise.priors.mixture import MOST_CODES, fit_mixture
from poise.recipes.settings import Recipe, Stage, from_json, to_json
from poise.runs.checkpoint import write_folder
from poise.runs.continuing import lengths
from poise.runs.folder import read_config
from poise.runs.options import Options
from poise.runs.validation import SHARE_OF_TIME
from poise.support.progress import hours_minutes, say
from poise.support.seeds import generator
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

SECONDS = 2.0  # minimum duration of each measurement
SHARE_OF_BUDGET = 0.015  # share of the time budget for measuring the steps of a stage
FIRST_STEPS = 5  # steps in which an engine compiles or records
# Least and greatest number of timed steps. One is enough if it takes three times the duration.
TIMED_STEPS = (2, 100)
# More threads must take less than this share of the time. If another process takes one of two
# cores, two threads become 3 to 5 times slower.
LARGEST_TIME_RATIO = 0.75
LEAST_SECOND_SHARE = 0.1
# Importing Matplotlib, drawing, writing, and other work that does not depend on the run.
PICTURES_SECONDS = 6.0
PICTURES = 64  # samples that a finished run shows
# Passes of encoder and decoder over the images after stage 1 (`Run.evaluate`).
PASSES = {"train": (1, 0), "test": (2, 3)}
SECOND_PASSES = (2, 2)  # passes of stage 2's encoder and decoder over the training codes
LEAST_STEPS = 10
FEW_CODES = 500  # that a mixture is fitted to, to estimate the time of the whole fit
SHARE_OF_AVERAGE = 0.1  # share of stage 1 that BatchNorm's running averages cover
MARGIN = 0.02  # share of the budget for starting the interpreter and other unmeasured work


class Plan(NamedTuple):
    """Recipe with the chosen lengths, and number of CPU threads, fixed at the start of a run.

    Both are written to config.json. None: the usual number of threads.
    """

    recipe: Recipe
    threads: int | None


def earlier_plan(folder: Path, recipe: Recipe, checksum: str) -> Plan | None:
    """Return the plan of an earlier start of the same run, or None if there was none.

    Args:
        folder: the run's folder.
        recipe: settings of the present start.
        checksum: checksum of the data.
    """
    with suppress(InputError):  # damaged, or from a newer version: see `open_folder`
        config = read_config(folder)
        earlier: Recipe = from_json(Recipe, config["recipe"])
        earlier = replace(earlier, data=replace(earlier.data, source=recipe.data.source))
        same_budget = recipe.minutes is not None and recipe.minutes == earlier.minutes
        if same_budget or has_lengths_of_before(recipe, config.get("continued", [])):
            first, second = (
                with_length(recipe.first, earlier.first),
                with_length(recipe.second, earlier.second),
            )
            of = earlier if same_budget else recipe
            network = replace(recipe.network, norm_decay=of.network.norm_decay)
            recipe = replace(recipe, first=first, second=second, network=network)
        if config["data"]["checksum"] == checksum and to_json(recipe) == to_json(earlier):
            return Plan(recipe, config.get("threads"))
    return None


def has_lengths_of_before(recipe: Recipe, records: Sequence[dict[str, Any]]) -> bool:
    """Return whether a recipe has the lengths that a run had before it was continued.

    Args:
        recipe: settings of the present start.
        records: the run's continuations, see `poise.runs.folder.Continuation`.
    """
    mine = lengths(recipe.first), recipe.second and lengths(recipe.second)
    return any(mine == (entry["first"], entry["second"]) for entry in records)


def make_plan(
    recipe: Recipe,
    stages: Sequence[tuple[VAE | Flow, Balance]],
    dataset: Dataset,
    folder: Path,
    device: torch.device,
    options: Options,
    began: float,
    verbose: bool,
) -> Plan:
    """Choose CPU threads and, with a time budget, stage lengths. Print the estimated time.

    Args:
        recipe, stages, dataset, folder, device, options: of the run.
        began: see `prepare`.
        verbose: whether to print the estimate.

    Raises:
        InputError: the time budget is too short.
    """
    count, num_images = options.threads, len(dataset.train)
    if count == 0:
        usual = usual_threads(stages[0][0])
        several = device.type == "cpu" and usual > 1
        data = ImageBatches(dataset.train, device)
        count = choose_threads([1, usual], *stages[0], recipe, data) if several else usual
    count = distributed.on_first(lambda: count)
    if recipe.minutes is None and options.quiet:
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
    if verbose:
        say(estimate(recipe, measured, num_images))
    return Plan(recipe, count)


def with_length(stage: Any, other: Stage | None) -> Any:
    """Return a stage with the length and `halve_every` of another one. None if either is None."""
    return (
        stage
        and other
        and replace(stage, epochs=other.epochs, steps=other.steps, halve_every=other.halve_every)
    )


@dataclass(frozen=True)
class Pace:
    """Time that a stage takes.

    Attributes:
        start: extra seconds of its first steps.
        step: seconds per step.
    """

    start: float
    step: float

    def seconds(self, steps: int) -> float:
        """Return the seconds that so many steps take."""
        return self.start + steps * self.step


@dataclass(frozen=True)
class Timing:
    """Time of each part of a run, in seconds (eq. 1).

    Attributes:
        stages: pace of each stage.
        rest: seconds for codes, pictures and figures.
    """

    stages: tuple[Pace, ...]
    rest: float

    def seconds(self, recipe: Recipe, num_images: int) -> list[float]:
        """Return the seconds of each stage at the recipe's lengths."""
        lengths = [stage.total_steps(num_images) for stage in recipe.stages]
        return [pace.seconds(steps) for pace, steps in zip(self.stages, lengths, strict=True)]


def lengths_within_budget(
    recipe: Recipe, timing: Timing, num_images: int, seconds: float
) -> Recipe:
    """Return the recipe with stage lengths, in steps, that use up a time budget.

    The learning rates are halved at the same fractions of the lengths. BatchNorm's running averages
    are taken over at most a tenth of the steps of stage 1, so that the decay is lower than the
    recipe's in fewer than 1,000 steps for 0.99, and in fewer than 10,000 for the released 0.999.
    With a decay of 0.99, 85 steps gave a test MSE of 0.076 and a training MSE of 0.038 (faces,
    2026-11-26).

    Args:
        recipe: settings.
        timing: measured times.
        num_images: number of training images.
        seconds: budget for the whole run.

    Raises:
        InputError: the budget is too short for a few steps.
    """
    left = seconds - timing.rest - sum(pace.start for pace in timing.stages)
    parts = [
        pace.step * stage.total_steps(num_images)
        for pace, stage in zip(timing.stages, recipe.stages, strict=True)
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
            f"a budget of {recipe.minutes:g} min is too short on this machine "
            f"for {LEAST_STEPS} steps of each stage, codes and pictures: "
            f"give {minutes + 1:.0f} or more, a smaller --size, or another --network"
        )
    first = recipe.first.lasting(steps=lengths[0])
    second = recipe.second and recipe.second.lasting(steps=lengths[1])
    decay = min(recipe.network.norm_decay, 1 - 1 / max(1.0, SHARE_OF_AVERAGE * lengths[0]))
    return replace(
        recipe, first=first, second=second, network=replace(recipe.network, norm_decay=decay)
    )


def longer_by_time(
    recipe: Recipe,
    minutes: float,
    done: int,
    stages: Sequence[tuple[VAE | Flow, Balance]],
    dataset: Dataset,
    folder: Path,
    device: torch.device,
    options: Options,
    count: int | None,
    began: float,
) -> Recipe:
    """Return the recipe of a finished run with the lengths that fit into a further time budget.

    The budget is for the rest of stage 1, all of stage 2, codes and pictures. Stage 2 gets the same
    share of the time of both whole stages as before.

    Args:
        recipe, stages, dataset, folder, device, options: of the run.
        minutes: the budget.
        done: steps that stage 1 has taken.
        count: number of CPU threads.
        began: see `prepare`.

    Raises:
        InputError: the time budget is too short.
    """
    measured = measure(
        replace(recipe, minutes=minutes),
        stages,
        dataset,
        folder,
        device=device,
        engine=options.engine,
        count=count,
        save_seconds=options.save_seconds,
    )
    left = 60 * minutes * (1 - MARGIN) - (time.monotonic() - began)
    return distributed.on_first(
        lambda: lengths_with_more(recipe, measured, len(dataset.train), done, left, minutes)
    )


def lengths_with_more(
    recipe: Recipe, timing: Timing, num_images: int, done: int, seconds: float, minutes: float
) -> Recipe:
    """Return the recipe with the lengths that use up a further time budget.

    With `done` steps of s_1 seconds behind it, a share q of stage 2 and a budget of `left` seconds
    for steps, n_2 s_2 = q (done s_1 + left), and the rest of `left` is for stage 1.

    Args:
        recipe, timing, num_images: see `lengths_within_budget`.
        done: steps that stage 1 has taken.
        seconds: what is left of the budget.
        minutes: the whole budget, for the message.

    Raises:
        InputError: the budget is too short for stage 2 and a few steps of stage 1.
    """
    left = seconds - timing.rest - sum(pace.start for pace in timing.stages)
    paces, stages = timing.stages, recipe.stages
    spent, share = paces[0].step * done, 0.0
    if len(stages) > 1:
        parts = [
            pace.step * stage.total_steps(num_images)
            for pace, stage in zip(paces, stages, strict=True)
        ]
        share = parts[1] / sum(parts)
    steps = int(((1 - share) * left - share * spent) / paces[0].step)
    if steps < LEAST_STEPS:
        least = (LEAST_STEPS * paces[0].step + share * spent) / (1 - share)
        raise InputError(
            f"{minutes:g} more minutes are too few here for {LEAST_STEPS} more steps of stage 1, "
            f"a new stage 2, codes and pictures: give {minutes + (least - left) / 60 + 1:.0f} or "
            "more"
        )
    second = recipe.second
    if second is not None:
        second = second.lasting(steps=max(1, int(share * (spent + left) / paces[1].step)))
    return replace(recipe, first=recipe.first.lasting(steps=done + steps), second=second)


def estimate(recipe: Recipe, timing: Timing, num_images: int) -> str:
    """Return one line with the estimated time of the run and of each part.

    Args:
        recipe, timing, num_images: see `lengths_within_budget`.
    """
    times = [*timing.seconds(recipe, num_images), timing.rest]
    names = [f"stage {number}" for number in range(1, len(times))] + ["codes and pictures"]
    parts = ", ".join(
        f"{name} {hours_minutes(part)}" for name, part in zip(names, times, strict=True)
    )
    rate = min(recipe.first.batch_size, num_images) / timing.stages[0].step
    lengths = " + ".join(f"{stage.total_steps(num_images):,}" for stage in recipe.stages)
    line = (
        f"{lengths} steps take about {hours_minutes(sum(times))} here: {parts} "
        f"({rate:.3g} images/s in stage 1)"
    )
    return (
        line if recipe.minutes is not None else line + hint(recipe, timing, num_images, sum(times))
    )


def hint(recipe: Recipe, timing: Timing, num_images: int, seconds: float) -> str:
    """Return advice on `--minutes`, to append to the estimate.

    If the run takes more than 40 minutes, the advice shows the lengths for a budget of 20 minutes.
    If it takes 10 to 40 minutes, it shows those for 5 minutes.

    Args:
        recipe, timing, num_images: see `lengths_within_budget`.
        seconds: estimated time of the run.
    """
    minutes = next((minutes for minutes in (20, 5) if seconds > 2 * 60 * minutes), None)
    if minutes is None:
        return "; --minutes sets a time budget instead"
    try:
        shorter = lengths_within_budget(
            replace(recipe, minutes=minutes), timing, num_images, 60 * minutes
        )
    except InputError:
        return ""
    lengths = " + ".join(f"{stage.steps:,}" for stage in shorter.stages)
    halved = any(stage.halve_every for stage in shorter.stages)
    return f"; --minutes {minutes} would take {lengths} steps" + (
        ", with the learning rates halved at the same fractions of them" if halved else ""
    )


def choose_threads(
    candidates: Sequence[int],
    network: VAE | Flow,
    balance: Balance,
    recipe: Recipe,
    data: Batches,
) -> int:
    """Return the number of CPU threads with the fastest steps of stage 1.

    A larger number must be clearly faster (`LARGEST_TIME_RATIO`) to be chosen over a smaller one.

    Args:
        candidates: numbers of threads to try.
        network, balance, recipe, data: of stage 1.
    """
    chosen, least = candidates[0], float("inf")
    for count in sorted(candidates):
        state = throwaway(network, balance, recipe.first, data, torch.device("cpu"))
        pace = measure_pace(state, data, recipe.first, 1, recipe.seed, "eager", count, SECONDS / 4)
        if pace.step < LARGEST_TIME_RATIO * least:
            chosen, least = count, pace.step
    return chosen


def measure(
    recipe: Recipe,
    stages: Sequence[tuple[VAE | Flow, Balance]],
    dataset: Dataset,
    folder: Path,
    *,
    device: torch.device,
    engine: Engine,
    count: int | None,
    save_seconds: float,
) -> Timing:
    """Measure the times of eq. 1 with a few steps and a checkpoint of each stage.

    Args:
        recipe, stages, dataset, folder: of the run. Networks and balances are copied.
        device, engine, save_seconds: see `poise.Options`.
        count: number of CPU threads. None: the usual number.
    """
    seconds = max(SECONDS, 60 * SHARE_OF_BUDGET * (recipe.minutes or 0))
    latents = recipe.network.latent_dim
    paces, rest = [], PICTURES_SECONDS + mixture_seconds(len(dataset.train), latents, device)
    for number, ((network, balance), stage) in enumerate(
        zip(stages, recipe.stages, strict=True), 1
    ):
        data = (
            ImageBatches(dataset.train, device, flips=recipe.data.flips)
            if number == 1
            else blank_codes(len(dataset.train), recipe, device)
        )
        state = throwaway(network, balance, stage, data, device)
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
        extra = saving / (save_seconds + saving)
        if number == 1 and dataset.validation is not None:
            extra += SHARE_OF_TIME
        paces.append(Pace(pace.start, pace.step * (1 + extra)))
        if isinstance(state.network, Flow):
            rest += sampling_seconds(state.network, recipe, count)
            continue
        encode, decode = inference_seconds(state.network, data, count)
        if number == 1:
            for side, (encoded, decoded) in PASSES.items():
                rest += len(getattr(dataset, side)) * (encoded * encode + decoded * decode)
        else:
            rest += len(dataset.train) * (SECOND_PASSES[0] * encode + SECOND_PASSES[1] * decode)
    return Timing(tuple(paces), rest)


def mixture_seconds(number: int, latents: int, device: torch.device) -> float:
    """Return about the seconds that it takes to fit the mixture, from a fit to few random codes.

    Args:
        number: number of training images.
        latents: number of latents.
        device: device of the fit.
    """
    from sklearn.cluster import KMeans  # noqa: F401  # so that its import is not timed

    few = min(FEW_CODES, number)
    blank = DiagonalGaussian(
        torch.randn(few, latents, generator=generator("timing")), torch.zeros(few, latents)
    )
    began = time.monotonic()
    with suppress(InputError):  # no mixture is fitted to so many latents
        fit_mixture(blank, device=device)
    return (time.monotonic() - began) * min(MOST_CODES, number) / few


def blank_codes(number: int, recipe: Recipe, device: torch.device) -> CodeBatches:
    """Return codes of a standard normal, to time stage 2 before stage 1 is trained.

    A step takes the same time with them.
    """
    zeros = torch.zeros(number, recipe.network.latent_dim)
    labelled = recipe.data.labels and recipe.second_stage == "flow"
    labels = torch.zeros(number, dtype=torch.long) if labelled else None
    return CodeBatches(zeros, zeros, device, labels=labels)


def throwaway(
    network: VAE | Flow, balance: Balance, stage: Stage, data: Batches, device: torch.device
) -> TrainingState[Any]:
    """Return a training state of copied networks. Trial steps then leave the originals alone."""
    return new_state(copy.deepcopy(network), copy.deepcopy(balance), stage, device)


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
    """Measure the time of steps by taking some for about so many seconds.

    Args:
        state, data, stage, number, seed, engine: see `poise.training.fit`.
        count: number of CPU threads.
        seconds: duration of the measurement.
    """
    clock = Clock(state, seconds)
    # The run itself warns if the engine falls back.
    watch = Watch(stop=clock, fell_back=lambda reason: None, quiet=True)
    fit(state, data, stage, number=number, seed=seed, watch=watch, engine=engine, threads=count)
    return clock.pace()


class Clock:
    """Stops `fit` after so many seconds of steps and returns their pace.

    The first steps do not count, because an engine compiles or records in them.

    Args:
        state: training state that `fit` changes.
        seconds: duration of the measurement.
    """

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
        taken, (least, most) = self._state.step - self._step, TIMED_STEPS
        passed = time.monotonic() - self._warm
        return (
            taken >= most
            or (taken >= least and passed >= self._seconds)
            or (taken >= 1 and passed >= 3 * self._seconds)
        )

    def pace(self) -> Pace:
        """Return the pace of the timed steps.

        If the stage ended before the first steps were over, all steps count.
        """
        ended, taken = now(self._state.sums), self._state.step - self._step
        if self._step == 0 or taken == 0:
            return Pace(0.0, (ended - self._began) / self._state.step)
        step = (ended - self._warm) / taken
        return Pace(max(0.0, self._warm - self._began - self._step * step), step)


def now(tensor: Tensor) -> float:
    """Return the time in seconds, after the tensor's device has finished all queued work."""
    tensor.sum().item()
    return time.monotonic()


def checkpoint_seconds(state: TrainingState, folder: Path) -> float:
    """Return the seconds that it takes to write a checkpoint of this state."""
    if distributed.rank() > 0:
        return 0.0
    # If this is killed, the next start deletes folders of such a name.
    probe, began = folder / ".writing-timing", time.monotonic()
    write_folder(probe, state_tensors(state), {})
    seconds = time.monotonic() - began
    shutil.rmtree(probe)
    return seconds


@torch.no_grad()
def inference_seconds(vae: VAE, data: Batches, count: int | None) -> tuple[float, float]:
    """Return the seconds per image of the encoder and of the decoder."""
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


def sampling_seconds(flow: Flow, recipe: Recipe, count: int | None) -> float:
    """Return the seconds that a flow takes to draw the latents of a finished run's pictures."""
    some = max(1, PICTURES // 8)
    prior = FlowPrior(flow, steps=1)
    noise = torch.randn(some, prior.noise_dims, device=flow.mean.device)
    with threads(count or usual_threads(flow)):
        prior.latents(noise)
        began = now(noise)
        ended = now(prior.latents(noise))
    steps, solver = recipe.generation.flow_steps, recipe.generation.flow_solver
    return (ended - began) * PICTURES / some * evaluations(steps, solver)
