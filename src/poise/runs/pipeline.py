"""Train both stages in a folder: images -> stage 1 -> codes -> stage 2 -> pictures and figures.

Interrupted training continues from the newest checkpoint.
"""

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from poise.balance import Balance
from poise.data import Dataset, gather, hold_out
from poise.data.decoding import grid, save_png
from poise.data.loading import CHECK_RANGE
from poise.errors import InputError, MissingExtraError
from poise.flow import Flow
from poise.metrics.copies import copies_note
from poise.objectives import make_objective
from poise.recipes import find_recipe
from poise.recipes.settings import RIVALS_BALANCE, VAE_OBJECTIVE, Changes, Recipe, to_json
from poise.runs import plots
from poise.runs.build import (
    check_specs,
    first_stage,
    second_stage,
    stage_balance,
    with_latents_counted,
)
from poise.runs.callbacks import Callback, Callbacks, TensorBoard
from poise.runs.checkpoint import Saved
from poise.runs.continuing import (
    More,
    history_of,
    images_of,
    in_words,
    is_begun,
    longer,
    record,
    rewound,
    settings_of,
    steps_of_first,
)
from poise.runs.folder import (
    check_place,
    config_to_write,
    open_folder,
    read_config,
    read_data,
    settings_to_read,
    with_labels,
)
from poise.runs.job import BEGINNING, Job
from poise.runs.options import Options
from poise.runs.run import Run, load
from poise.runs.starting import check_start, load_start, read_source, recipe_of, start_of_second
from poise.runs.timing import PICTURES, Plan, earlier_plan, longer_by_time, make_plan
from poise.runs.validation import check_elbo, overfitting
from poise.support.files import write_file, write_json
from poise.support.guards import locked, stop_signals
from poise.support.progress import say, warn
from poise.support.seeds import drawn
from poise.training import choose_engine, denormals_as_zero, distributed, threads
from poise.training.machine import choose_device
from poise.vae import VAE
from poise.variants import DATA_SETS

PAIRS = 32
SMALL_SET = 10_000  # training images: samples of more are not compared with them


