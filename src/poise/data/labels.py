"""The classes of images, from numbers or text.

Readers find them in the folders of the images or in arrays beside theirs.
"""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from poise.errors import InputError

TRAIN_KEYS = ("y_train", "train_labels", "train_y", "labels_train", "labels", "y")
TEST_KEYS = ("y_test", "test_labels", "test_y", "labels_test")
VAL_KEYS = ("y_val", "y_valid", "val_labels", "valid_labels", "val_y", "valid_y", "labels_val")
HOW = (
    "put each class into a folder of its own, with no image outside of them, or y_train beside "
    "x_train in an .npz file, or pass labels= from Python"
)
FEWEST = 2


@dataclass(frozen=True, eq=False)
class Labels:
    """The classes of the images of a data set.

    Attributes:
        classes: their names, in the order of numbers if all are numbers, else of the alphabet.
        train, test: (n,), int64: the position of each image's class in `classes`.
    """

    classes: tuple[str, ...]
    train: np.ndarray
    test: np.ndarray

    @property
    def checksum(self) -> str:
        """The SHA-256 of the names of the classes and the class of each image."""
        digest = hashlib.sha256("\0".join(self.classes).encode("utf-8", "surrogateescape"))
        for side in (self.train, self.test):
            digest.update(np.ascontiguousarray(side, np.int64).data)
        return digest.hexdigest()

    def of_rows(self, rows: np.ndarray, source: str) -> "Labels":
        """Return the labels of some of the training images.

        Args:
            rows: numbers of these images.
            source: name of the data in messages.

        Raises:
            InputError: a class has none of these images.
        """
        train = self.train[rows]
        counts = np.bincount(train, minlength=len(self.classes))
        if not counts.all():
            absent = self.classes[int(np.argmin(counts))]
            raise InputError(
                f"{source}: all training images of class {absent} were held out: "
                "add images of it, or give a smaller validation share"
            )
        return replace(self, train=train)


def labels_of(train: np.ndarray, test: np.ndarray, source: str) -> Labels:
    """Return the classes of the images of both sides.

    Args:
        train, test: (n,), the class of each image, as text or numbers.
        source: name of the data in messages.

    Raises:
        InputError: there are fewer than two classes, or test images of a class without training
            images.
    """
    both = np.concatenate([train, test]) if len(test) else train
    ordered, places = np.unique(both, return_inverse=True)  # numbers by value, text by letters
    names, split = [str(value) for value in ordered.tolist()], len(train)
    counts = np.bincount(places[:split], minlength=len(names))
    if len(names) < FEWEST:
        raise InputError(f"{source} has one class, {names[0]}: labels need at least {FEWEST}")
    if not counts.all():
        absent = names[int(np.argmin(counts))]
        raise InputError(f"{source}: class {absent} has test images only: add images to train on")
    places = places.astype(np.int64)
    return Labels(tuple(names), places[:split], places[split:])


def as_labels(values: Any, number: int, label: str) -> np.ndarray:
    """Return labels as an array (n,) of whole numbers or of text.

    Args:
        values: an array, a tensor or a sequence: (n,) or (n, 1).
        number: number of images.
        label: name of the array in error messages.

    Raises:
        InputError: another shape or type.
    """
    array = np.asarray(values)
    if array.dtype == object:  # texts or whole numbers of a column of pandas
        kinds = {type(value) for value in array.flat}
        array = np.array(array.tolist()) if len(kinds) == 1 else array
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.shape != (number,) or array.dtype.kind not in "biuUS":
        raise InputError(
            f"{label} must hold one label for each of the {number} images, as whole numbers or "
            f"text, not {array.dtype} of shape {array.shape}"
        )
    if array.dtype.kind == "S":
        try:
            return np.char.decode(array, "utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{label} are bytes that are not UTF-8 ({error}): give text") from None
    return array.astype(np.int64) if array.dtype.kind in "biu" else array.astype(np.str_)
