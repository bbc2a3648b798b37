"""The main job: images -> stage 1 -> codes -> stage 2 -> pictures and figures, in a folder, resumed if it was interrupted."""

import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch

from poise import plots
from poise.balance import Balance
from poise.build import choose_device, first_stage, second_stage, stage_balance
from poise.checkpoint import (
    Saved,
    checkpoints,
    newest_checkpoint,
    read_folder,
    save_checkpoint,
    write_folder,
)
from poise.datasets import NAMES, Dataset, gather
from poise.errors import InputError, Interrupted, MissingExtraError, RunError
from poise.files import write_failure, write_file, write_json
from poise.images import grid, save_png
from poise.latent import DiagonalGaussian
from poise.metrics import encode_all, pixel_std
from poise.recipes import find_recipe
from poise.recipes.settings import Changes, Recipe, Stage, to_json
from poise.run import Run, load, read_config, read_data
from poise.training import (
    Batches,
    CodeBatches,
    ImageBatches,
    TrainingState,
    Watch,
    count_latents,
    fit,
    new_state,
    restore_state,
    state_tensors,
    under,
)
from poise.vae import VAE

PICTURES = 64
PAIRS = 32


@dataclass(frozen=True)
class Options:
    """What surrounds a run and is none of its settings.

    Attributes:
        device: "auto", "cpu", "cuda", ... Each kind of device draws other noise from a seed: numbers differ in the way
            that those of two seeds do.
        save_seconds: time between checkpoints.
        tensorboard: write TensorBoard files into the run's folder.
        quiet: no progress display.
    """

    device: str = "auto"
    save_seconds: float = 60.0
    tensorboard: bool = False
    quiet: bool = False

    def __post_init__(self) -> None:
        if not self.save_seconds >= 0:
            raise InputError(f"save_seconds must be at least 0, not {self.save_seconds}")


def train(
    images: Any = None,
    *,
    recipe: str | Recipe | None = None,
    out: str | Path | None = None,
    vae: VAE | None = None,
    options: Options = Options(),
    **changes: Any,
) -> Run:
    """Train both stages and return the run. Called again with the same arguments, it goes on where it stopped.

    Args:
        images: uint8 or float-in-[0, 1] array or tensor (n, h, w), (n, h, w, c) or (n, c, h, w); or a path; or a data set's
            name; or hf:owner/name. None: the recipe's own, and without a recipe the digits.
        recipe: a name or a `Recipe`; None: the data set's own, or "images" for anything else.
        out: the run's folder; None: runs/ and the recipe's name.
        vae: a network of your own in place of the recipe's.
        options: device, checkpoints, display.
        changes: of the recipe, by the names of the command's options: epochs, second_epochs, batch_size, learning_rate,
            latent_dim, network, balance, size, seed, ... (see `recipes.settings.Changes`).

    Raises:
        InputError: the data, the recipe or the folder cannot be used.
        RunError: the loss is not finite, or the disk or the device's memory is full.
        Interrupted: Ctrl-C or SIGTERM; the state is saved.

    Example:
        >>> run = poise.train("digits", out="runs/digits")                  # doctest: +SKIP
        >>> run.sample(64, prior="second-stage", seed=0).shape              # doctest: +SKIP
        torch.Size([64, 1, 8, 8])
    """
    unknown = set(changes) - {field.name for field in fields(Changes)}
    if unknown:
        known = ", ".join(field.name for field in fields(Changes))
        raise InputError(f"train has no setting {', '.join(sorted(unknown))}; a recipe's are {known}")
    recipe = Changes(**changes).apply(resolve(images, recipe, vae))
    folder = Path(out or Path("runs") / recipe.name)
    device = choose_device(options.device)
    if options.tensorboard and find_spec("tensorboard") is None:
        raise MissingExtraError("TensorBoard", "track")
    with locked(folder):
        dataset = read_data(recipe.data, images if recipe.data.source == "array" else None, folder / "cache")
        if vae is not None:
            num_latents = count_latents(vae, ImageBatches(dataset.train, next(vae.parameters()).device))
            recipe = replace(recipe, network=replace(recipe.network, latent_dim=num_latents))
        network = vae or first_stage(recipe, list(dataset.shape))  # what it cannot take is said before anything is written
        balances = [stage_balance(stage, recipe, list(dataset.shape)) for stage in (recipe.first, recipe.second) if stage]
        saved = open_folder(folder, recipe, dataset)
        job = Job(folder, recipe, dataset, device, options, saved)
        if not job.meta["finished"]:
            if not options.quiet:
                print(announce(recipe, len(dataset.train), device), file=sys.stderr)
            with stop_signals() as stop:
                job.run_stages(network, balances, stop)
        if not (folder / "summary.json").exists():
            finish(load(folder, device=options.device, vae=vae), dataset, job.meta["seconds"])
    return load(folder, device=options.device, vae=vae)


