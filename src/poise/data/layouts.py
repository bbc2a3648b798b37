"""Read the folders that torchvision downloads: MNIST, CIFAR-10 and CelebA.

MNIST comes as idx files, CIFAR-10 as pickled batches, CelebA as .jpg files and a partition file.
"""

import gzip
import math
import pickle
import zlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from poise.data.arrays import as_split
from poise.data.dataset import Found, Reading
from poise.data.folders import read_files
from poise.data.labels import as_labels
from poise.data.opening import shown
from poise.errors import InputError, MissingInputError

Reader = Callable[[Path, Reading], Found]

CELEBA_SIZE = 64
_BLOCK = 2**20  # bytes
_IDX_IMAGES = 0x00000803  # unsigned bytes, three dimensions
_IDX_LABELS = 0x00000801  # one dimension
_PARTS = {"0": "train", "1": "val", "2": "test"}  # CelebA's partition file
_TRAIN, _TEST = "0", "2"
CELEBA = "celeba64"


def find_layouts(folder: Path) -> list[tuple[Reader, Path]]:
    """Return the reader and the folder of each known data set in `folder`.

    Also looks one and two levels down, where torchvision stores data sets.
    """
    found: list[tuple[Reader, Path]] = []
    for inner in ("", "raw", "MNIST/raw", "FashionMNIST/raw"):
        if _idx_file(folder / inner, "train-images") is not None:
            found.append((read_mnist, folder / inner))
    for inner in ("", "cifar-10-batches-py"):
        if (folder / inner / "data_batch_1").is_file():
            found.append((read_cifar10, folder / inner))
    for inner in ("", "celeba", "archive"):
        if (folder / inner / "img_align_celeba").is_dir():
            found.append((read_celeba, folder / inner))
    return found


def is_celeba(source: str, name: str = "") -> bool:
    """Return whether a source is CelebA's aligned faces, which have a crop of their own.

    Args:
        source: a data set's name or a path.
        name: the data set's name, if a run has kept it. The path may be gone.
    """
    # Any folder or file of that name has it, too.
    if source == CELEBA or (name == CELEBA and Path(source).stem != CELEBA):
        return True
    return any(reader is read_celeba for reader, _ in find_layouts(Path(source)))


def read_mnist(folder: Path, reading: Reading) -> Found:
    """Return MNIST, Fashion-MNIST or a data set in the same format.

    The files are {train,t10k}-images-idx3-ubyte, with or without .gz.

    Raises:
        MissingInputError: a file is missing.
        InputError: a file is damaged.
    """
    arrays = {
        f"{shown(folder)} ({part})": _read_idx(folder, part)
        for part in ("train-images", "t10k-images")
    }
    labels = None
    if reading.labels:
        labels = [
            as_labels(_read_idx(folder, part, 1), len(images), f"{shown(folder)} ({part})")
            for part, images in zip(("train-labels", "t10k-labels"), arrays.values(), strict=True)
        ]
    name = folder.resolve().parent.name if folder.name == "raw" else folder.resolve().name
    return Found(shown(name), as_split(arrays, reading, ("train", "test"), labels), shown(folder))


def _read_idx(folder: Path, part: str, dims: int = 3) -> np.ndarray:
    path = _idx_file(folder, part, dims)
    if path is None:
        raise MissingInputError(
            f"{folder / part}-idx{dims}-ubyte is missing (with or without .gz): put it there"
        )
    size, wanted = 4 * (dims + 1), _IDX_IMAGES if dims == 3 else _IDX_LABELS
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header, values = file.read(size), bytearray()
            magic, *shape = np.frombuffer(header, ">u4").tolist() if len(header) == size else (0,)
            # Read no more than the header promises: a small archive may unpack to gigabytes.
            while magic == wanted and len(values) <= math.prod(shape):
                if not (block := file.read(_BLOCK)):
                    break
                values += block
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} cannot be read ({error}): download it again") from error
    if magic != wanted or len(values) != math.prod(shape):
        what = "images" if dims == 3 else "labels"
        raise InputError(f"{path} is damaged or not an idx file of {what}: download it again")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _idx_file(folder: Path, part: str, dims: int = 3) -> Path | None:
    names = (f"{part}-idx{dims}-ubyte", f"{part}-idx{dims}-ubyte.gz")
    return next((folder / name for name in names if (folder / name).is_file()), None)


def read_cifar10(folder: Path, reading: Reading) -> Found:
    """Return CIFAR-10 from data_batch_1 to data_batch_5, and test_batch.

    Raises:
        MissingInputError: a file is missing.
        InputError: a file is damaged, or names a function that `ArrayUnpickler` refuses.
    """
    batches = [_read_batch(folder / f"data_batch_{k}") for k in range(1, 6)]
    sides = {"train": batches, "test": [_read_batch(folder / "test_batch")]}
    arrays = {
        f"{shown(folder)} ({side})": np.concatenate([pixels for pixels, _ in parts])
        for side, parts in sides.items()
    }
    labels, known = None, all(of is not None for parts in sides.values() for _, of in parts)
    if reading.labels and known:
        names, labels = _read_meta(folder / "batches.meta"), []
        for parts, (label, images) in zip(sides.values(), arrays.items(), strict=True):
            numbers = [number for _, of in parts for number in of]
            labels.append(names[as_labels(numbers, len(images), label)])
    split = as_split(arrays, reading, ("train", "test"), labels)
    return Found("cifar10", split, shown(folder))


