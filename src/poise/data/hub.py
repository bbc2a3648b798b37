"""Load a data set of the Hugging Face Hub, or a local folder, with the `datasets` library."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from poise.data.dataset import Found, Reading
from poise.data.encoded import Encoded
from poise.data.folders import decode_split
from poise.errors import InputError, MissingExtraError, MissingInputError
from poise.support.progress import SafeStream

_TEST_SPLITS = ("test", "validation", "valid", "val")


def read_hub(name: str, reading: Reading) -> Found:
    """Return the images of the Hub's `owner/name`, or of a local folder that `datasets` can read.

    The folder may also be one that `save_to_disk` of `datasets` wrote. The images are in the first
    column of type Image. The split is train and test, or train and
    validation. Without a test split the result has all images of train, or of the only split.

    Raises:
        MissingExtraError: `datasets` is not installed.
        MissingInputError: `datasets` cannot load the data set.
        InputError: no column of images; no split called train; see also `encoded.decode`.
    """
    splits = _load(name)
    train = "train" if "train" in splits or len(splits) > 1 else next(iter(splits))
    if train not in splits:
        raise InputError(f"hf:{name} has no split called train: it has {', '.join(splits)}")
    test = next((split for split in _TEST_SPLITS if split in splits and split != train), None)
    columns = _image_columns(splits[train], name)
    sides = [
        _files(f"hf:{name} {split}", splits[split], columns[0]) if split else []
        for split in (train, test)
    ]
    used = [split for split in (train, test) if split]
    notes = [f"not used: the split {split}" for split in splits if split not in used]
    if len(columns) > 1:
        notes.insert(0, f"image column {columns[0]}, of {', '.join(columns)}")
    labels = _labels([splits[split] for split in used]) if reading.labels else None
    found = decode_split(sides[0], sides[1], reading, labels=labels)
    return Found(name.rstrip("/").split("/")[-1], found, f"hf:{name}", tuple(notes))


def _load(name: str) -> dict[str, Any]:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError("hf: data sets", "data") from error
    local = Path(name).expanduser()
    try:
        with _progress_bars(datasets):
            splits: Any
            if (local / "dataset_dict.json").is_file():
                splits = datasets.load_from_disk(local)
            elif (local / "state.json").is_file():
                splits = {"train": datasets.load_from_disk(local)}
            else:
                splits = datasets.load_dataset(str(local) if local.is_dir() else name)
    except Exception as error:  # the library and the network raise dozens of types
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = (
            "check what the folder holds" if local.is_dir() else "check the name and the network"
        )
        raise MissingInputError(f"hf:{name} cannot be loaded ({reason}): {remedy}") from error
    return {str(split): images for split, images in splits.items()}


@contextmanager
def _progress_bars(datasets: Any) -> Iterator[None]:
    """Show the progress bars of `datasets` inside the block only if stderr is a terminal."""
    silence = not SafeStream(sys.stderr).isatty() and not datasets.are_progress_bars_disabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if silence:
            datasets.enable_progress_bars()


def _image_columns(split: Any, name: str) -> list[str]:
    from datasets import Image

    columns = [column for column, kind in split.features.items() if isinstance(kind, Image)]
    if not columns:
        raise InputError(
            f"hf:{name} has no column of images: its columns are {', '.join(split.features)}"
        )
    return columns


def _labels(splits: list[Any]) -> list[str] | None:
    """Return the class of each row of all splits, from the first column of type ClassLabel."""
    from datasets import ClassLabel

    found = []
    for split in splits:
        columns = [name for name, kind in split.features.items() if isinstance(kind, ClassLabel)]
        if not columns:
            return None
        names = split.features[columns[0]].names
        numbers = list(split[columns[0]])
        if any(number is None or number < 0 for number in numbers):  # -1: not labelled
            return None
        found += [names[number] for number in numbers]
    return found


def _files(label: str, split: Any, column: str) -> list[Encoded]:
    from datasets import Image

    encoded = split.select_columns([column]).cast_column(column, Image(decode=False))
    return [
        Encoded(f"{label}[{row}]", partial(_open, encoded, column, row))
        for row in range(len(encoded))
    ]


def _open(split: Any, column: str, row: int) -> Path | BytesIO:
    file = split[row][column]
    if file is None:
        raise InputError(f"row {row} of column {column} holds no image")
    return BytesIO(file["bytes"]) if file["bytes"] is not None else Path(file["path"])
