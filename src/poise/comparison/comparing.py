"""A comparison is a folder: an ordinary run's folder for each label and seed, a result for each finished one, a table.

comparison.json     what is compared: another comparison is refused here, more labels and seeds are welcome
LABEL-SEED/         runs
results/            one JSON for each finished run
table.md            what they say
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from poise.comparison.execution import Outcome, execute
from poise.comparison.measuring import measuring_for
from poise.comparison.plan import (
    Crew,
    Task,
    check_balances,
    check_network,
    crew_for,
    recipes,
    unsourced,
    variants,
    with_source,
)
from poise.comparison.tables import page, table
from poise.datasets import Dataset
from poise.errors import InputError
from poise.files import appearing, write_file, write_json
from poise.guards import locked
from poise.pipeline import Options, differences, resolve
from poise.protocols import find_protocol
from poise.recipes.settings import Changes, Recipe, to_json
from poise.results import Result, safe_name
from poise.run import GENERATIONS, PriorName, read_data

BALANCES = ("computed", "learned", "optimal", "fixed")
FORMAT = 1


@dataclass(frozen=True)
class Comparison:
    """What came out.

    Attributes:
        folder: of the comparison.
        results: of the finished runs, in the order of labels and seeds.
        reference: the first label, which the others are compared with.
        failed: messages of the runs that failed, by label and seed.
    """

    folder: Path
    results: tuple[Result, ...]
    reference: str
    failed: dict[tuple[str, int], str]

    def table(self) -> list[list[str]]:
        """See `poise.comparison.table`."""
        return table(self.results, self._failed_of_label)

    @property
    def _failed_of_label(self) -> Mapping[str, int]:
        return Counter(label for label, _ in self.failed)

    def __str__(self) -> str:
        named = {f"{label}, seed {seed}": message for (label, seed), message in self.failed.items()}
        title = self.results[0].experiment if self.results else self.folder.name
        return page(title, self.results, self.reference, named, self._failed_of_label)


def compare(
    data: Any = None,
    *,
    balances: Sequence[str] | None = None,
    models: Sequence[str] = (),
    priors: Sequence[PriorName] | None = None,
    seeds: int = 3,
    recipe: str | Recipe | None = None,
    second_balance: str | None = None,
    out: str | Path | None = None,
    protocol: str = "default",
    images: int | None = None,
    extractor: str = "auto",
    jobs: int | None = None,
    options: Options = Options(),
    **changes: Any,
) -> Comparison:
    """Every label trained and measured for every seed; called again with the same arguments, it goes on where it stopped.

    The labels have the images, network, order, noise, length and protocol in common. What differs is stage 1's balance (or
    objective): stage 2 has the recipe's own balance for all, so that differences come from stage 1 alone.

    Args:
        data: as for `poise.train`; an array is written into the folder, for the processes that learn it.
        balances: labels that are balances: see `poise.balance.make_balance`. The first label is the reference. None: computed,
            learned, optimal and fixed, or computed alone beside models.
        models: labels that are objectives.
        priors: of which samples are compared: "normal", "second-stage", "mixture"; without "second-stage" no stage 2 is
            trained. None: all that there are.
        seeds: 0, 1, ... so many.
        recipe: see `poise.train`.
        second_balance: of stage 2, for all labels; "same": the label's own; None: the recipe's.
        out: the folder; None: runs/compare- and the data's name.
        protocol: see `poise.protocols`.
        images: how many real images are compared with as many others; None: as the protocol says.
        extractor: see `poise.evaluate`; "auto" is "pixels" for images of at most 16x16, and where nothing else is at hand.
        jobs: processes; None: as many as cores on a CPU, one for each GPU on cuda.
        options: device, engine, time between checkpoints, display.
        changes: of the recipe, as for `poise.train`: epochs, second_epochs, network, latent_dim, batch_size, stages, ...

    Raises:
        InputError: a label, the data, the recipe or the folder cannot be used: said before anything starts.
        Interrupted: Ctrl-C or SIGTERM; the state of all runs is saved.

    Example:
        >>> print(poise.compare("digits", balances=["computed", "fixed:beta=4"], seeds=3))      # doctest: +SKIP
    """
    if seeds < 1:
        raise InputError(f"seeds must be at least 1, not {seeds}")
    measured_priors, stages = _priors(priors, changes.pop("stages", None))
    labels = variants(balances if balances is not None else ("computed",) if models else BALANCES, models, second_balance)
    base = _base(data, recipe, {**changes, "stages": stages})
    planned = list(recipes(base, labels, range(seeds)))
    for _, complete in planned[: len(labels)]:
        check_balances(complete)
    name = _name(data, base)
    folder = Path(out or Path("runs") / f"compare-{name}")
    with locked(folder):
        if base.data.source == "array":
            base = with_source(base, str(_stored(data, folder).resolve()))
            planned = [(label, with_source(complete, base.data.source)) for label, complete in planned]
        dataset = read_data(base.data, cache=folder / "cache")
        device = check_network(base, dataset, options)
        wanted = replace(find_protocol(protocol), **({} if images is None else {"real": images}))
        measuring = measuring_for(dataset, [wanted], extractor, measured_priors, device)
        open_folder(folder, base, second_balance, dataset)
        surroundings = {"engine": options.engine, "save_seconds": options.save_seconds, "checksum": dataset.checksum}
        tasks = [
            Task(
                f"compare-{name}",
                label,
                complete,
                folder / safe_name(label, complete.seed),
                folder / "results",
                measuring,
                **surroundings,
            )
            for label, complete in planned
        ]
        crew, num_images = crew_for(device, jobs, len(tasks)), len(dataset.train)
        del dataset  # the processes read it for themselves
        outcome = carry_out(tasks, crew, num_images, folder=folder, title=f"compare {name}", quiet=options.quiet)
        comparison = collected(tasks, outcome, folder, next(iter(labels)))
        write_file(folder / "table.md", str(comparison).encode())
    return comparison


def _priors(priors: Sequence[PriorName] | None, stages: int | None) -> tuple[tuple[PriorName, ...], Literal[1] | None]:
    """The priors to measure, and 1 if no stage 2 is needed."""
    known: tuple[PriorName, ...] = tuple(GENERATIONS.values())
    if priors is None:
        chosen = tuple(prior for prior in known if stages != 1 or prior != "second-stage")
    else:
        chosen = tuple(prior for prior in known if prior in priors)
        if unknown := set(priors) - set(known):
            raise InputError(f"unknown prior {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if stages == 1 and "second-stage" in chosen:
        raise InputError("the prior second-stage needs a second stage: leave it out of the priors, or allow both stages")
    return chosen, None if "second-stage" in chosen else 1


def _base(data: Any, recipe: str | Recipe | None, changes: Mapping[str, Any]) -> Recipe:
    """What all labels have in common."""
    varied = {"balance", "second_balance", "seed", "objective"}
    allowed = {field.name for field in fields(Changes)} - varied
    if unknown := set(changes) - allowed:
        raise InputError(f"compare has no setting {', '.join(sorted(unknown))}; a recipe's are {', '.join(sorted(allowed))}")
    return Changes(**changes).apply(resolve(str(data) if isinstance(data, Path) else data, recipe, None))


def _name(data: Any, base: Recipe) -> str:
    source = base.data.source
    named = base.name if data is None else source if source == str(data) else Path(source).stem
    return safe_name(named)


def _stored(array: Any, folder: Path) -> Path:
    """A file with the images of an array."""
    path = folder / "images.npy"
    with appearing(path) as writing, open(writing, "wb") as file:
        np.save(file, array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array), allow_pickle=False)
    return path


def open_folder(folder: Path, base: Recipe, second_balance: str | None, dataset: Dataset) -> None:
    """Prepare a new folder, or make sure that it holds this comparison.

    Raises:
        InputError: it holds something else.
    """
    path = folder / "comparison.json"
    now: dict[str, Any] = {"settings": unsourced(to_json(base)), "second_balance": second_balance, "data": dataset.checksum}
    if path.exists():
        differing = differences(_read(path), now)
        if differing:
            raise InputError(f"{folder} holds another comparison ({'; '.join(differing)}): choose another --out")
    elif any(found.name not in ("cache", "images.npy") and not found.name.startswith(".") for found in folder.iterdir()):
        raise InputError(f"{folder} is not empty and is not a comparison's folder: choose another --out")
    else:
        write_json(path, {"comparison": FORMAT} | now)


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values.pop("comparison") == FORMAT:
            return values
    except (OSError, ValueError, KeyError, AttributeError):
        pass
    raise InputError(f"{path} is damaged, or of another version of poise: choose another --out")


def carry_out(
    tasks: Sequence[Task],
    crew: Crew,
    num_images: int,
    *,
    folder: Path,
    title: str,
    until: float | None = None,
    quiet: bool = False,
) -> Outcome:
    """Do the tasks that have no result yet, after saying what they are."""
    undone = [task for task in tasks if task.result() is None]
    if not quiet:
        print(announce(title, tasks, undone, crew, num_images), file=sys.stderr, flush=True)
    if not undone or (until is not None and time.monotonic() > until):
        return Outcome(late=bool(undone))
    return execute(undone, crew, num_images, folder=folder, title=title, until=until, quiet=quiet)


def announce(title: str, tasks: Sequence[Task], undone: Sequence[Task], crew: Crew, num_images: int) -> str:
    """What is about to be done."""
    recipe = tasks[0].recipe
    lengths = " + ".join(f"{stage.total_steps(num_images):,}" for stage in (recipe.first, recipe.second) if stage)
    labels, seeds = len({task.label for task in tasks}), len({task.recipe.seed for task in tasks})
    runs = f"{len(tasks)} runs ({labels} labels x {seeds} seeds) of {lengths} steps, {num_images:,} training images"
    finished = f"; {len(tasks) - len(undone)} are finished" if len(undone) < len(tasks) else ""
    return f"{title}: {runs}, {crew}{finished}"


def collected(tasks: Sequence[Task], outcome: Outcome, folder: Path, reference: str) -> Comparison:
    """The results of all tasks, by label and then seed."""
    ordered = sorted(tasks, key=lambda task: [other.label for other in tasks].index(task.label))
    results = tuple(result for task in ordered if (result := task.result()) is not None)
    failed = {(t.label, t.recipe.seed): outcome.failed[t.name] for t in ordered if t.name in outcome.failed}
    return Comparison(folder, results, reference, failed)