def train(
    images: Any = None,
    *,
    recipe: str | Recipe | None = None,
    out: str | Path | None = None,
    vae: VAE | None = None,
    labels: Any = None,
    options: Options = Options(),
    callbacks: Sequence[Callback] = (),
    more_epochs: int | None = None,
    more_minutes: float | None = None,
    start_from: str | Path | None = None,
    **changes: Any,
) -> Run:
    """Train both stages and return the run.

    If training was interrupted, the same call continues it. Several processes that torchrun starts
    train one run together: see docs/distributed.md.

    Args:
        images: an array or tensor (n, h, w), (n, h, w, c) or (n, c, h, w), uint8 or float in [0,
            1]. Or a path, a data set's name, hf:owner/name, or a `Dataset`, which is used as it is
            and must be prepared as the recipe says. None: the recipe's own data, or the digits
            without a recipe.
        recipe: a name or a `Recipe`. None: the data set's own recipe, or "images" for other data.
        out: the run's folder. None: runs/ and the recipe's name.
        vae: a network of your own, used instead of the recipe's.
        labels: True: learn the classes of the images, which the data have. Or the label of each
            image of an array, (n,), whole numbers or text. A flow as stage 2 and the mixture then
            draw images of a class: `run.sample(64, label="cats")`.
        options: device, checkpoints, display.
        callbacks: called at each log entry, at the end of a stage, ...: see `poise.Callback`.
        more_epochs: continue the finished run in `out`: epochs that stage 1 is longer. Stage 2 is
            longer in proportion and trained anew. The settings are the run's own.
        more_minutes: the same, as time for the rest of stage 1, stage 2, codes and pictures.
        start_from: folder of a run, or hf:OWNER/NAME, whose weights this run starts from. Without
            `recipe`, its settings are used. config.json says what is kept.
        changes: settings of the recipe by name: epochs, minutes, batch_size, latent_dim, balance,
            size, seed, ... `poise train --help` lists them. `poise.recipes.CHANGES` has their
            types.

    Raises:
        InputError: the data, the recipe or the folder cannot be used.
        RunError: the loss is not finite, the disk or the device's memory is full, or a callback
            raised an error.
        Interrupted: Ctrl-C or SIGTERM. The state is saved.

    Example:
        >>> run = poise.train("digits", out="runs/digits")                  # doctest: +SKIP
        >>> run.sample(64, prior="second-stage", seed=0).shape              # doctest: +SKIP
        torch.Size([64, 1, 8, 8])
    """
    began, goes_on = time.monotonic(), more_epochs is not None or more_minutes is not None
    more = More(more_epochs, more_minutes) if goes_on else None
    place = None if out is None else Path(out)
    if more is not None and start_from is None and recipe is None:
        recipe = settings_of(place, changes)
        images = images_of(recipe, Path(out or ""), images)
    elif more is not None:
        raise InputError(f"{more} continues a run as it is: leave out recipe and start_from")
    elif start_from is not None and recipe is None:
        recipe = recipe_of(start_from, place, changes)
    listed = None if labels is None or isinstance(labels, bool) else labels
    if listed is not None and isinstance(images, Dataset):
        raise InputError("a Dataset has labels of its own: pass them to poise.data.load(labels=)")
    wanted = changes | ({} if labels is None else {"labels": labels is not False})
    own = [name for name in OF_FIRST_NETWORK if vae is not None and wanted.get(name) is not None]
    if own:
        raise InputError(f"the network is your own (vae=): leave out {', '.join(own)}")
    recipe = Changes(**wanted).apply(resolve(images, recipe, vae))
    folder = place or Path("runs") / recipe.name
    device = distributed.device_of_rank(choose_device(options.device))
    choose_engine(options.engine, device)
    boards = [TensorBoard()] if options.tensorboard else []
    called = Callbacks(callbacks, boards)
    check_specs(recipe)
    check_objective(recipe.first.objective)
    given = images if recipe.data.source == "array" or isinstance(images, Dataset) else None
    if listed is not None:
        given = read_data(recipe.data, images, folder / "cache", listed)
    with ExitStack() as held:
        # Threads inherit this setting when they start, so set it before the first parallel work.
        held.enter_context(denormals_as_zero())
        with distributed.processes(device):
            distributed.on_first(lambda: held.enter_context(locked(folder)))
            job = prepare(
                folder,
                recipe,
                vae,
                device,
                options,
                given,
                began,
                more=more,
                start_from=start_from,
                callbacks=called,
            )
            if job.threads is not None:
                held.enter_context(threads(job.threads))
            if not job.meta["finished"]:
                with stop_signals() as stop:
                    job.run_stages(stop)
        if distributed.rank() > 0:  # its machine may not see the files yet
            return Run(folder, job.config, Saved(job.tensors, job.meta), [], vae).to(device)
        if not (folder / "summary.json").exists():
            run = load(folder, device=options.device, vae=vae)
            finish(run, job.dataset, job.meta, quiet=options.quiet)
    return load(folder, device=options.device, vae=vae).remember(job.dataset)


def check_objective(spec: str) -> None:
    """Check that an objective exists, and that these processes can compute it.

    Raises:
        InputError: no such objective, or it needs whole batches and there are several processes.
    """
    if make_objective(spec).alone and (distributed.launched() or distributed.is_up()):
        raise InputError(
            f"objective {spec} needs whole batches and one process: start it without torchrun"
        )