def announce(recipe: Recipe, num_images: int, device: torch.device) -> str:
    """What is about to be done, and what it costs where that is known."""
    lengths = [f"{stage.total_steps(num_images):,} steps" for stage in (recipe.first, recipe.second) if stage]
    cost = f" ({recipe.cost})" if recipe.cost else ""
    return f"{recipe.name}: {num_images:,} training images, {' + '.join(lengths)} on {device}{cost}"


def resolve(images: Any, recipe: str | Recipe | None, vae: VAE | None) -> Recipe:
    """The complete settings: a recipe with its source, and with the kind "custom" for a network of the user's own."""
    if not isinstance(recipe, Recipe):
        recipe = find_recipe(recipe or ("digits" if images is None else None), images if isinstance(images, str) else None)
    if vae is not None:
        recipe = replace(recipe, network=replace(recipe.network, kind="custom", hidden=()))
    return replace(recipe, data=replace(recipe.data, source=source_of(images, recipe)))


def source_of(images: Any, recipe: Recipe) -> str:
    """What config.json calls the data: a name, an absolute path, a Hub id, or "array"."""
    own = recipe.data.source
    if images is None:
        if own not in NAMES:
            raise InputError(f"recipe {recipe.name!r} has no data of its own: give a folder, an array or a name")
        return own
    if not isinstance(images, (str, Path)):
        return "array"
    if images == recipe.name and own in NAMES:
        return own
    named = images in NAMES or not Path(images).exists()
    return str(images) if named else str(Path(images).resolve())


def open_folder(folder: Path, recipe: Recipe, dataset: Dataset) -> Saved | None:
    """Prepare a new folder (None), or find where an earlier run of the same settings and data stopped.

    Raises:
        InputError: the folder holds something else, or a run of other settings or data.
        RunError: every checkpoint is damaged.
    """
    settings, data = to_json(recipe), describe(dataset)
    for torn in folder.glob(".writing-*"):  # left by a process that was killed
        shutil.rmtree(torn) if torn.is_dir() else torn.unlink()
    is_run = (folder / "config.json").exists()
    if not is_run and any(path.name != "cache" and not path.name.startswith(".") for path in folder.iterdir()):
        raise InputError(f"{folder} is not empty and is not a run's folder: choose another --out")
    if not is_run or not checkpoints(folder / "checkpoints"):  # nothing of an earlier run to protect
        versions = {"poise": version("poise"), "torch": torch.__version__, "python": sys.version.split()[0]}
        write_json(folder / "config.json", {"poise": 1, "recipe": settings, "data": data, "versions": versions})
        return None
    earlier = read_config(folder)
    if earlier["data"]["checksum"] == data["checksum"]:
        earlier["recipe"]["data"]["source"] = settings["data"]["source"]  # the same images, wherever they lie now
    differing = differences(earlier["recipe"], json.loads(json.dumps(settings)))
    if earlier["data"]["checksum"] != data["checksum"]:
        differing.append("the images themselves")
    if differing:
        raise InputError(f"{folder} holds a run with other settings ({'; '.join(differing)}): choose another --out")
    saved, complaints = newest_checkpoint(folder / "checkpoints")
    for line in complaints:
        print(f"poise: warning: {line}; using the one before", file=sys.stderr)
    return saved


