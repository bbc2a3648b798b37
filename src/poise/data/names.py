"""Load a data set by its name, from the data folder or from the Hugging Face Hub.

The digits are part of scikit-learn.
"""

import os
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from pkgutil import resolve_name

import numpy as np

from poise.data.arrays import as_split, read_npz
from poise.data.dataset import Found, Reading
from poise.data.hub import read_hub
from poise.data.layouts import find_layouts
from poise.errors import MissingExtraError, MissingInputError
from poise.variants import DATA_SETS, NamedDataSet


def read_named(name: str, data_dir: str | Path | None, reading: Reading) -> Found:
    """Return the images of a named data set, with its official split if it has one.

    Args:
        name: a key of `poise.variants.DATA_SETS`.
        data_dir: the data folder. None: the folder in the environment variable POISE_DATA, or
            ./data.
        reading: how to read the images.

    Raises:
        MissingInputError: the data set is neither in the data folder nor available from the Hub; or
            `data_dir` does not exist.
        InputError: the data set is damaged.
    """
    place = DATA_SETS[name]
    if place.reader:
        return resolve_name(place.reader)(reading)
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise MissingInputError(
            f"the data folder {data_dir} does not exist: name another, or create it"
        )
    root = Path(data_dir or os.environ.get("POISE_DATA") or "data").expanduser()
    found = _read_local(place, root, reading) or _read_remote(name, root, reading)
    return replace(found, name=name)


def read_digits(reading: Reading) -> Found:
    """Return scikit-learn's 1,797 handwritten digits of 8x8 pixels; 17 levels become 0 to 255."""
    pixels = np.floor(_digits_levels() * 255 / 16 + 0.5).astype(np.uint8)
    labels = [_digits_table()[:, 64].astype(np.int64)] if reading.labels else None
    split = as_split({"digits": pixels}, reading, labels=labels)
    return Found("digits", split, "scikit-learn's load_digits")


def _digits_levels() -> np.ndarray:
    """Return the images of scikit-learn's load_digits, (1797, 8, 8)."""
    return _digits_table()[:, :64].reshape(-1, 8, 8)


def _digits_table() -> np.ndarray:
    """Return pixels and label of each of scikit-learn's digits, (1797, 65).

    Reads scikit-learn's file if possible, because its import takes a second or more.
    """
    package = find_spec("sklearn")
    file = (
        Path(package.origin or "").parent / "datasets" / "data" / "digits.csv.gz"
        if package
        else Path()
    )
    if file.is_file():
        return np.loadtxt(file, delimiter=",")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.column_stack([np.asarray(pixels), np.asarray(labels)])


def _read_local(place: NamedDataSet, root: Path, reading: Reading) -> Found | None:
    for reader, folder in find_layouts(root / place.folder) if place.folder else ():
        return reader(folder, reading)
    archive = next((root / name for name in place.archives if (root / name).is_file()), None)
    return read_npz(archive, reading) if archive else None


def _read_remote(name: str, root: Path, reading: Reading) -> Found:
    place = DATA_SETS[name]
    if place.preparation:
        reading = resolve_name(place.preparation)(reading)
    files = " or ".join(filter(None, (place.files, *place.archives[:1])))
    missing = (
        f"{name} is not in the data folder {root}: "
        f"put {files} there, set POISE_DATA to another folder"
    )
    if not place.hub:
        raise MissingInputError(missing)
    try:
        return read_hub(place.hub, reading)
    except MissingExtraError as error:
        raise MissingInputError(
            f'{missing}, or let it be downloaded: pip install "poise[data]"'
        ) from error
    except MissingInputError as error:
        raise MissingInputError(f"{missing}, or try again: {error}") from error