def prepare(
    folder: Path,
    recipe: Recipe,
    vae: VAE | None,
    device: torch.device,
    options: Options,
    given: Any,
    began: float,
    *,
    more: More | None,
    start_from: str | Path | None,
    callbacks: Callbacks,
) -> Job:
    """Load the data, check all settings, plan the run and return a job that can train.

    Wrong input raises an error before anything is written.

    Args:
        folder: the run's folder, locked.
        recipe, vae, device, options: of the run.
        given: images, if `recipe.data.source` does not name them.
        began: start time of this call of `train`, from `time.monotonic`.
        more, start_from, callbacks: see `train`.
    """
    distributed.on_first(lambda: check_place(folder))  # before images are decoded into its cache
    dataset = (
        given
        if isinstance(given, Dataset)
        else read_data(settings_to_read(recipe, folder), given, folder / "cache")
    )
    if recipe.data.validation is not None and dataset.validation is None:
        dataset = hold_out(dataset, recipe.data.validation)
    dataset = with_labels(dataset, recipe.data)
    classes = len(dataset.labels.classes) if dataset.labels else 0
    if recipe.generation.guidance != 1 and not (classes and recipe.second_stage == "flow"):
        raise InputError(
            f"guidance {recipe.generation.guidance:g} needs a flow that is trained with labels: "
            "--second flow --labels, or leave guidance at 1"
        )
    if vae is not None or recipe.network.kind == "conv":
        built = vae or first_stage(recipe, list(dataset.shape))
        recipe = with_latents_counted(recipe, built, dataset.train)
    shape = list(dataset.shape)
    stages = networks_and_balances(recipe, shape, vae, classes)
    if recipe.data.validation is not None:
        check_elbo(recipe.first, stages[0][1])
    engine = choose_engine(options.engine, device)
    config = config_to_write(recipe, dataset, engine)
    checksum: str = dataset.checksum
    agreed = config["recipe"], checksum, config["data"].get("labels")
    distributed.check_agreement("settings or images", agreed)
    plan = distributed.on_first(lambda: earlier_plan(folder, recipe, checksum))
    recipe = plan.recipe if plan else recipe
    saved = distributed.on_first(lambda: open_folder(folder, config | {"recipe": to_json(recipe)}))
    if more is not None:
        if plan is None:
            raise InputError(f"{folder} holds no finished run with this network to continue")
        plan = continued(folder, more, plan, stages, dataset, device, options, began, saved)
        recipe = plan.recipe
    elif saved is not None:
        distributed.on_first(lambda: check_start(folder, start_from))
    saved = distributed.on_first(lambda: rewound(folder, saved))
    if saved is not None:
        config |= distributed.on_first(lambda: history_of(folder))
    elif start_from is not None:
        first = distributed.on_first(
            lambda: load_start(read_source(start_from), recipe, shape, stages)
        )
        config["start"] = first
    verbose = not (options.quiet or distributed.rank() > 0) and not (
        saved and saved.meta["finished"]
    )
    if verbose:
        lasting = recipe if more is None else replace(recipe, minutes=None)
        say(announce(lasting, len(dataset.train), device, options.device))
        if recipe.first.objective != VAE_OBJECTIVE and recipe.first.balance == RIVALS_BALANCE:
            say(
                f"objective {recipe.first.objective}: balance {RIVALS_BALANCE}, the squared error "
                "as published (--balance, balance=: another)"
            )
        if classes:
            say(announce_labels(recipe, classes))
        for note in dataset.notes:
            if note.startswith(CHECK_RANGE):
                warn(note)
    if plan is None:
        plan = make_plan(recipe, stages, dataset, folder, device, options, began, verbose)
    count = options.threads or plan.threads
    if verbose and count is not None:
        say(f"{count} CPU thread{'s' * (count > 1)} (--threads)")
    config |= {"recipe": to_json(plan.recipe), "threads": count}
    if saved is None:
        distributed.on_first(lambda: write_json(folder / "config.json", config))
    options = replace(options, device=str(device), quiet=options.quiet or distributed.rank() > 0)
    trained = networks_and_balances(plan.recipe, shape, vae, classes)
    if saved is None and start_from is not None:
        trained[0][0].load_state_dict(stages[0][0].state_dict())
        saved = Saved(start_of_second(stages), BEGINNING)
    return Job(folder, plan.recipe, config, dataset, trained, options, saved, count, callbacks)


