"""Balances and models compared on any images: `poise compare`."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from poise.data import read_images
from poise.errors import InputError
from poise.protocols import Protocol, find_protocol
from poise.recipes.settings import CHANGES, OF_ONE_RUN, Changes, Recipe
from poise.runs.options import Options
from poise.runs.pipeline import resolve
from poise.studies.comparison.experiment import Comparison, Experiment, conduct, deadline
from poise.studies.comparison.plan import variants
from poise.studies.results import safe_name
from poise.support.files import appearing, write_file
from poise.variants import PriorName, available_priors, find_prior

BALANCES = ("computed", "learned", "optimal", "fixed")


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
    protocol: str | Protocol = "default",
    images: int | None = None,
    extractor: str = "auto",
    stop_after: float | None = None,
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
        models: labels that are objectives: see `poise.objectives.make_objective`.
        priors: names of the priors whose samples are compared, see `poise.variants.PRIORS`. Without
            "second-stage" no stage 2 is trained. None: all that there are.
        seeds: 0, 1, ... so many.
        recipe: see `poise.train`.
        second_balance: of stage 2, for all labels; "same": each balance label's own; None: the recipe's.
        out: the folder; None: runs/compare- and the data's name.
        protocol: see `poise.protocols`.
        images: how many real images are compared with as many others; None: as the protocol says.
        extractor: see `poise.evaluate`; "auto" is "pixels" for images of at most 16x16, and where nothing else is at hand.
        stop_after: after so many minutes all stops, with its state saved; None: never.
        jobs: processes; None: as many as cores on a CPU, one for each GPU on cuda.
        options: device, engine, time between checkpoints, display.
        changes: of the recipe, as for `poise.train`: epochs, second_epochs, network, latent_dim, batch_size, stages, ...

    Raises:
        InputError: a label, the data, the recipe or the folder cannot be used: said before anything starts.
        Interrupted: Ctrl-C or SIGTERM; the state of all runs is saved.

    Example:
        >>> print(poise.compare("digits", balances=["computed", "fixed:beta=4"], seeds=3))      # doctest: +SKIP
    """
    until = deadline(stop_after)
    labels = variants(
        balances if balances is not None else ("computed",) if models else BALANCES,
        models,
        second_balance,
    )
    one_stage = isinstance(recipe, Recipe) and recipe.second is None
    chosen = choose_priors(priors, 1 if one_stage else changes.get("stages"))
    base = base_recipe(
        data, recipe, changes if _need_second_stage(chosen) else {**changes, "stages": 1}
    )
    name = f"compare-{_name(data, base)}"
    folder = Path(out or Path("runs") / name)
    wanted = replace(find_protocol(protocol), **({} if images is None else {"real": images}))
    experiment = Experiment(name, base, labels, seeds, (wanted,), chosen, extractor)
    if base.data.source == "array":
        experiment = replace(experiment, base=_with_stored(data, base, folder))
    comparison = conduct(experiment, folder=folder, jobs=jobs, until=until, options=options)
    if comparison.results or comparison.failed:
        write_file(folder / "table.md", str(comparison).encode())
    return comparison


def choose_priors(priors: Sequence[PriorName] | None, stages: int | None) -> tuple[PriorName, ...]:
    """The priors to measure, in the order of `PRIORS`; all that there are if none are given."""
    for name in priors or ():
        if find_prior(name).needs == "second stage" and stages == 1:
            raise InputError(
                f"the prior {name} needs a second stage: leave it out of the priors, or allow both stages"
            )
    there = available_priors(second_stage=stages != 1)
    return tuple(name for name in there if priors is None or name in priors)


def _need_second_stage(priors: Sequence[PriorName]) -> bool:
    return any(find_prior(name).needs == "second stage" for name in priors)


def base_recipe(data: Any, recipe: str | Recipe | None, changes: Mapping[str, Any]) -> Recipe:
    """What all labels have in common."""
    allowed = CHANGES.keys() - OF_ONE_RUN
    if unknown := set(changes) - allowed:
        raise InputError(
            f"compare has no setting {', '.join(sorted(unknown))}; a recipe's are {', '.join(sorted(allowed))}"
        )
    return Changes(**changes).apply(
        resolve(str(data) if isinstance(data, Path) else data, recipe, None)
    )


def _name(data: Any, base: Recipe) -> str:
    """The data's name, short: a recipe's or data set's, or that of a folder or file."""
    if data is None or base.data.source == "array":
        return base.name
    return safe_name(Path(str(data)).stem or Path(base.data.source).stem)


def _with_stored(array: Any, base: Recipe, folder: Path) -> Recipe:
    """The recipe with a file as its source, which the array is written to: other processes are to read it."""
    values = array.detach().cpu().numpy() if isinstance(array, Tensor) else np.asarray(array)
    read_images(
        values, size=base.data.size, channels=base.data.channels
    )  # what is wrong is said before it is written
    digest = hashlib.sha256(
        f"{values.dtype} {values.shape}".encode() + np.ascontiguousarray(values).tobytes()
    ).hexdigest()
    path = folder.resolve() / f"images-{digest[:12]}.npy"
    if not path.exists():
        with appearing(path) as writing, open(writing, "wb") as file:
            np.save(file, values, allow_pickle=False)
    return replace(base, data=replace(base.data, source=str(path)))
