"""What an experiment consists of: labels, each a small change of one recipe, times seeds; and how each run is measured.

Everything that can be wrong is found here, before anything starts.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from joblib import effective_n_jobs
from joblib.parallel import LokyBackend, get_active_backend

from poise.balance import make_balance
from poise.data import Dataset
from poise.errors import InputError
from poise.objectives import make_objective
from poise.recipes.settings import Changes, Recipe, from_json, to_json
from poise.runs.build import first_stage
from poise.runs.options import Options
from poise.studies.comparison.measuring import Measuring
from poise.studies.results import Result, read_results, safe_name
from poise.support.files import strict
from poise.training import Engine, choose_engine
from poise.training.machine import choose_device

SAME = "same"


@dataclass(frozen=True)
class Task:
    """One run to train and measure, complete enough for another process to do.

    Attributes:
        experiment, label: see `poise.studies.results.Result`.
        recipe: complete, with its seed and the source of its data.
        folder: of the run, in the experiment's.
        results: the folder for its result.
        measuring: how it is evaluated.
        engine, save_seconds: see `poise.Options`.
        checksum: of the data.
        num_images: of the data, to train on.
        keep: keep the run's folder when its result is written.
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
        """Label and seed."""
        return f"{self.label}, seed {self.recipe.seed}"

    @property
    def result_path(self) -> Path:
        return self.results / f"{safe_name(self.experiment, self.label, self.recipe.seed)}.json"

    @property
    def first_steps(self) -> int:
        """Steps of stage 1."""
        return self.recipe.first.total_steps(self.num_images)

    @property
    def total_steps(self) -> int:
        """Steps of both stages."""
        second = self.recipe.second
        return self.first_steps + (second.total_steps(self.num_images) if second else 0)

    def result(self) -> Result | None:
        """Return the earlier result of this very task: same settings, images, protocols and sets; None: there is none."""
        found = self._written()
        return found if found and self._is_mine(found) and self.measuring.covers(found) else None

    def check_place(self) -> None:
        """Raise InputError if a result of other settings or images lies in this one's place: it would be lost."""
        found = self._written()
        if found and not self._is_mine(found):
            raise InputError(
                f"{self.result_path} is of other settings or images: move it away, or choose another folder"
            )

    def _written(self) -> Result | None:
        try:
            (found,) = read_results([self.result_path])
            return found
        except InputError:  # there is none, or no whole one
            return None

    def _is_mine(self, found: Result) -> bool:
        return found.data["checksum"] == self.checksum and self._same_settings(found.settings)

    def _same_settings(self, earlier: dict[str, Any]) -> bool:
        try:
            known = to_json(from_json(Recipe, earlier))  # with settings that are newer than it
        except InputError:  # of a newer version
            return False
        return unsourced(known) == unsourced(to_json(self.recipe))


def unsourced(settings: Mapping[str, Any]) -> Any:
    """Settings without the place that the images lie in: their checksum says which they are."""
    return strict(dict(settings) | {"data": dict(settings["data"]) | {"source": None}})


def variants(
    balances: Sequence[str], models: Sequence[str], second_balance: str | None
) -> dict[str, dict[str, Any]]:
    """The changes of the recipe that each label stands for.

    Args:
        balances: labels that are balances of stage 1: see `poise.balance.make_balance`.
        models: labels that are objectives of stage 1.
        second_balance: of stage 2: a balance for all labels; "same": of each balance label its own; None: the recipe's for all.

    Raises:
        InputError: a label twice, or none.
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


def check_specs(recipe: Recipe) -> None:
    """Raises InputError for a balance or an objective that cannot be made."""
    for stage in filter(None, (recipe.first, recipe.second)):
        make_balance(stage.balance, image_size=1, latent_dim=1)
        make_objective(stage.objective)


def recipes(
    base: Recipe, labels: Mapping[str, dict[str, Any]], seeds: Sequence[int]
) -> Iterator[tuple[str, Recipe]]:
    """Each label's recipe for each seed, the first seed of all labels first, so that pairs are complete early."""
    for seed in seeds:
        for label, changes in labels.items():
            yield label, Changes(**changes, seed=seed).apply(base)


def check_start(recipe: Recipe, dataset: Dataset, options: Options) -> torch.device:
    """The device; what every run would fail of is said once, before the first.

    Raises:
        InputError: a network that cannot take the images, a device that is not there, or an engine that it does not have.
    """
    device = choose_device(options.device)
    choose_engine(options.engine, device)
    first_stage(recipe, list(dataset.shape))
    return device


@dataclass(frozen=True)
class Share:
    """Tasks of one process.

    Attributes:
        tasks: done in this order.
        device: that they are done on.
        threads: tasks at a time, each in a thread.
    """

    tasks: tuple[Task, ...]
    device: str
    threads: int = 1


@dataclass(frozen=True)
class Crew:
    """How many tasks are done at a time, and where.

    On a CPU each has a process of its own. The tasks of one GPU share a process, because a GPU works for one process side by
    side and for several in turns.

    Attributes:
        devices: one for each task that is done at the same time.
        threads: OpenMP threads of each process; None: the user chose a backend of joblib, which decides.
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
        """Divide tasks among processes: one by one, or on GPUs all that a GPU is to do."""
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
    """Return a crew for as many tasks at a time as there are cores on a CPU, or GPUs on cuda, and no more than tasks.

    The cores are shared equally. `tasks` counts finished ones too, so that an experiment that goes on has the threads it
    began with: their number moves the last bits of sums. A backend that the user chose with `joblib.parallel_config` has as
    many tasks at a time as it has workers.

    Args:
        device: as the user chose it; "cuda" without a number means all of them.
        jobs: tasks at a time; None: as above.
        tasks: in all.

    Raises:
        InputError: jobs < 1.
    """
    if jobs is not None and jobs < 1:
        raise InputError(f"jobs must be at least 1, not {jobs}")
    chosen: Any = get_active_backend()  # and its number of jobs
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
