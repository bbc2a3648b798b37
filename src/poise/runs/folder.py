"""The folder of a run: config.json, and whether a run can continue there."""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch

from poise.data import Dataset, hold_out
from poise.data import load as load_data
from poise.data.decoding import DEEP
from poise.data.listing import is_config, is_run
from poise.errors import InputError, MissingInputError
from poise.metrics import pixel_std
from poise.recipes.settings import Data, Recipe, from_json, to_json
from poise.runs.checkpoint import (
    Saved,
    checkpoints,
    newest_intact_checkpoint,
)
from poise.support.files import convert, read_json, remove
from poise.support.progress import warn
from poise.support.version import __version__
from poise.training import (
    Engine,
)


def open_folder(folder: Path, config: dict[str, Any]) -> Saved | None:
    """Check that a run can start or continue in a folder, and return its newest checkpoint.

    Args:
        folder: folder of the run.
        config: settings and data of the run that starts now, see `config_to_write`.

    Returns:
        The newest intact checkpoint. None: the folder holds no checkpoint and may be used.

    Raises:
        InputError: the folder holds other files, or a run with other settings or data.
        RunError: every checkpoint is damaged.
    """
    settings, data = config["recipe"], config["data"]
    for leftover in folder.glob(".writing-*"):  # left by a killed process
        remove(leftover)
    check_place(folder)
    begun = (folder / "config.json").exists() and checkpoints(folder / "checkpoints")
    if not begun:  # no earlier run to protect
        if (folder / "summary.json").exists():
            gone = f"{folder} was finished, and its checkpoints are gone"
            warn(f"{gone}: it is trained again from the beginning")
            for name in ("summary.json", "evaluation.json", "diagnosis.json"):
                (folder / name).unlink(missing_ok=True)
        return None
    earlier = read_config(folder)
    if earlier["data"]["checksum"] == data["checksum"]:
        # Equal checksums mean the same images, even if they have moved.
        earlier["recipe"]["data"]["source"] = settings["data"]["source"]
    # Reading and writing adds settings that this version has and an older config.json lacks.
    was = to_json(from_json(Recipe, earlier["recipe"], f"{folder / 'config.json'}: recipe"))
    differing = differing_settings(*json.loads(json.dumps([was, settings])))
    if earlier["data"]["checksum"] != data["checksum"]:
        differing.append("the images themselves")
    if earlier["data"].get("labels") != data.get("labels"):
        differing.append("the labels themselves")
    if differing:
        raise InputError(
            f"{folder} holds a run with other settings ({'; '.join(differing)}): "
            "choose another --out"
        )
    saved, complaints = newest_intact_checkpoint(folder / "checkpoints")
    for line in complaints:
        warn(f"{line}; using the one before")
    return saved


def check_place(folder: Path) -> None:
    """Check that a folder is empty or holds a run. `cache` and hidden files do not count.

    Raises:
        InputError: it holds something else.
    """
    others = any(
        path.name != "cache" and not path.name.startswith(".") for path in folder.iterdir()
    )
    if others and not is_config(folder / "config.json"):
        raise InputError(f"{folder} is not empty and is not a run's folder: choose another --out")


@dataclass(frozen=True)
class Described:
    """Hold the entries of config.json about the data, as `describe` writes them."""

    source: str
    shape: tuple[int, int, int]
    train: int
    test: int
    checksum: str
    pixel_std: float
    name: str = ""
    levels: int | None = None
    notes: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    labels: str = ""
    validation: int = 0

    def __post_init__(self) -> None:
        counts = (*self.shape, self.train, *(() if self.levels is None else (self.levels,)))
        if min(counts) < 1 or min(self.test, self.validation) < 0 or self.pixel_std < 0:
            raise ValueError("a shape, a number of images or a scale is not possible")


@dataclass(frozen=True)
class Continuation:
    """Entry of config.json about one continuation of a finished run.

    Attributes:
        more_epochs, more_minutes: what was asked for; one of them is None.
        step: step of stage 1 at which it began.
        first, second: the lengths before: "epochs", "steps" and "halve_every" of each stage.
        moments: whether Adam's moments were kept, or begin at zero.
        other_rates: number of earlier steps that a run of the new length takes with other learning
            rates. 0: from here on, the run is the same as a run of the new length.
    """

    more_epochs: int | None
    more_minutes: float | None
    step: int
    first: dict[str, float | int | None]
    second: dict[str, float | int | None] | None
    moments: Literal["kept", "new"]
    other_rates: int


@dataclass(frozen=True)
class Start:
    """Entry of config.json about the run whose weights this run started from.

    Attributes:
        run: its folder.
        checkpoint: SHA-256 of its weights.
        kept: what was taken from it.
        new: what was not.
    """

    run: str
    checkpoint: str
    kept: tuple[str, ...]
    new: tuple[str, ...]


