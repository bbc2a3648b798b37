"""Published experiments: both stages, every sampler, the original protocols, published numbers.

The settings are those of a recipe (`poise.recipes`), which has a named switch for each departure.
An experiment can be stopped and resumed.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from poise.errors import InputError
from poise.protocols import PROTOCOLS, Protocol
from poise.recipes import EXPERIMENTS, RECIPES
from poise.recipes.settings import Generation, Recipe, Stage
from poise.runs.options import Options
from poise.runs.pipeline import resolve
from poise.studies.comparison import Comparison, Experiment, conduct
from poise.studies.comparison.experiment import deadline
from poise.studies.comparison.plan import variants
from poise.studies.results import safe_name
from poise.support.files import write_file
from poise.support.progress import say
from poise.variants import DATA_SETS, available_priors


def reproduce(
    name: str,
    *,
    data: str | Path | None = None,
    balances: Sequence[str] | None = None,
    second_balance: str | None = None,
    seeds: int = 1,
    length: float = 1.0,
    stop_after: float | None = None,
    out: str | Path | None = None,
    results: str | Path = "results",
    extractor: str = "auto",
    jobs: int | None = None,
    options: Options = Options(),
) -> Comparison:
    """Run the complete experiment of a recipe. Called again with the same arguments, it resumes.

    Every run is measured under the `default` protocol with and without latent renormalisation, and
    under the protocol of Dai & Wipf. On the data sets of the paper it is also measured under the
    protocol of its authors.

    Args:
        name: the recipe: cifar10, cifar10-released, celeba64, celeba64-released, mnist,
            fashion-mnist, ...
        data: source of the images: a folder, an .npz or .npy file, hf:owner/name; None: the
            recipe's data set.
        balances: balances of stage 1, one label each; None: the recipe's own.
        second_balance: balance of stage 2 for all labels; "same": each label's own; None: the
            recipe's.
        seeds: number of seeds, at least 1: the seeds are 0, 1, ...
        length: share of the recipe's epochs, in (0, 1]. Labels of shorter runs name their length.
        stop_after: minutes until all runs stop, with their state saved; None: no limit.
        out: folder of the runs; None: runs/reproduce-NAME, with the length if it is not 1.
        results: folder of the results.
        extractor: see `poise.evaluate`.
        jobs, options: see `poise.compare`.

    Returns:
        The results of the finished runs.

    Raises:
        InputError: the name is unknown, an option is wrong, or the data are missing.
        Interrupted: Ctrl-C or SIGTERM; the state of all runs is saved.
    """
    until = deadline(stop_after)
    if name not in EXPERIMENTS:
        raise InputError(f"there is no experiment {name!r}: there are {', '.join(EXPERIMENTS)}")
    if not 0 < length <= 1:
        raise InputError(
            f"length must be a share of the whole, above 0 and at most 1, not {length}"
        )
    experiment = experiment_of(name, data, balances, seeds, length, extractor, second_balance)
    if not options.quiet and experiment.base.data.file_order != RECIPES[name].data.file_order:
        say(
            "poise: note: images keep the order of their file: "
            "only a folder of files has a listing order"
        )
    trial = [] if length == 1 else ["length", f"{length:g}"]
    folder = Path(out or Path("runs") / safe_name("reproduce", name, *trial))
    comparison = conduct(
        experiment, folder=folder, results=Path(results), jobs=jobs, until=until, options=options
    )
    if comparison.results or comparison.failed:
        write_file(folder / "table.md", text(comparison).encode())
    return comparison


def experiment_of(
    name: str,
    data: str | Path | None,
    balances: Sequence[str] | None,
    seeds: int,
    length: float,
    extractor: str,
    second_balance: str | None = None,
) -> Experiment:
    """Return the experiment that `reproduce` runs."""
    recipe = RECIPES[name]
    base = with_data(shortened(recipe, length), data)
    trial = "" if length == 1 else f" (length {length:g})"
    trial += "" if second_balance is None else f" (stage 2 {second_balance})"
    labels = variants(balances or [recipe.first.balance], (), second_balance)
    named = {label + trial: changes for label, changes in labels.items()}
    priors = available_priors(base.second_stage)
    return Experiment(name, base, named, seeds, protocols_for(recipe), priors, extractor)


def with_data(recipe: Recipe, data: str | Path | None) -> Recipe:
    """Return the recipe with another source of the same images.

    A single file has no listing order, so its `file_order` becomes "sorted".
    """
    if data is None:
        return recipe
    found = resolve(Path(data) if Path(data).exists() else data, recipe, None)
    if found.data.source not in DATA_SETS and Path(found.data.source).is_file():
        return replace(found, data=replace(found.data, file_order="sorted"))
    return found


def shortened(recipe: Recipe, length: float) -> Recipe:
    """Return the recipe with a share of its epochs, at least one per stage.

    Its learning rates are halved at the same shares of the length.
    """
    if length == 1:
        return recipe
    second = recipe.second and _shortened_stage(recipe.second, length)
    cost = f"in full {recipe.cost}"
    return replace(recipe, first=_shortened_stage(recipe.first, length), second=second, cost=cost)


def _shortened_stage(stage: Stage, length: float) -> Stage:
    assert stage.epochs is not None
    return stage.lasting(epochs=max(1, round(stage.epochs * length)))


def protocols_for(recipe: Recipe) -> tuple[Protocol, ...]:
    """Return the protocols that an experiment is measured under.

    They are the default protocol with the recipe's sampling, with and without renormalisation, that
    of Dai & Wipf, and that of the data set's authors if there is one.
    """
    default, own = PROTOCOLS["default"], recipe.generation
    ways: dict[str, Generation] = {
        "default-renormalised": replace(own, renormalise="always"),
        "default-not-renormalised": replace(own, renormalise="never"),
    }
    others = [
        replace(default, name=name, generation=way) for name, way in ways.items() if way != own
    ]
    named = DATA_SETS.get(recipe.data.source)
    authors = [PROTOCOLS[named.protocol]] if named and named.protocol else []
    return (default, *others, PROTOCOLS["dai-wipf"], *authors)


def text(comparison: Comparison) -> str:
    """Return our numbers, and below them the published ones."""
    published = [f"- published: {line}" for line in RECIPES[comparison.name].published]
    return (
        f"{comparison}\n"
        + "\n".join([*published, "" if published else "- nothing comparable is published"]).strip()
        + "\n"
    )