def _read_meta(path: Path) -> np.ndarray:
    """Return the names of the ten classes, or their numbers as text without the file."""
    if not path.is_file():
        return np.array([str(number) for number in range(10)])
    try:
        with path.open("rb") as file:
            names = ArrayUnpickler(file).load()[b"label_names"]
        return np.array([name.decode() for name in names])
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{path} is damaged: unpack cifar-10-python.tar.gz again") from error


def _read_batch(path: Path) -> tuple[np.ndarray, Any]:
    """Return the images of a batch, and the number of the class of each if the batch has them."""
    if not path.is_file():
        raise MissingInputError(f"{path} is missing: unpack cifar-10-python.tar.gz again")
    try:
        with path.open("rb") as file:
            batch = ArrayUnpickler(file).load()
        pixels = batch[b"data"].reshape(-1, 3, 32, 32)
        return pixels, batch.get(b"labels")
    except Exception as error:  # a damaged pickle can raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"{path} is not an intact CIFAR-10 batch ({reason}): "
            "unpack cifar-10-python.tar.gz again"
        ) from error


class ArrayUnpickler(pickle.Unpickler):
    """Unpickle dicts, lists, bytes and numpy arrays; refuse everything else.

    A pickle can call any function by its name, so an unsafe file could run code.
    """

    # The functions that rebuild an array (pickle protocols <= 4 and 5). Old and new releases of
    # numpy keep them in different modules.
    _modules = (
        "numpy",
        "numpy.core.multiarray",
        "numpy._core.multiarray",
        "numpy.core.numeric",
        "numpy._core.numeric",
    )
    _allowed = {  # noqa: RUF012
        "ndarray": np.ndarray,
        "dtype": np.dtype,
        "_reconstruct": np.zeros(1).__reduce__()[0],
        "_frombuffer": np.zeros(1).__reduce_ex__(5)[0],
    }

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="bytes")  # Python 2 wrote the official files

    def find_class(self, module_name: str, global_name: str) -> Any:
        if module_name in self._modules and global_name in self._allowed:
            return self._allowed[global_name]
        raise pickle.UnpicklingError(f"it asks for {module_name}.{global_name}, which is refused")


def read_celeba(folder: Path, reading: Reading) -> Found:
    """Return CelebA: img_align_celeba/*.jpg, cropped to rows 45:173 and columns 25:153.

    list_eval_partition.txt, or the .csv of Kaggle's copy, gives the official split: train is 0,
    validation 1 and test 2. With `file_order` "listing" the split is that of the released code, in
    the order in which the file system lists the files: the first 162,770 train, the last 19,962
    test (the counts of the partition file).

    Raises:
        MissingInputError: files are missing.
        InputError: a file cannot be decoded, or is not 178x218.
    """
    partition = _read_partition(folder)
    images = folder / "img_align_celeba"
    if (images / "img_align_celeba").is_dir():  # Kaggle's copy
        images /= "img_align_celeba"
    listed = [path.name for path in images.iterdir() if path.name in partition]
    absent = sorted(set(partition) - set(listed))
    if absent:
        count = f"{len(absent)} of {len(partition)} images"
        raise MissingInputError(
            f"{images} lacks {count}, {absent[0]} for one: unpack img_align_celeba.zip again"
        )
    if reading.file_order == "sorted":
        train, test = (
            sorted(name for name, part in partition.items() if part == side)
            for side in (_TRAIN, _TEST)
        )
    else:
        counts = Counter(partition.values())
        train, test = listed[: counts[_TRAIN]], listed[len(listed) - counts[_TEST] :]
    reading = celeba_reading(reading)
    if reading.whole:
        everything = sorted(partition)
        sides = [_PARTS[partition[name]] for name in everything]
        split = read_files([images / name for name in everything], [], reading, sides)
    else:
        split = read_files(
            [images / name for name in train], [images / name for name in test], reading
        )
    return Found(CELEBA, split, shown(folder), file_order=reading.file_order)


def celeba_reading(reading: Reading) -> Reading:
    """Return `reading` with CelebA's crop to 128x128, and 64x64 RGB as the defaults."""
    return replace(
        reading, crop="celeba", size=reading.size or CELEBA_SIZE, channels=reading.channels or 3
    )


def _read_partition(folder: Path) -> dict[str, str]:
    names = ("list_eval_partition.txt", "list_eval_partition.csv")
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise MissingInputError(
            f"{folder / names[0]} is missing: it holds CelebA's official split, "
            "and comes with the images"
        )
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    if path.suffix == ".csv":
        lines = [line.replace(",", " ") for line in lines[1:]]  # the first names the columns
    fields = [line.split() for line in lines]
    if any(len(field) != 2 or field[1] not in _PARTS for field in fields):
        raise InputError(f"{path} is damaged: each line must be a file name and 0, 1 or 2")
    return dict(fields)
