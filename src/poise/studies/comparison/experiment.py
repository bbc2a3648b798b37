"""Experiments: a folder with one ordinary run per label and seed, and one result per finished run.

experiment.json     settings of the experiment. The folder accepts more labels and seeds of the same
                    experiment; another experiment gives an error.
LABEL-SEED/         runs
results/            one JSON per finished run, unless another folder is named
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from poise.data import Dataset
from poise.errors import InputError, RunError
from poise.protocols import Protocol
from poise.recipes.settings import Recipe, from_json, to_json
from poise.runs.build import check_specs
from poise.runs.folder import differing_settings, read_data
from poise.runs.options import Options
from poise.runs.run import PriorName, Run
from poise.studies.comparison.execution import Outcome, execute
from poise.studies.comparison.measuring import Compared, completed, measuring_for
from poise.studies.comparison.plan import (
    Crew,
    Task,
    check_start,
    crew_for,
    recipes,
    unsourced,
)
from poise.studies.comparison.tables import page, table
from poise.studies.results import Result, safe_name
from poise.support.files import read_json, write_json
from poise.support.guards import locked
from poise.support.progress import say
from poise.training.machine import choose_device

FORMAT = 1
DESCRIPTION = "experiment.json"


@dataclass(frozen=True)
class Experiment:
    """Settings of an experiment, independent of its folder and machine.

    Attributes:
        name: the experiment's name in results.
        base: the recipe that all runs share.
        labels: changes of the recipe by label (see `Changes`); the first label is the reference.
        seeds: number of seeds, at least 1: the seeds are 0, 1, ...
        protocols, priors, extractor: see `Measuring`.
        compared: further sets of images to compare with real ones, by label; see `Measuring`.
        pages: see `Measuring`. The functions must be importable by other processes.
        keep: keep the folders of measured runs.
    """

    name: str
    base: Recipe
    labels: dict[str, dict[str, Any]]
    seeds: int
    protocols: tuple[Protocol, ...]
    priors: tuple[PriorName, ...]
    extractor: str = "auto"
    compared: Mapping[str, tuple[Compared, ...]] = field(default_factory=dict)
    pages: Mapping[str, Callable[[Run], dict[str, Any]]] = field(default_factory=dict)
    keep: bool = True

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise InputError(f"seeds must be at least 1, not {self.seeds}")
        for _, recipe in self.planned()[: len(self.labels)]:
            check_specs(recipe)

    def planned(self) -> list[tuple[str, Recipe]]:
        """Return the label and the complete recipe of each run."""
        return list(recipes(self.base, self.labels, range(self.seeds)))

    def recipe(self, label: str, seed: int) -> Recipe | None:
        """Return the complete recipe of one run, or None if it is not planned."""
        if label not in self.labels or seed not in range(self.seeds):
            return None
        (_, recipe), *_ = recipes(self.base, {label: self.labels[label]}, [seed])
        return recipe


@dataclass(frozen=True)
class Comparison:
    """Results of an experiment. `str` makes a Markdown page of them.

    Attributes:
        name: name of the experiment.
        folder: folder of the runs.
        results: results of the finished runs, in the order of labels and seeds.
        reference: the first label; the others are compared with it.
        failed: error messages of failed runs, by label and seed.
        late: True if the time limit came before all runs were finished.
    """

    name: str
    folder: Path
    results: tuple[Result, ...]
    reference: str
    failed: dict[tuple[str, int], str]
    late: bool = False

    def table(self) -> list[list[str]]:
        """Return the table of means and spreads: see `poise.studies.comparison.table`."""
        return table(self.results, self._failed_of_label)

    @property
    def _failed_of_label(self) -> Mapping[str, int]:
        return Counter(label for label, _ in self.failed)

    def __str__(self) -> str:
        messages = {
            f"{label}, seed {seed}": message for (label, seed), message in self.failed.items()
        }
        return page(self.name, self.results, self.reference, messages, self._failed_of_label)


def deadline(stop_after: float | None) -> float | None:
    """Return the value of `time.monotonic` at a time limit.

    Args:
        stop_after: minutes from now, above 0; None: no limit.

    Raises:
        InputError: `stop_after` is not positive.
    """
    if stop_after is None:
        return None
    if not stop_after > 0:
        raise InputError(f"stop_after must be greater than 0 minutes, not {stop_after}")
    return time.monotonic() + 60 * stop_after


def conduct(
    experiment: Experiment,
    *,
    folder: Path,
    results: Path | None = None,
    jobs: int | None = None,
    until: float | None = None,
    options: Options = Options(),
) -> Comparison:
    """Run an experiment, or the rest of it.

    Args:
        experiment: the experiment.
        folder: folder of the runs.
        results: folder of the results; None: `results/` in `folder`.
        jobs, until, options: see `conduct_all`.

    Raises:
        InputError, Interrupted: see `conduct_all`.
    """
    (comparison,) = conduct_all(
        {folder: experiment},
        results=results,
        jobs=jobs,
        until=until,
        options=options,
        title=experiment.name,
    )
    return comparison


def conduct_all(
    experiments: Mapping[Path, Experiment],
    *,
    title: str,
    results: Path | None = None,
    jobs: int | None = None,
    until: float | None = None,
    options: Options = Options(),
) -> list[Comparison]:
    """Run several experiments, seed by seed. Finished runs are not repeated.

    Args:
        experiments: the experiments, by the folder of their runs.
        title: title of the progress display.
        results: folder of all results; None: each experiment's own.
        jobs: runs at a time; None: one per core on a CPU, one per GPU on cuda.
        until: time limit by `time.monotonic`, when all runs stop with their state saved; None: no
            limit.
        options: device, engine, time between checkpoints, display.

    Returns:
        The results of each experiment.

    Raises:
        InputError: the data, network, extractor or folder cannot be used, or another result has the
            file name of one of these. Raised before any run starts.
        Interrupted: Ctrl-C or SIGTERM; the state of all runs is saved.
    """
    count = sum(len(experiment.planned()) for experiment in experiments.values())
    crew = crew_for(choose_device(options.device), jobs, count)
    with ExitStack() as held:
        planned: dict[Path, list[Task]] = {}
        for folder, experiment in experiments.items():
            held.enter_context(locked(folder))
            planned[folder] = prepare(experiment, folder, results or folder / "results", options)
        tasks = [task for of_one in planned.values() for task in of_one]
        undone = [task for task in tasks if task.result() is None]
        if not options.quiet:
            for folder, experiment in experiments.items():
                line = announce(experiment, planned[folder], undone, crew)
                say(line)
        if not undone or (until is not None and time.monotonic() > until):
            outcome = Outcome(late=bool(undone))
        else:
            undone.sort(key=lambda task: task.recipe.seed)
            outcome = execute(undone, crew, title=title, until=until, quiet=options.quiet)
    return [
        collected(experiment, planned[folder], outcome, folder)
        for folder, experiment in experiments.items()
    ]


def prepare(experiment: Experiment, folder: Path, results: Path, options: Options) -> list[Task]:
    """Check the experiment, write experiment.json, and return all tasks, finished or not.

    Raises:
        InputError: the data, network, extractor, engine or folder cannot be used.
    """
    dataset = read_data(experiment.base.data, cache=folder / "cache")
    device = choose_device(options.device)
    networks = {
        label: check_start(recipe, dataset, options)
        for label, recipe in experiment.planned()[: len(experiment.labels)]
    }
    how = experiment.protocols, experiment.extractor, experiment.priors, device
    common = replace(measuring_for(dataset, *how), pages=experiment.pages)
    compared = completed(experiment.compared, dataset, device)
    # Workers may have other working directories.
    place, results = folder.resolve(), results.resolve()
    tasks = [
        Task(
            experiment.name,
            label,
            replace(recipe, network=networks[label]),
            place / safe_name(label, recipe.seed),
            results,
            replace(common, compared=compared.get(label, ())),
            engine=options.engine,
            save_seconds=options.save_seconds,
            checksum=dataset.checksum,
            num_images=len(dataset.train),
            keep=experiment.keep,
        )
        for label, recipe in experiment.planned()
    ]
    open_folder(folder, experiment, dataset, results)
    for task in tasks:
        task.check_place()
    return tasks


def open_folder(folder: Path, experiment: Experiment, dataset: Dataset, results: Path) -> None:
    """Write experiment.json. If it exists, it must be of the same experiment; labels may differ.

    Raises:
        InputError: the folder holds another experiment or other files.
    """
    path = folder / DESCRIPTION
    now = {
        "settings": unsourced(to_json(experiment.base)),
        "data": dataset.checksum,
        "labels": dict(experiment.labels),
    }
    if path.exists():
        was = _read(path)
        labels = {
            label: changes for label, changes in was["labels"].items() if label in now["labels"]
        }
        differing = differing_settings(was | {"labels": dict(now["labels"]) | labels}, now)
        if differing:
            raise InputError(
                f"{folder} holds another experiment ({'; '.join(differing)}): choose another --out"
            )
        now["labels"] = was["labels"] | now["labels"]
    elif any(not _expected(found) for found in folder.iterdir()):
        raise InputError(
            f"{folder} is not empty and is not an experiment's folder: choose another --out"
        )
    write_json(
        path,
        {"experiment": FORMAT, "name": experiment.name, "results": str(results.resolve())} | now,
    )


@dataclass(frozen=True)
class DescriptionFile:
    """Contents of experiment.json that another experiment in the folder must agree with."""

    experiment: Literal[1]
    settings: dict[str, Any]
    data: str
    labels: dict[str, dict[str, Any]]


def _expected(path: Path) -> bool:
    return path.name in ("cache", "results") or path.name.startswith((".", "images-"))


def _read(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path, DescriptionFile)
    except InputError as error:
        raise InputError(
            f"{error}; or it is of another version of poise: choose another --out"
        ) from None
    try:
        # Settings that are newer than the file get their defaults.
        sourced = values.settings | {"data": values.settings["data"] | {"source": ""}}
        settings = unsourced(to_json(from_json(Recipe, sourced)))
    except (InputError, LookupError, TypeError):  # of another version: the differences are named
        settings = values.settings
    return {"settings": settings, "data": values.data, "labels": values.labels}


def announce(
    experiment: Experiment, tasks: Sequence[Task], undone: Sequence[Task], crew: Crew
) -> str:
    """Return a line that says how many runs are planned, finished and done at a time."""
    recipe, num_images = tasks[0].recipe, tasks[0].num_images
    counts = [stage.total_steps(num_images) for stage in recipe.stages]
    lengths = " + ".join(f"{steps:,}" for steps in counts) + " step" + "s" * (counts != [1])
    runs = (
        f"{len(tasks)} run{'s' * (len(tasks) > 1)} "
        f"(labels: {len(experiment.labels)}, seeds: {experiment.seeds}) of {lengths}"
    )
    count = sum(task not in undone for task in tasks)
    finished = f", {count} of them finished" if count else ""
    cost = f"; {experiment.base.cost}" if experiment.base.cost else ""
    return f"{experiment.name}: {runs}{finished}; {num_images:,} training images; {crew}{cost}"


def collected(
    experiment: Experiment, tasks: Sequence[Task], outcome: Outcome, folder: Path
) -> Comparison:
    """Return the results of all tasks, by label and then seed."""
    labels = list(experiment.labels)
    ordered = sorted(tasks, key=lambda task: labels.index(task.label))
    results = tuple(result for task in ordered if (result := task.result()) is not None)
    failed = {
        (t.label, t.recipe.seed): outcome.failed[t.result_path]
        for t in ordered
        if t.result_path in outcome.failed
    }
    if not outcome.late and len(results) + len(failed) < len(tasks):
        unseen = next(
            t for t in ordered if t.result() is None and t.result_path not in outcome.failed
        )
        raise RunError(
            f"{unseen.result_path} is missing, or lacks the settings or measurements that were "
            "planned: please report this as a defect of Poise"
        )
    return Comparison(experiment.name, folder, results, labels[0], failed, outcome.late)