def describe(dataset: Dataset) -> dict[str, Any]:
    """What config.json says of the data."""
    return {
        "source": dataset.source,
        "shape": list(dataset.shape),
        "train": len(dataset.train),
        "test": len(dataset.test),
        "checksum": dataset.checksum,
        "pixel_std": pixel_std(dataset.train),
        "notes": list(dataset.notes),
    }


def differences(earlier: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """Settings that differ, each as "name: was -> is"."""
    lines: list[str] = []
    for key in sorted(set(earlier) | set(now)):
        was, new = earlier.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(new, dict):
            lines += differences(was, new, f"{where}{key}.")
        elif was != new:
            lines.append(f"{where}{key}: {was} -> {new}")
    return lines


class Job:
    """Both stages of one run, from wherever it stands."""

    def __init__(
        self, folder: Path, recipe: Recipe, dataset: Dataset, device: torch.device, options: Options, saved: Saved | None
    ) -> None:
        self.folder, self.recipe, self.dataset, self.device, self.options = folder, recipe, dataset, device, options
        self.meta = saved.meta if saved else {"stage": 1, "step": 0, "seconds": 0.0, "finished": False}
        self.tensors = saved.tensors if saved else {}
        self.seconds: float = self.meta["seconds"]
        self._began = time.monotonic()

    def run_stages(self, vae: VAE, balances: list[Balance], stop: Callable[[], bool]) -> None:
        """Train what is left of stage 1 and stage 2.

        Raises:
            Interrupted: `stop` asked for it; the state is saved.
        """
        with closing(Log(self.folder, self.meta["stage"], self.meta["step"], tensorboard=self.options.tensorboard)) as log:
            images = ImageBatches(self.dataset.train, self.device)
            first = self._stage(1, vae, balances[0], images, log, stop)
            codes = self._codes(first)
            if self.recipe.second is not None:
                data = CodeBatches(codes.mean, codes.logvar, self.device)
                second = self._stage(2, second_stage(self.recipe), balances[1], data, log, stop)
                self._keep(2, second, over=True)
                self._write(stage=2, step=second.step, finished=True)

    def _stage(
        self, number: int, vae: VAE, balance: Balance, data: Batches, log: "Log", stop: Callable[[], bool]
    ) -> TrainingState:
        stage = self._settings(number)
        state = new_state(vae, balance, stage, self.device)
        mine = under(f"stage{number}", self.tensors)
        if "step" in mine:
            restore_state(state, mine)
        if self.meta["stage"] > number:
            return state
        watch = Watch(log.write, lambda s: self._save(number, s), stop, self.options.save_seconds, self.options.quiet)
        if not fit(state, data, stage, number=number, seed=self.recipe.seed, watch=watch):
            raise Interrupted(f"stopped at step {state.step} of stage {number}, and saved: run the same command to go on")
        return state

    def _settings(self, number: int) -> Stage:
        stage = self.recipe.first if number == 1 else self.recipe.second
        assert stage is not None
        return stage

    def _codes(self, first: TrainingState) -> DiagonalGaussian:
        """The training images' posteriors; where they are computed, stage 1 is over."""
        folder = self.folder / "codes"
        if self.meta["stage"] == 2:
            try:
                tensors = read_folder(folder).tensors
                return DiagonalGaussian(tensors["mean"], tensors["logvar"])
            except RunError as error:
                print(f"poise: warning: {error}; computing the codes again", file=sys.stderr)
        codes = encode_all(first.trained, self.dataset.train)
        write_folder(folder, {"mean": codes.mean, "logvar": codes.logvar}, {"images": len(codes.mean)})
        if self.meta["stage"] == 1:
            self._keep(1, first, over=True)
            self._write(stage=2, step=0, finished=self.recipe.second is None)
        return codes

    def _keep(self, number: int, state: TrainingState, *, over: bool = False) -> None:
        """Replace what is held of a stage by its present state; without the optimiser's if the stage is over."""
        mine = {name: tensor for name, tensor in state_tensors(state).items() if not (over and name.startswith("optimizer."))}
        others = {name: tensor for name, tensor in self.tensors.items() if not name.startswith(f"stage{number}.")}
        self.tensors = others | {f"stage{number}.{name}": tensor for name, tensor in mine.items()}

    def _save(self, number: int, state: TrainingState) -> None:
        self._keep(number, state)
        self._write(stage=number, step=state.step, finished=False)

    def _write(self, *, stage: int, step: int, finished: bool) -> None:
        seconds = self.seconds + time.monotonic() - self._began
        self.meta = {"stage": stage, "step": step, "seconds": seconds, "finished": finished}
        before = self.recipe.first.total_steps(len(self.dataset.train)) if stage == 2 else 0
        save_checkpoint(self.folder / "checkpoints", before + step, self.tensors, self.meta)


class Log:
    """metrics.jsonl, and TensorBoard's files where asked for; what lies after the position resumed from is dropped."""

    def __init__(self, folder: Path, stage: int, step: int, *, tensorboard: bool) -> None:
        path = folder / "metrics.jsonl"
        kept = [line for line in _entries(path) if (line["stage"], line["step"]) <= (stage, step)]
        write_file(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
        self._file = open(path, "a", encoding="utf-8")
        self._boards = _tensorboards(folder / "tensorboard", {stage: step}) if tensorboard else {}

    def write(self, entry: dict[str, float]) -> None:
        """Add an entry.

        Raises:
            RunError: the disk is full.
        """
        try:
            print(json.dumps(entry), file=self._file, flush=True)
        except OSError as error:
            raise write_failure(Path(self._file.name), error) from error
        if self._boards:
            for name in set(entry) - {"stage", "step"}:
                self._boards[int(entry["stage"])].add_scalar(name, entry[name], int(entry["step"]))

    def close(self) -> None:
        with suppress(OSError):  # a full disk was reported when the entry was written
            self._file.close()
        for board in self._boards.values():
            board.close()


def _entries(path: Path) -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            entries.append(json.loads(line))
        except ValueError:
            break  # torn by a kill; what follows a checkpoint is logged again
    return entries


def _tensorboards(folder: Path, resumed: dict[int, int]) -> dict[int, Any]:
    """One writer for each stage; in the stage that is resumed, later steps are purged."""
    from torch.utils.tensorboard import SummaryWriter

    purged = {stage: resumed[stage] + 1 if stage in resumed else None for stage in (1, 2)}
    return {stage: SummaryWriter(str(folder / f"stage{stage}"), purge_step=step) for stage, step in purged.items()}


def finish(run: Run, dataset: Dataset, seconds: float) -> None:
    """Write the pictures, the curves and the figures of a finished run."""
    test = gather(dataset.test, range(min(PAIRS, len(dataset.test))))
    pairs = torch.stack([test, run.reconstruct(test)], 1).flatten(0, 1)
    save_png(run.folder / "reconstructions.png", grid(pairs, columns=8))
    save_png(run.folder / "samples.png", grid(run.sample(PICTURES, seed=run.recipe.seed), columns=8))
    write_file(run.folder / "training.png", plots.training_curves(run.folder / "metrics.jsonl"))
    figures = {"train_images": len(dataset.train), "seconds": round(seconds, 1), "device": str(run.device)}
    write_json(run.folder / "summary.json", figures | run.evaluate(dataset.test, extractor="none").pages)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Inside the block, a first Ctrl-C or SIGTERM only sets what the yielded function tells; a second acts at once."""
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        asked.append(number)
        signal.signal(number, before[signal.Signals(number)])

    for known in before:
        signal.signal(known, handle)
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder, made if need be, against a second process; a folder left empty is removed.

    Raises:
        InputError: another process is training there, or the folder cannot be made.
    """
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")
    except OSError as error:
        raise InputError(f"cannot use {folder} for the run: {error.strerror or error}") from None
    with file:
        _hold(file, folder)
        try:
            yield
        finally:
            if list(folder.iterdir()) == [lock]:
                lock.unlink()
                folder.rmdir()


def _hold(file: IO[str], folder: Path) -> None:
    if os.name != "posix":  # no advisory locks there
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"{folder}: another process is training there") from None