def continued(
    folder: Path,
    more: More,
    plan: Plan,
    stages: list[tuple[VAE | Flow, Balance]],
    dataset: Dataset,
    device: torch.device,
    options: Options,
    began: float,
    saved: Saved | None,
) -> Plan:
    """Return the plan of a continued run, and write its new lengths to config.json.

    If the continuation has begun before, its plan is returned.

    Args:
        folder, stages, dataset, device, options, began: see `prepare`.
        more: how much longer.
        plan: of the run so far.
        saved: its newest checkpoint.

    Raises:
        InputError: the run is not finished, or the time is too short.
    """
    if distributed.on_first(lambda: is_begun(folder, saved, more)):
        return plan
    assert saved is not None
    step = steps_of_first(folder, saved)
    old, num_images = plan.recipe, len(dataset.train)
    if more.epochs is not None:
        new = longer(old, more.epochs, step, num_images)
    else:
        new = longer_by_time(
            old,
            more.minutes or 0,
            step,
            stages,
            dataset,
            folder,
            device,
            options,
            plan.threads,
            began,
        )
    entry = distributed.on_first(lambda: record(folder, more, old, new, step, num_images))
    if not (options.quiet or distributed.rank() > 0):
        say(in_words(entry, old, new, num_images))
    written = read_config(folder) if distributed.rank() == 0 else {}
    written |= {"recipe": to_json(new), "continued": [*written.get("continued", []), entry]}
    distributed.on_first(lambda: write_json(folder / "config.json", written))
    return plan._replace(recipe=new)


def networks_and_balances(
    recipe: Recipe, shape: list[int], vae: VAE | None, classes: int
) -> list[tuple[VAE | Flow, Balance]]:
    """Return network and balance of each stage.

    Args:
        recipe: settings.
        shape: channels, height, width of the images.
        vae: a network of your own for stage 1, or None.
        classes: number of classes of the images. 0: no labels.
    """
    first = first_stage(recipe, shape, vae)
    stages: list[tuple[VAE | Flow, Balance]] = [(first, stage_balance(recipe.first, recipe, shape))]
    if recipe.second is not None:
        second = second_stage(recipe, first, classes)
        stages.append((second, stage_balance(recipe.second, recipe, shape)))
    return stages


def announce_labels(recipe: Recipe, classes: int) -> str:
    """Return one line that says what learns the classes."""
    learned = "the flow and the mixture learn them"
    if recipe.second_stage != "flow":
        learned = (
            "the mixture learns them; a second VAE takes no label, a flow does (--second flow)"
        )
    return f"labels: {classes} classes; {learned}"


def announce(recipe: Recipe, num_images: int, device: torch.device, asked: str) -> str:
    """Return one line about the run: number of images, length and device.

    Args:
        recipe, num_images, device: of the run.
        asked: the device as the user gave it.
    """
    counts = [stage.total_steps(num_images) for stage in recipe.stages]
    lengths = [f"{steps:,} step{'s' * (steps != 1)}" for steps in counts]
    length = " + ".join(lengths) if recipe.minutes is None else f"{recipe.minutes:g} minutes"
    where = (
        str(device)
        if distributed.ranks() == 1
        else f"{distributed.ranks()} processes ({device.type})"
    )
    where += " (no GPU found)" if asked == "auto" and device.type == "cpu" else ""
    return f"{recipe.name}: {num_images:,} training images, {length} on {where}"


def resolve(images: Any, recipe: str | Recipe | None, vae: VAE | None) -> Recipe:
    """Return the recipe with its data source filled in.

    With a network of your own, the network's kind is "custom".
    """
    if not isinstance(recipe, Recipe):
        name = images if isinstance(images, str) else None
        if isinstance(images, Dataset):
            name = _source_again(images)
        recipe = find_recipe(recipe or ("digits" if images is None else None), name)
    if vae is not None:
        recipe = replace(recipe, network=replace(recipe.network, kind="custom", hidden=()))
    return replace(recipe, data=replace(recipe.data, source=source_of(images, recipe)))


