"""`poise compare`: balances and models compared on any images."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from poise.data.loading import find_images, to_numpy
from poise.errors import InputError
from poise.protocols import Protocol, find_protocol
from poise.recipes.settings import CHANGES, OF_ONE_RUN, Changes, Recipe
from poise.runs.options import Options
from poise.runs.pipeline import resolve
from poise.studies.comparison.experiment import Comparison, Experiment, conduct, deadline
from poise.studies.comparison.plan import variants
from poise.studies.results import safe_name
from poise.support.files import appearing, write_file
from poise.variants import PriorName, SecondStage, available_priors, find_prior

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
    """Train and measure every label for every seed. A second call with the same arguments resumes.

    All labels have the same images, network, order, noise, length and protocol. They differ in the
    balance (or objective) of stage 1. Stage 2 has the recipe's own balance for all labels, so all
    differences come from stage 1.

    Args:
        data: images, as for `poise.train`. An array is written into the folder for the workers.
        balances: balances to compare: see `poise.balance.make_balance`. The first label is the
            reference. None: computed, learned, optimal and fixed, or computed alone beside models.
        models: objectives to compare: see `poise.objectives.make_objective`.
        priors: names of the priors whose samples are compared: see `poise.variants.PRIORS`. Without
            "second-stage" and "flow" no stage 2 is trained. None: all priors of the recipe.
        seeds: number of seeds, at least 1: the seeds are 0, 1, ...
        recipe: see `poise.train`.
        second_balance: balance of stage 2 for all labels; "same": each label's own; None: the
            recipe's.
        out: the folder; None: runs/compare- and the data's name.
        protocol: see `poise.protocols`.
        images: number of real images, and of generated ones; None: as in the protocol.
        extractor: see `poise.evaluate`; "auto" is "pixels" for images of at most 16x16, and if no
            network is available.
        stop_after: minutes until all runs stop, with their state saved; None: no limit.
        jobs: runs at a time; None: one per core on a CPU, one per GPU on cuda.
        options: device, engine, time between checkpoints, display.
        changes: changes of the recipe, as for `poise.train`: epochs, second_epochs, network,
            latent_dim, batch_size, stages, ...

    Returns:
        The results of the finished runs.

    Raises:
        InputError: a label, the data, the recipe or the folder cannot be used. Raised before any
            run starts.
        Interrupted: Ctrl-C or SIGTERM; the state of all runs is saved.

    Example:
        >>> balances = ["computed", "fixed:beta=4"]
        >>> print(poise.compare("digits", balances=balances, seeds=3))      # doctest: +SKIP
    """
    until = deadline(stop_after)
    labels = variants(
        balances if balances is not None else ("computed",) if models else BALANCES,
        models,
        second_balance,
    )
    base = base_recipe(data, recipe, changes)
    chosen = choose_priors(priors, base.second_stage)
    if not any(find_prior(name).second_stage for name in chosen):
        base = base_recipe(data, recipe, {**changes, "stages": 1})
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


def choose_priors(
    priors: Sequence[PriorName] | None, second_stage: SecondStage | None
) -> tuple[PriorName, ...]:
    """Return the priors to measure, in the order of `PRIORS`. None: all available priors.

    Args:
        priors: names of priors, or None.
        second_stage: kind of stage 2, or None.

    Raises:
        InputError: a prior needs another second stage.
    """
    there = available_priors(second_stage)
    for name in priors or ():
        needed = find_prior(name).second_stage
        if name not in there and second_stage is None:
            raise InputError(
                f"the prior {name} needs a second stage: leave it out of the priors, "
                "or allow both stages"
            )
        if name not in there:
            raise InputError(
                f"the prior {name} needs a {needed} as second stage, and this recipe trains a "
                f"{second_stage}: leave it out of the priors, or give --second {needed}"
            )
    return tuple(name for name in there if priors is None or name in priors)


def base_recipe(data: Any, recipe: str | Recipe | None, changes: Mapping[str, Any]) -> Recipe:
    """Return the recipe that all labels share.

    Raises:
        InputError: a change is not a setting of a recipe.
    """
    allowed = CHANGES.keys() - OF_ONE_RUN
    if unknown := set(changes) - allowed:
        raise InputError(
            f"compare has no setting {', '.join(sorted(unknown))}; "
            f"a recipe's are {', '.join(sorted(allowed))}"
        )
    return Changes(**changes).apply(resolve(data, recipe, None))


def _name(data: Any, base: Recipe) -> str:
    """Return the name of the recipe, data set, folder or file."""
    if data is None or base.data.source == "array":
        return base.name
    return safe_name(Path(str(data)).stem or Path(base.data.source).stem)


def _with_stored(array: Any, base: Recipe, folder: Path) -> Recipe:
    """Write the array to a file that other processes can read, and make it the recipe's source."""
    values = to_numpy(array) if isinstance(array, Tensor) else np.asarray(array)
    # Raises an error for unusable arrays before anything is written.
    settings = base.data
    find_images(values, size=settings.size, channels=settings.channels, levels=settings.levels)
    digest = hashlib.sha256(
        f"{values.dtype} {values.shape}".encode() + np.ascontiguousarray(values).tobytes()
    ).hexdigest()
    path = folder.resolve() / f"images-{digest[:12]}.npy"
    if not path.exists():
        with appearing(path) as writing, open(writing, "wb") as file:
            np.save(file, values, allow_pickle=False)
    return replace(base, data=replace(base.data, source=str(path)))
