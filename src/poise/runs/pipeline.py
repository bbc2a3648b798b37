"""Train both stages in a folder: images -> stage 1 -> codes -> stage 2 -> pictures and figures.

Interrupted training continues from the newest checkpoint.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from poise.balance import Balance
from poise.data import Dataset, gather, hold_out
from poise.data.decoding import grid, save_png
from poise.data.loading import CHECK_RANGE
from poise.errors import InputError, Interrupted, MissingExtraError, RunError
from poise.flow import Flow
from poise.latent import DiagonalGaussian
from poise.metrics import encode_all
from poise.metrics.copies import copies_note
from poise.objectives import make_objective
from poise.priors import TrainedModel, make_prior
from poise.recipes import find_recipe
from poise.recipes.settings import (
    RIVALS_BALANCE,
    VAE_OBJECTIVE,
    Changes,
    Recipe,
    Stage,
    to_json,
)
from poise.runs import plots
from poise.runs.build import (
    check_specs,
    first_stage,
    second_stage,
    stage_balance,
    with_latents_counted,
)
from poise.runs.callbacks import Callback, Callbacks, TensorBoard
from poise.runs.checkpoint import (
    Saved,
    fitting,
    read_code_tensors,
    save_checkpoint,
    write_folder,
)
from poise.runs.continuing import (
    LAST,
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
from poise.runs.growth import COLUMNS, FLOW_STEPS, ProgressPicture
from poise.runs.log import Log
from poise.runs.options import Options
from poise.runs.run import Run, load
from poise.runs.starting import check_start, load_start, read_source, recipe_of, start_of_second
from poise.runs.timing import PICTURES, Plan, earlier_plan, longer_by_time, make_plan
from poise.runs.validation import Validation, check_elbo, overfitting
from poise.shapes import Images
from poise.support.files import write_file, write_json
from poise.support.guards import locked, stop_signals
from poise.support.progress import say, warn
from poise.support.seeds import drawn
from poise.training import (
    Batches,
    CodeBatches,
    Engine,
    ImageBatches,
    TrainingState,
    Watch,
    check_weights,
    choose_engine,
    denormals_as_zero,
    distributed,
    fit,
    new_state,
    restore_state,
    state_tensors,
    threads,
    under,
)
from poise.training.machine import choose_device
from poise.vae import VAE, latents_of
from poise.variants import DATA_SETS, default_prior, find_prior

PAIRS = 32
SMALL_SET = 10_000  # training images: samples of more are not compared with them
BEGINNING: dict[str, Any] = {"stage": 1, "step": 0, "seconds": 0.0, "finished": False}
KEPT_META = ("continued", "validation")  # plain values that later checkpoints keep


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
) -> "Job":
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


class Job:
    """Trains both stages of a run, from the position where it stopped. Only rank 0 writes files.

    Args:
        folder, recipe, config, dataset: of the run.
        stages: network and balance of each stage.
        options: options, with the device of this process.
        saved: checkpoint to resume from, or None.
        threads: number of CPU threads. None: see `poise.training.usual_threads`.
        callbacks: the user's.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        config: dict[str, Any],
        dataset: Dataset,
        stages: list[tuple[VAE | Flow, Balance]],
        options: Options,
        saved: Saved | None,
        threads: int | None,
        callbacks: Callbacks,
    ) -> None:
        self.threads, self.callbacks = threads, callbacks
        self.folder, self.recipe, self.config, self.dataset = folder, recipe, config, dataset
        self.stages, self.options, self.device = stages, options, torch.device(options.device)
        saved = saved or Saved({}, BEGINNING)
        self.tensors: dict[str, Tensor] = saved.tensors
        self.meta: dict[str, Any] = saved.meta
        if start := under("start", self.tensors):
            with fitting(folder, 2):
                stages[1][0].load_state_dict(start)
        self.seconds: float = self.meta["seconds"]
        self._began = time.monotonic()
        self._write_log: Callable[[dict[str, float]], None] = lambda entry: None
        self._states: list[TrainingState[Any]] = []
        self._validation: Validation | None = None
        self._due: list[tuple[Any, ...]] = []  # calls of callbacks, once log and picture are done
        self._picture: ProgressPicture | None = None

    def run_stages(self, stop: Callable[[], bool]) -> None:
        """Train the rest of stage 1 and stage 2.

        Args:
            stop: training stops when it returns True.

        Raises:
            Interrupted: `stop` returned True. The state is saved.
        """
        with ExitStack() as files:
            place = self.meta["stage"], self.meta["step"]
            if distributed.rank() == 0:
                log = Log(self.folder, *place)
                self._write_log = files.enter_context(closing(log)).write
                self._use_engine(self.config["engine"])
                self._picture = self._begin_picture()
            files.callback(self.callbacks.call, "on_end")
            self.callbacks.call("on_start", self.folder, self.recipe, *place)
            images = ImageBatches(self.dataset.train, self.device, flips=self.recipe.data.flips)
            first = self._stage(1, images, stop)
            codes, mirrored = self._codes(first)
            if place[0] == 1:
                self.callbacks.call("on_stage_end", 1, first.step, first.trained)
            if self.recipe.second is not None:
                network = self.stages[1][0]
                labels = self._labels
                if isinstance(network, Flow):
                    network.set_statistics(codes, labels)
                else:
                    labels = None
                data = CodeBatches(
                    codes.mean, codes.logvar, self.device, mirrored=mirrored, labels=labels
                )
                second = self._stage(2, data, stop)
                self._keep(2, second, over=True)
                self._write(stage=2, step=second.step, finished=True)
                self.callbacks.call("on_stage_end", 2, second.step, second.trained)

    @property
    def _labels(self) -> Tensor | None:
        """The class of each training image, (n,)."""
        labels = self.dataset.labels
        return None if labels is None else torch.from_numpy(labels.train)

    def _stage(self, number: int, data: Batches, stop: Callable[[], bool]) -> TrainingState[Any]:
        stage, (network, balance) = self.recipe.stages[number - 1], self.stages[number - 1]
        state: TrainingState[Any] = new_state(network, balance, stage, self.device)
        self._states.append(state)
        mine = under(f"stage{number}", self.tensors)
        if "step" in mine:
            with fitting(self.folder, number):
                restore_state(state, mine)
        if self.meta["stage"] > number:
            return state
        validation = self._begin_validation(stage, mine) if number == 1 else None
        if validation is not None and validation.ends():  # an error stopped it in this very step
            return state
        self.callbacks.stopped = False
        fell_back = self._use_eager_steps if self.options.engine == "auto" else None
        watch = Watch(
            self._log,
            lambda s: self._save(number, s),
            stop,
            fell_back,
            self.options.save_seconds,
            self.options.quiet,
            lambda s, tenth: self._show(number, s, tenth),
            validation.measure if validation else lambda s: {},
            lambda: self._ends(number, state, validation),
        )
        how: dict[str, Any] = {
            "number": number,
            "seed": self.recipe.seed,
            "engine": self.config["engine"],
        }
        if not fit(state, data, stage, watch=watch, threads=self.threads, **how):
            # Wait until rank 0 has saved: torchrun kills it if another process ends first.
            distributed.wait()
            raise Interrupted(
                f"stopped at step {state.step} of stage {number}, and saved: "
                "run the same command to go on"
            )
        return state

    def _begin_validation(self, stage: Stage, saved: dict[str, Tensor]) -> Validation | None:
        if self.recipe.data.validation is not None:
            best = under("best", saved)
            self._validation = Validation(self.dataset, stage, self.recipe.seed, best)
        return self._validation

    def _log(self, entry: dict[str, float]) -> None:
        self._write_log(entry)
        self._due.append(("on_log", entry))

    def _ends(self, number: int, state: TrainingState, validation: Validation | None) -> bool:
        due, self._due = self._due, []
        for name, *values in due:
            self._call(name, *values, number=number, state=state)
        return self.callbacks.ends() or (validation is not None and validation.ends())

    def _call(self, name: str, *values: Any, number: int, state: TrainingState) -> None:
        """Call the callbacks; if one raises an error, save the state first."""

        def save() -> str:
            self._save(number, state)
            return f"the run is saved at step {state.step} of stage {number}"

        self.callbacks.call(name, *values, save=save)

    def _begin_picture(self) -> ProgressPicture:
        number, step = self.meta["stage"], self.meta["step"]
        steps = self.recipe.stages[number - 1].total_steps(len(self.dataset.train))
        began = [entry["step"] for entry in self.config.get("continued", [])[-1:]]
        whole = self.recipe.first.total_steps(len(self.dataset.train))
        names = [default_prior(kind) for kind in (None, self.recipe.second_stage)]
        return ProgressPicture(
            self.folder / "progress.png",
            gather(self.dataset.test, drawn(len(self.dataset.test), COLUMNS)),
            seed=self.recipe.seed,
            priors=[find_prior(name).words for name in names[: len(self.stages)]],
            shown=(number, 10 * step // steps) if step or number > 1 else None,
            skipped=10 * began[0] // whole if began else 0,
        )

    def _show(self, number: int, state: TrainingState[Any], tenth: int) -> None:
        """Add a row to the picture: samples from the prior of this stage."""
        if self._picture is None:  # of rank 0 only
            return
        kind = self.recipe.second_stage if number == 2 else None
        first, generation = self._states[0].trained, self.recipe.generation
        model = TrainedModel(
            self.recipe.network.latent_dim,
            lambda: encode_all(first, self.dataset.train),
            second=state.trained if kind else None,
            gamma2=state.balance.gamma2 if kind and generation.second_stage_noise else None,
            generation=replace(generation, flow_steps=min(generation.flow_steps, FLOW_STEPS)),
            device=self.device,
        )
        prior = make_prior(default_prior(kind), model)
        samples = self._picture.add(number, tenth, first, prior)
        if self.callbacks:
            shown = samples.float().clamp(0, 1).cpu()
            self._due.append(("on_samples", number, state.step, shown))

    def _use_eager_steps(self, reason: str) -> None:
        warn(f"steps cannot be recorded as a CUDA graph ({reason}); taking them one by one")
        self._use_engine("eager")

    def _use_engine(self, engine: Engine) -> None:
        """Use an engine from the next step on, and write its name to config.json."""
        self.config["engine"] = engine
        written = read_config(self.folder)
        if written.get("engine") != engine:
            write_json(self.folder / "config.json", written | {"engine": engine})

    def _codes(self, first: TrainingState[VAE]) -> tuple[DiagonalGaussian, DiagonalGaussian | None]:
        """Return the posteriors of the training images, and mark stage 1 as finished.

        The posteriors are read from the folder if they are there. The second value are those of the
        mirrored images, if the run trains on them.

        If images are held out, the best weights of stage 1 replace the last ones.
        """
        validated = None
        if self.meta["stage"] == 1:
            distributed.on_first(lambda: self._keep_last(first))
            if self._validation is not None:
                validated = self._validation.outcome(first)
                self._validation.restore(first)
        codes = distributed.on_first(
            lambda: self._read_codes() or self._compute_codes(first.trained)
        )
        if self.meta["stage"] == 1:
            latents = latents_of(first.trained)
            if latents is not None:  # rank 0 has set the map
                latents.load_state_dict(distributed.on_first(latents.state_dict))
            self._keep(1, first, over=True)
            self.meta = self.meta | {"validation": validated}
            self._write(stage=2, step=0, finished=self.recipe.second is None)
        plain = DiagonalGaussian(codes["mean"], codes["logvar"])
        if not self.recipe.data.flips:
            return plain, None
        return plain, DiagonalGaussian(codes["mirrored_mean"], codes["mirrored_logvar"])

    def _read_codes(self) -> dict[str, Tensor] | None:
        if self.meta["stage"] == 1:
            return None
        try:
            return read_code_tensors(
                self.folder / "codes",
                len(self.dataset.train),
                self.recipe.network.latent_dim,
                mirrored=self.recipe.data.flips,
            )
        except RunError as error:
            warn(f"{error}; computing the codes again")
            return None

    def _compute_codes(self, vae: VAE) -> dict[str, Tensor]:
        codes = encode_all(vae, self.dataset.train)
        latents = latents_of(vae)
        if latents is not None and self.meta["stage"] == 1:
            codes = latents.fit(codes)
        tensors = {"mean": codes.mean, "logvar": codes.logvar}
        if self.recipe.data.flips:
            encoder = nn.Sequential(Mirror(), vae.encoder)
            codes = encode_all(VAE(encoder, vae.decoder), self.dataset.train)
            tensors |= {"mirrored_mean": codes.mean, "mirrored_logvar": codes.logvar}
        labels = {} if self._labels is None else {"labels": self._labels}
        write_folder(self.folder / "codes", tensors | labels, {"images": len(codes.mean)})
        return tensors

    def _keep_last(self, first: TrainingState[VAE]) -> None:
        """Write the state at the end of stage 1, from which a longer training goes on."""
        write_folder(self.folder / LAST, self._all_tensors(1, first), {"step": first.step})

    def _all_tensors(self, number: int, state: TrainingState) -> dict[str, Tensor]:
        tensors = state_tensors(state)
        if number == 1 and self._validation is not None:
            best = self._validation.tensors()
            tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
        return tensors

    def _keep(self, number: int, state: TrainingState, *, over: bool = False) -> None:
        """Replace the kept tensors of a stage by its present state.

        If the stage is over, the state of the optimizer and earlier weights are dropped.

        Raises:
            RunError: a weight is not finite.
        """
        check_weights(state, self.recipe.stages[number - 1], number)
        mine = {
            name: tensor
            for name, tensor in self._all_tensors(number, state).items()
            if not (over and name.startswith(("optimizer.", "best.")))
        }
        others = {
            name: tensor
            for name, tensor in self.tensors.items()
            if not name.startswith(f"stage{number}.")
        }
        self.tensors = others | {f"stage{number}.{name}": tensor for name, tensor in mine.items()}

    def _save(self, number: int, state: TrainingState) -> None:
        self._keep(number, state)
        self._write(stage=number, step=state.step, finished=False)

    def _write(self, *, stage: int, step: int, finished: bool) -> None:
        seconds = self.seconds + time.monotonic() - self._began
        kept = {name: self.meta[name] for name in KEPT_META if self.meta.get(name)}
        self.meta = {"stage": stage, "step": step, "seconds": seconds, "finished": finished} | kept
        before = self.recipe.first.total_steps(len(self.dataset.train)) if stage == 2 else 0
        if self._picture is not None:
            self._picture.write()  # a checkpoint has all rows up to its step
        if distributed.rank() == 0:
            save_checkpoint(self.folder / "checkpoints", before + step, self.tensors, self.meta)


class Mirror(nn.Module):
    """Mirror images left to right."""

    def forward(self, images: Images) -> Images:
        return images.flip(3)


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