@dataclass(frozen=True)
class Config:
    """Contents of config.json."""

    poise: int
    recipe: dict[str, Any]
    data: Described
    engine: Engine = "eager"
    threads: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    start: Start | None = None
    continued: tuple[Continuation, ...] = ()


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json of a run, after a check of the types of all values.

    Raises:
        InputError: the folder is not that of a run, or config.json is damaged.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise MissingInputError(f"{folder}: no such folder; give the one that `poise train` wrote")
    try:
        config = read_json(path, dict[str, Any])
    except MissingInputError:
        raise InputError(
            f"{folder} is not a run's folder: it has no config.json; "
            "give the one that `poise train` wrote"
        ) from None
    if missing := {"poise", "recipe", "data"} - set(config):
        raise InputError(f"{path} is not a run's config: it lacks {', '.join(sorted(missing))}")
    convert(config, Config, str(path))
    from_json(Recipe, config["recipe"], f"{path}: recipe")
    return config


def read_data(
    settings: Data, images: Any = None, cache: Path | None = None, labels: Any = None
) -> Dataset:
    """Load the images that the settings name, prepare and split them as the settings say.

    Args:
        settings: source and preparation.
        images: used instead of `settings.source` if given.
        cache: folder for decoded images, see `poise.data.load`.
        labels: the labels of an array of images. None: read them if the settings say so.

    Raises:
        InputError: the images cannot be used, or their folder is that of a run.
    """
    source = settings.source if images is None else images
    if isinstance(source, (str, Path)) and is_run(Path(source)):
        raise InputError(
            f"{source} is a run, not a folder of images: poise train --out {source} continues it, "
            f"and --from {source} starts another run from its weights"
        )
    dataset = load_data(
        source,
        size=settings.size,
        channels=settings.channels,
        jpeg_quality=settings.jpeg_quality,
        file_order=settings.file_order,
        skip_unreadable=settings.skip_unreadable,
        levels=settings.levels,
        max_megapixels=settings.max_megapixels,
        stream=settings.stream,
        cache=cache,
        labels=settings.labels if labels is None else labels,
    )
    return dataset if settings.validation is None else hold_out(dataset, settings.validation)


def config_to_write(recipe: Recipe, dataset: Dataset, engine: Engine) -> dict[str, Any]:
    """Return the contents of config.json."""
    versions = {"poise": __version__, "torch": torch.__version__, "python": sys.version.split()[0]}
    return {
        "poise": 1,
        "recipe": to_json(recipe),
        "data": describe(dataset),
        "engine": engine,
        "versions": versions,
    }


def describe(dataset: Dataset) -> dict[str, Any]:
    """Return what config.json says about the data."""
    return {
        "source": dataset.source,
        "name": dataset.name,
        "shape": list(dataset.shape),
        "train": len(dataset.train),
        "test": len(dataset.test),
        "validation": 0 if dataset.validation is None else len(dataset.validation),
        "checksum": dataset.checksum,
        "pixel_std": pixel_std(dataset.train),
        "levels": dataset.levels,
        "notes": list(dataset.notes),
        "skipped": list(dataset.skipped),
    } | (
        {"classes": list(dataset.labels.classes), "labels": dataset.labels.checksum}
        if dataset.labels
        else {}
    )


def data_settings(recipe: Recipe, data: dict[str, Any]) -> Data:
    """Return the settings that read a run's images with the scale of its training.

    Args:
        recipe: the run's recipe.
        data: what its config.json says about the data. Without "levels" the run is from a version
            that took the full range of 16 bits for every file.
    """
    if "levels" in data or recipe.data.levels is not None:
        return recipe.data
    return replace(recipe.data, levels=DEEP)


def settings_to_read(recipe: Recipe, folder: Path) -> Data:
    """Return the settings to read images for training in a folder, which may hold a run."""
    if (folder / "config.json").exists() and checkpoints(folder / "checkpoints"):
        return data_settings(recipe, read_config(folder)["data"])
    return recipe.data


def with_labels(dataset: Dataset, settings: Data) -> Dataset:
    """Return a data set with labels if the settings say so, and without otherwise.

    Raises:
        InputError: the settings ask for labels, and the data set has none.
    """
    if settings.labels and dataset.labels is None:
        raise InputError(
            f"{dataset.source} has no labels: pass labels= with one label for each image, or load "
            "the data set with labels=True"
        )
    return dataset if settings.labels else replace(dataset, labels=None)


def differing_settings(earlier: dict[str, Any], now: dict[str, Any], where: str = "") -> list[str]:
    """Return the settings that differ, each as "name: was -> is"."""
    lines: list[str] = []
    for key in sorted(set(earlier) | set(now)):
        was, new = earlier.get(key), now.get(key)
        if isinstance(was, dict) and isinstance(new, dict):
            lines += differing_settings(was, new, f"{where}{key}.")
        elif was != new:
            lines.append(f"{where}{key}: {was} -> {new}")
    return lines