OF_FIRST_NETWORK = ("network", "latent_dim", "latent_channels")  # settings
PLACEHOLDERS = ("images", "array")  # sources of recipes that have no data of their own


def source_of(images: Any, recipe: Recipe) -> str:
    """Return the data source for config.json: a name, an absolute path, a Hub id, or "array".

    Raises:
        InputError: no images are given and the recipe has none of its own.
    """
    own = recipe.data.source
    if isinstance(images, Dataset):
        return own if _is_source(own, images) else _source_again(images)
    if images is None:
        if own not in DATA_SETS:
            raise InputError(
                f"recipe {recipe.name!r} has no data of its own: give a folder, an array or a name"
            )
        return own
    if not isinstance(images, (str, Path)):
        return "array"
    if images == recipe.name and own in DATA_SETS:
        return own
    named = isinstance(images, str) and (images in DATA_SETS or not Path(images).exists())
    return str(images) if named else str(Path(images).resolve())


def _is_source(source: str, dataset: Dataset) -> bool:
    """Return whether a recipe's source may be that of a data set. Its own words may differ."""
    if source in DATA_SETS:
        return source == dataset.name
    place = Path(dataset.source)
    if Path(source).is_absolute() and place.exists():
        return place.resolve().is_relative_to(Path(source).resolve())
    return source not in PLACEHOLDERS


def _source_again(dataset: Dataset) -> str:
    """Return the source that a data set can be read from again, or "array"."""
    if Path(dataset.source).exists():
        return str(Path(dataset.source).resolve())
    if dataset.source.startswith("hf:"):
        return dataset.source
    return dataset.name if dataset.name in DATA_SETS else "array"


def finish(run: Run, dataset: Dataset, meta: dict[str, Any], *, quiet: bool) -> None:
    """Write what a finished run has: mixture, scale of latents, pictures, curves, summary.json.

    Args:
        run: the run, finished but for this.
        dataset: its data.
        meta: plain values of its checkpoint.
        quiet: leave out a note on pictures that need an extra.
    """
    run.save_mixture()
    write_json(run.folder / "latents.json", asdict(run.latent_scale))
    test = gather(dataset.test, drawn(len(dataset.test), PAIRS))
    reconstructed, samples = run.reconstruct(test), run.sample(PICTURES, seed=run.recipe.seed)
    pairs = torch.stack([test, reconstructed], 1).flatten(0, 1)
    save_png(run.folder / "reconstructions.png", grid(pairs, columns=8))
    save_png(run.folder / "samples.png", grid(samples, columns=8))
    try:
        write_file(run.folder / "training.png", plots.training_curves(run.folder / "metrics.jsonl"))
    except MissingExtraError as error:
        if not quiet:
            say(f"note: {error}")
    except InputError as error:  # the log is lost, the model is not
        warn(f"{error}; training.png is left out")
    figures = {
        "train_images": len(dataset.train),
        "seconds": round(meta["seconds"], 1),
        "device": str(run.device),
    }
    (run.folder / "evaluation.json").unlink(missing_ok=True)  # of weights before the last ones
    evaluation = run.evaluate(dataset.test, extractor="none")
    lines, validated = list(evaluation.notes), meta.get("validation")
    if validated:
        figures |= {"validation": validated}
        lines += [overfitting(validated)] if validated["overfitting"] else []
    if len(dataset.train) <= SMALL_SET:
        flips = run.recipe.data.flips
        copied = copies_note(samples, reconstructed, dataset.train, run.device, mirrored=flips)
        lines += [copied] if copied else []
    write_json(run.folder / "summary.json", figures | evaluation.to_json() | {"notes": lines})
