"""Data sets by name: in a folder on this machine, or else on the Hugging Face Hub; the digits come with scikit-learn."""

import os
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from poise.data.arrays import as_images, read_npz
from poise.data.dataset import Found, Reading
from poise.data.hub import read_hub
from poise.data.layouts import celeba_reading, find_layouts
from poise.errors import MissingExtraError, MissingInputError


@dataclass(frozen=True)
class _Place:
    """Where a data set may be.

    Attributes:
        folder: below the data folder, as torchvision lays it out.
        files: what is expected there, for people.
        archives: .npz files that do as well, in the data folder.
        hub: its name on the Hub.
    """

    folder: str
    files: str
    archives: tuple[str, ...]
    hub: str


_IDX_FILES = "{train,t10k}-images-idx3-ubyte"
_PLACES = {
    "mnist": _Place("MNIST", f"MNIST/raw/{_IDX_FILES}", ("mnist.npz",), "ylecun/mnist"),
    "fashion-mnist": _Place(
        "FashionMNIST",
        f"FashionMNIST/raw/{_IDX_FILES}",
        ("fashion-mnist.npz", "fashion.npz"),
        "zalando-datasets/fashion_mnist",
    ),
    "cifar10": _Place(
        "cifar-10-batches-py", "cifar-10-batches-py/", ("cifar10.npz",), "uoft-cs/cifar10"
    ),
    "celeba64": _Place(
        "celeba",
        "celeba/img_align_celeba/ and celeba/list_eval_partition.txt",
        ("celeba64.npz",),
        "flwrlabs/celeba",
    ),
}
NAMES = ("digits", *_PLACES)


def read_named(name: str, data_dir: str | Path | None, reading: Reading) -> Found:
    """The images of a data set of `NAMES`, with its official split if it has one.

    Args:
        name: one of `NAMES`.
        data_dir: the data folder; None: that of the environment variable POISE_DATA, or ./data.
        reading: how images are to be read.

    Raises:
        MissingInputError: not in the data folder, and not to be had from the Hub; or `data_dir` does not exist.
        InputError: it is damaged.
    """
    if name == "digits":
        return read_digits(reading)
    if data_dir is not None and not Path(data_dir).expanduser().is_dir():
        raise MissingInputError(
            f"the data folder {data_dir} does not exist: name another, or create it"
        )
    root = Path(data_dir or os.environ.get("POISE_DATA") or "data").expanduser()
    found = _read_local(_PLACES[name], root, reading) or _read_remote(name, root, reading)
    return replace(found, name=name)


def read_digits(reading: Reading) -> Found:
    """The 1,797 handwritten digits of 8x8 pixels inside scikit-learn, their 17 levels spread over 0 to 255."""
    pixels = np.floor(_digits_levels() * 255 / 16 + 0.5).astype(np.uint8)
    return Found("digits", as_images(pixels, "digits", reading), None, "scikit-learn's load_digits")


def _digits_levels() -> np.ndarray:
    """What scikit-learn's load_digits gives, (1797, 8, 8), from its file: to import scikit-learn takes a second or more."""
    package = find_spec("sklearn")
    file = (
        Path(package.origin or "").parent / "datasets" / "data" / "digits.csv.gz"
        if package
        else Path()
    )
    if file.is_file():
        return np.loadtxt(file, delimiter=",", usecols=range(64)).reshape(-1, 8, 8)
    from sklearn.datasets import load_digits

    return np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8)


def _read_local(place: _Place, root: Path, reading: Reading) -> Found | None:
    for reader, folder in find_layouts(root / place.folder):
        return reader(folder, reading)
    archive = next((root / name for name in place.archives if (root / name).is_file()), None)
    return read_npz(archive, reading) if archive else None


def _read_remote(name: str, root: Path, reading: Reading) -> Found:
    place = _PLACES[name]
    files = f"{place.files} or {place.archives[0]}"
    missing = f"{name} is not in the data folder {root}: put {files} there, set POISE_DATA to another folder"
    try:
        return read_hub(place.hub, celeba_reading(reading) if name == "celeba64" else reading)
    except MissingExtraError as error:
        raise MissingInputError(
            f'{missing}, or let it be downloaded: pip install "poise[data]"'
        ) from error
    except MissingInputError as error:
        raise MissingInputError(f"{missing}, or try again: {error}") from error
