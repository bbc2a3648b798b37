"""Plan of an experiment: labels (small changes of one recipe) times seeds, as tasks.

All settings are checked here, before any run starts.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from joblib import effective_n_jobs
from joblib.parallel import LokyBackend, get_active_backend

from poise.data import Dataset
from poise.errors import InputError
from poise.recipes.settings import Changes, Network, Recipe, from_json, to_json
from poise.runs.build import first_stage, stage_balance, with_latents_counted
from poise.runs.options import Options
from poise.runs.validation import check_elbo
from poise.studies.comparison.measuring import Measuring
from poise.studies.results import Result, read_results, safe_name
from poise.support.files import strict
from poise.training import Engine, choose_engine
from poise.training.machine import choose_device

SAME = "same"


@dataclass(frozen=True)
class Task:
    """One run to train and measure, with everything that another process needs for it.

    Attributes:
        experiment, label: see `poise.studies.results.Result`.
        recipe: the complete recipe, with its seed and the source of its data.
        folder: folder of the run, inside the experiment's.
        results: folder of its result.
        measuring: settings of its evaluation.
        engine, save_seconds: see `poise.Options`.
        checksum: checksum of the data.
        num_images: number of training images.
        keep: keep the run's folder after its result is written.
    """

    experiment: str
    label: str
    recipe: Recipe
    folder: Path
    results: Path
    measuring: Measuring
    engine: Engine = "auto"
    save_seconds: float = 60.0
    checksum: str = ""
    num_images: int = 0
    keep: bool = True

    @property
    def name(self) -> str:
        """Return label and seed."""
        return f"{self.label}, seed {self.recipe.seed}"

    @property
    def result_path(self) -> Path:
        return self.results / f"{safe_name(self.experiment, self.label, self.recipe.seed)}.json"

    @property
    def first_steps(self) -> int:
        """Return the number of steps of stage 1."""
        return self.recipe.first.total_steps(self.num_images)

    @property
    def total_steps(self) -> int:
        """Return the number of steps of both stages."""
        second = self.recipe.second
        return self.first_steps + (second.total_steps(self.num_images) if second else 0)

    def result(self) -> Result | None:
        """Return the result on disk, or None if it is missing or of another task.

        Settings, images, protocols and sets must be the same.
        """
        found = self._written()
        return found if found and self._is_mine(found) and self.measuring.covers(found) else None

    def check_place(self) -> None:
        """Check that this task's result would not overwrite another one.

        Raises:
            InputError: the file holds a result of other settings or images.
        """
        found = self._written()
        if found and not self._is_mine(found):
            raise InputError(
                f"{self.result_path} is of other settings or images: "
                "move it away, or choose another folder"
            )

    def _written(self) -> Result | None:
        try:
            (found,) = read_results([self.result_path])
            return found
        except InputError:  # missing or damaged
            return None

    def _is_mine(self, found: Result) -> bool:
        return found.data["checksum"] == self.checksum and self._same_settings(found.settings)

    def _same_settings(self, earlier: dict[str, Any]) -> bool:
        try:
            # Settings that are newer than the result get their defaults.
            known = to_json(from_json(Recipe, earlier))
        except InputError:  # written by a newer version
            return False
        return unsourced(known) == unsourced(to_json(self.recipe))


def unsourced(settings: Mapping[str, Any]) -> Any:
    """Return the settings without the path of the images. Their checksum identifies them."""
    return strict(dict(settings) | {"data": dict(settings["data"]) | {"source": None}})


def variants(
    balances: Sequence[str], models: Sequence[str], second_balance: str | None
) -> dict[str, dict[str, Any]]:
    """Return each label's changes of the recipe.

    Args:
        balances: balances of stage 1: see `poise.balance.make_balance`.
        models: objectives of stage 1.
        second_balance: balance of stage 2 for all labels; "same": each balance label's own; None:
            the recipe's.

    Raises:
        InputError: a label is given twice, or no label is given.
    """
    labels = [*balances, *models]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice or not labels:
        raise InputError(
            f"{', '.join(twice)} is given twice"
            if twice
            else "nothing to compare: give balances or models"
        )
    own = {} if second_balance in (None, SAME) else {"second_balance": second_balance}
    same = second_balance == SAME
    named = {
        label: {"balance": label} | ({"second_balance": label} if same else own)
        for label in balances
    }
    return named | {label: {"objective": label} | own for label in models}


def recipes(
    base: Recipe, labels: Mapping[str, dict[str, Any]], seeds: Sequence[int]
) -> Iterator[tuple[str, Recipe]]:
    """Yield each label and its recipe, seed by seed: pairs of one seed are complete early."""
    for seed in seeds:
        for label, changes in labels.items():
            yield label, Changes(**changes, seed=seed).apply(base)


def check_start(recipe: Recipe, dataset: Dataset, options: Options) -> Network:
    """Return the network of a recipe with its number of latents.

    Errors that every run of the recipe would have are raised here, before the first run.

    Raises:
        InputError: the network cannot take the images, the device is missing, or it cannot run the
            engine.
    """
    choose_engine(options.engine, choose_device(options.device))
    built = first_stage(recipe, list(dataset.shape))
    if recipe.data.validation is not None:
        check_elbo(recipe.first, stage_balance(recipe.first, recipe, list(dataset.shape)))
    return with_latents_counted(recipe, built, dataset.train).network


@dataclass(frozen=True)
class Share:
    """Tasks of one process.

    Attributes:
        tasks: the tasks, in order.
        device: their device.
        threads: number of tasks at a time, each in a thread.
    """

    tasks: tuple[Task, ...]
    device: str
    threads: int = 1


@dataclass(frozen=True)
class Crew:
    """Number of tasks at a time, and their devices.

    On a CPU each task has its own process. The tasks of one GPU share a process, because a GPU runs
    the kernels of one process side by side, but those of several processes in turns.

    Attributes:
        devices: one device per task that runs at the same time.
        threads: OpenMP threads per process; None: the joblib backend of the user decides.
    """

    devices: tuple[str, ...]
    threads: int | None

    @property
    def processes(self) -> int:
        return len(set(self.devices)) if self._by_device else len(self.devices)

    @property
    def _by_device(self) -> bool:
        return self.threads is not None and self.devices[0].startswith("cuda")

    def shares(self, tasks: Sequence[Task]) -> list[Share]:
        """Divide tasks among processes: one share per task or, on GPUs, one share per GPU."""
        if not self._by_device:
            return [Share((task,), self.devices[0]) for task in tasks]
        seats = len(self.devices)
        dealt = {
            device: [
                task for number, task in enumerate(tasks) if self.devices[number % seats] == device
            ]
            for device in dict.fromkeys(self.devices)
        }
        return [
            Share(tuple(mine), device, self.devices.count(device))
            for device, mine in dealt.items()
            if mine
        ]

    def __str__(self) -> str:
        count, kind = len(self.devices), self.devices[0].partition(":")[0]
        return (
            f"{count} at a time on {kind}"
            if count > 1
            else f"one after another on {self.devices[0]}"
        )


def crew_for(device: torch.device, jobs: int | None, tasks: int) -> Crew:
    """Return a crew with one task per core on a CPU, or per GPU on cuda, and at most `tasks`.

    Processes share the cores equally. `tasks` includes finished tasks, so a resumed experiment has
    as many threads as before: their number changes the last bits of sums. A backend of
    `joblib.parallel_config` does one task per worker at a time.

    Args:
        device: the user's choice; "cuda" without a number means all GPUs.
        jobs: tasks at a time, at least 1; None: as above.
        tasks: number of all tasks.

    Raises:
        InputError: `jobs` is below 1.
    """
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs must be at least 1, not {jobs}")
    chosen: Any = get_active_backend()  # a pair: backend, number of jobs
    if not isinstance(chosen[0], LokyBackend):
        return Crew((str(device),) * (jobs or effective_n_jobs(chosen[1] or -1)), None)
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    places = [str(device)]
    if device.type == "cuda" and device.index is None:
        places = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    usual = cores if device.type == "cpu" else len(places)
    count = max(1, min(jobs or usual, tasks))
    crew = Crew(tuple(places[number % len(places)] for number in range(count)), 1)
    return replace(crew, threads=max(1, min(torch.get_num_threads(), cores // crew.processes)))
