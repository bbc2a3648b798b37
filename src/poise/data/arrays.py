"""Convert arrays, and .npy and .npz files, to images: check layout, type and range, then resize.

Images have the layout (n, h, w), (n, h, w, c) or (n, c, h, w), with 1 or 3 channels. Values are
bytes, 16-bit integers, or floats in [0, 1]. An .npy file is memory-mapped and read in blocks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from poise.data.dataset import Found, Reading, Split, levels_note
from poise.data.decoding import common_white, counts_above, square_resize, to_levels
from poise.data.labels import TEST_KEYS as TEST_LABELS
from poise.data.labels import TRAIN_KEYS as TRAIN_LABELS
from poise.data.labels import VAL_KEYS as VAL_LABELS
from poise.data.labels import as_labels
from poise.data.opening import shown
from poise.data.storage import blocks
from poise.errors import InputError

# In order of preference. Names are compared without regard to case.
TRAIN_KEYS = ("x_train", "train_images", "train", "train_x", "images_train")
TEST_KEYS = ("x_test", "test_images", "test", "test_x", "images_test")
VAL_KEYS = (
    *("x_val", "x_valid", "val_images", "valid_images", "val", "valid", "validation"),
    *("val_x", "valid_x", "images_val"),
)
WHOLE_KEYS = ("images", *TRAIN_KEYS)
LABELS = {"train": TRAIN_LABELS, "test": TEST_LABELS, "val": VAL_LABELS, "": TRAIN_LABELS}
ROUNDING = 1e-3  # floats may leave [0, 1] by so much: computing with float32 does that
BYTES_AS_FLOATS = (2.0, 255 * (1 + ROUNDING))  # maxima that look like bytes
_STARTS = {".npy": b"\x93NUMPY", ".npz": b"PK"}


def read_npy(path: Path, reading: Reading) -> Found:
    """Return the images of an .npy file, memory-mapped. The file has no split.

    Raises:
        InputError: the file is damaged, holds Python objects, or holds no images (see `as_split`).
    """
    _check_start(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy can raise anything on a damaged file
        raise _unreadable(path, error) from error
    return Found(shown(path.stem), as_split({shown(path): array}, reading), shown(path))


def read_npz(path: Path, reading: Reading) -> Found:
    """Return the images of an .npz file.

    The split is x_train and x_test, train_images and test_images, train and test, or the like, or
    the same with val in place of test. Without such a pair the file has no split: its images are
    the array called images or the like, or its only array of images.

    Raises:
        InputError: the file is damaged, holds Python objects, has no array of such a name, or holds
            no images (see `as_split`).
    """
    _check_start(path)
    try:
        # np.load given a path leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            sides, unused = _image_keys(path, archive, whole=reading.whole)
            arrays = {key: archive[key] for key in sides}
            labels = _labels(path, archive, arrays, sides) if reading.labels else None
    except InputError:
        raise
    except Exception as error:  # numpy and zipfile can raise anything on a damaged file
        raise _unreadable(path, error) from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise InputError(
                f"{shown(path)} ({key}) is not an array of numpy: save the images again"
            )
    labelled = {f"{shown(path)} ({key})": array for key, array in arrays.items()}
    split = as_split(labelled, reading, [*sides.values()], labels)
    notes = tuple(f"not used: the array {key}" for key in unused)
    return Found(shown(path.stem), split, shown(path), notes)


def _image_keys(path: Path, archive: Any, *, whole: bool) -> tuple[dict[str, str], list[str]]:
    """Return the names of the arrays of images with their sides, and of images that are not used.

    The first side is for training and the second for testing.

    Args:
        path, archive: the file and its arrays.
        whole: return the arrays of all sides.
    """
    keys: list[str] = archive.files
    lower = {key.lower(): key for key in reversed(keys)}
    found = {
        side: next((lower[name] for name in names if name in lower), None)
        for side, names in (("train", TRAIN_KEYS), ("test", TEST_KEYS), ("val", VAL_KEYS))
    }
    train, test, val = (found[side] for side in ("train", "test", "val"))
    held_out = test or val
    if train and held_out:
        named = {key: side for side, key in found.items() if key}
        if whole:
            return named, []
        used = {train: "train", held_out: "test" if test else "val"}
        return used, [key for key in named if key not in used]
    for name in WHOLE_KEYS:
        if name in lower:
            return {lower[name]: ""}, [key for key in (held_out,) if key]
    images = keys if len(keys) == 1 else [key for key in keys if np.ndim(archive[key]) in (3, 4)]
    if len(images) == 1:
        return {images[0]: ""}, []
    raise InputError(
        f"{shown(path)} has the arrays {', '.join(keys) or '(none)'}: "
        "name the images x_train and x_test, train and test, or images"
    )


def _labels(
    path: Path, archive: Any, arrays: Mapping[str, Any], sides: Mapping[str, str]
) -> list[np.ndarray] | None:
    """Return the labels of each array of images, or None if one has none.

    Args:
        path, archive: the file and its arrays.
        arrays: the images by the names of their arrays.
        sides: side of each array of images.
    """
    lower, found = {key.lower(): key for key in reversed(archive.files)}, []
    for key, side in sides.items():
        name = next((lower[word] for word in LABELS[side] if word in lower), None)
        if name is None:
            return None
        label = f"{shown(path)} ({name})"
        try:
            values = archive[name]
        except ValueError as error:
            raise InputError(
                f"{label} holds Python objects, which are never loaded: save the labels as text, "
                "labels.astype(str), or as whole numbers"
            ) from error
        found.append(as_labels(values, len(arrays[key]), label))
    return found


def _check_start(path: Path) -> None:
    ending = path.suffix.lower()
    if not path.is_file():  # reading a named pipe would wait for its writer
        raise InputError(f"{shown(path)} is not a file: give an {ending} file of numpy")
    start = _STARTS[ending]
    with path.open("rb") as file:
        if file.read(len(start)) != start:
            raise InputError(
                f"{shown(path)} is not an {ending} file of numpy: save the images again"
            )


def _unreadable(path: Path, error: Exception) -> InputError:
    # numpy raises ValueError for damaged files, too: only its text tells Python objects apart.
    if any(words in str(error) for words in ("Object arrays", "Python objects")):
        return InputError(
            f"{shown(path)} holds Python objects, which are never loaded: "
            "save the images as a uint8 array"
        )
    reason = " ".join(str(error).split())
    return InputError(f"{shown(path)} is damaged ({reason}): save the images again")


def as_split(
    arrays: Mapping[str, np.ndarray],
    reading: Reading,
    sides: Sequence[str] = ("", ""),
    labels: Sequence[np.ndarray] | None = None,
) -> Split:
    """Convert arrays to images with one scale.

    Args:
        arrays: the training images and, if there are any, the test images, by their names in
            messages. With `reading.whole`, the images of all sides.
        reading: the size, channels and levels to convert to.
        sides: the side of each array, if `reading.whole`.
        labels: the classes of the images of each array. None: not known.

    Raises:
        InputError: another layout or type; values outside the range, NaN or infinite; images are
            not square and `reading` gives no size.
    """
    checked = [_Checked(array, label, reading) for label, array in arrays.items()]
    levels, notes = reading.levels, [note for one in checked for note in one.notes]
    deep = [one for one in checked if one.images.dtype.kind == "u" and one.images.itemsize == 2]
    if deep and levels is None:
        levels = common_white([counts for one in deep for counts in one.counts()])
    if levels is not None:
        clipped = [count for one in checked for count in one.clipped(levels)]
        if deep or sum(clipped):
            total, images = sum(clipped), sum(map(bool, clipped))
            chosen = reading.levels is None
            what = "16-bit values" if deep else "images"
            notes.append(levels_note(what, levels, clipped=total, images=images, chosen=chosen))
    images = [one.fitted(levels) for one in checked]
    shared = tuple(notes), levels
    if not reading.whole:
        split = Split(images[0], images[1] if len(images) > 1 else None, *shared)
        if labels is None:
            return split
        return split._replace(labels=labels[0], test_labels=labels[1] if labels[1:] else None)
    names = tuple(f"{one.label}[{row}]" for one in checked for row in range(len(one.images)))
    of_images = tuple(
        side for side, one in zip(sides, checked, strict=False) for _ in range(len(one.images))
    )
    if len({part.shape[1:] for part in images}) > 1:
        shapes = ", ".join(
            f"{one.label} {part.shape}" for one, part in zip(checked, images, strict=True)
        )
        raise InputError(f"the images do not go together: {shapes}; pass --size N")
    if len({part.dtype for part in images}) > 1:  # bytes and floats
        images = [
            np.divide(part, 255, dtype=np.float32) if part.dtype == np.uint8 else part
            for part in images
        ]
    whole = images[0] if len(images) == 1 else np.concatenate(images)
    classes = None if labels is None else np.concatenate(labels)
    return Split(whole, None, *shared, (), names, of_images, classes)


class _Checked:
    """An array whose layout, type and range have been checked.

    Attributes:
        images: (n, c, h, w), in the type of the array.
        label, notes: for messages.
    """

    def __init__(self, array: np.ndarray, label: str, reading: Reading) -> None:
        self.label, self._reading, self.notes = label, reading, list[str]()
        self._clips, self._divisor = False, None  # of floats: the value that means white
        kind = array.dtype.kind
        known = kind in "bf" or (kind == "u" and array.dtype.itemsize <= 2)
        if not known and not (reading.levels is not None and kind in "ui"):
            raise InputError(
                f"{label} has type {array.dtype}: save as uint8 (0 to 255), or as floats in "
                "[0, 1], or pass --levels N with the value that means white"
            )
        self.images = _channels_first(array, label)
        low, high = _range(self.images, label) if kind in "fi" else (0, 1)
        if kind == "f":
            self._check_floats(low, high)
        elif low < 0:
            raise InputError(f"{label} has values from {low} to {high}: subtract the lowest value")

    def _check_floats(self, low: Any, high: Any) -> None:
        levels = self._reading.levels
        if low >= 0 and high <= 1:
            return
        if low >= -ROUNDING and high <= 1 + ROUNDING:
            self._clips = True
            self.notes.append(
                f"{self.label}: values from {_digits(low)} to {_digits(high)} were clipped to "
                "[0, 1], because they leave it by rounding"
            )
        elif levels is not None and low >= -ROUNDING * levels:
            self._clips, self._divisor = True, levels
        else:
            raise InputError(
                f"{self.label} has values from {_digits(low)} to {_digits(high)}, "
                f"allowed are floats in [0, 1]: {_remedy(float(low), float(high))}"
            )

    def counts(self) -> list[tuple[int, ...]]:
        """Return the counts of `counts_above` of each image."""
        return [counts_above(self.images[row]) for row in range(len(self.images))]

    def clipped(self, levels: int) -> list[int]:
        """Return the number of values above `levels` of each image, if they are scaled."""
        if not self._scaled_by(levels):
            return []
        return [
            int(number)
            for rows in blocks(self.images)
            for number in np.count_nonzero(self.images[rows] > levels, axis=(1, 2, 3))
        ]

    def _scaled_by(self, levels: int) -> bool:
        kind, size = self.images.dtype.kind, self.images.dtype.itemsize
        if kind == "f":
            return self._divisor is not None
        return kind in "ui" and not (size == 1 and levels >= 255)

    def fitted(self, levels: int | None) -> np.ndarray:
        """Return the images in the size, channels and values that a `Dataset` has."""
        _, channels, height, width = self.images.shape
        reading, images = self._reading, self.images
        if reading.size is None and height != width:
            raise InputError(
                f"{self.label} has images of {width}x{height}, not square: "
                "pass --size N to crop and resize them"
            )
        shape = (reading.channels or channels, reading.size or height, reading.size or width)
        dtype = np.dtype(np.float32 if images.dtype.kind == "f" else np.uint8)
        scaled = levels is not None and self._scaled_by(levels)
        changed = scaled or self._clips or images.dtype != dtype
        if images.shape[1:] == shape and not changed:
            return images
        fitted = reading.allocate((len(images), *shape), dtype)
        for rows in blocks(images):
            block = self._values(images[rows], levels if scaled else None).astype(dtype, copy=False)
            fitted[rows] = _resized(_with_channels(block, shape[0]), shape[1])
        return fitted

    def _values(self, block: np.ndarray, levels: int | None) -> np.ndarray:
        if block.dtype == np.bool_:
            return block * np.uint8(255)
        if block.dtype.kind == "f":
            return (block / (self._divisor or 1)).clip(0, 1) if self._clips else block
        return block if levels is None else to_levels(block, levels)


def _range(images: np.ndarray, label: str) -> tuple[Any, Any]:
    """Return the least and the largest value, in the type of the images.

    Raises:
        InputError: a value is NaN or infinite.
    """
    low, high = [], []
    for rows in blocks(images):
        block = images[rows]
        finite = np.isfinite(block).all(axis=(1, 2, 3))
        if not finite.all():
            first = rows.start + int(np.argmin(finite))
            raise InputError(
                f"{label} holds NaN or infinite values, first in image {first}: "
                "repair or remove such images"
            )
        low.append(block.min())
        high.append(block.max())
    return min(low, default=0), max(high, default=0)


def _digits(value: Any) -> str:
    """Return a number with all its digits, in its own precision."""
    return str(value).removesuffix(".0")


def _remedy(low: float, high: float) -> str:
    if low < 0 and low >= -1 - ROUNDING and high <= 1 + ROUNDING:
        return "they look like [-1, 1]; pass (images + 1) / 2"
    if low < -ROUNDING:
        return "rescale them, as with (images - images.min()) / (images.max() - images.min())"
    if BYTES_AS_FLOATS[0] < high <= BYTES_AS_FLOATS[1]:
        return "divide by 255 or save as uint8"
    return "divide by the value that means white, or pass it with --levels N"


def _channels_first(array: np.ndarray, label: str) -> np.ndarray:
    given = f"{label} has shape {tuple(array.shape)}"
    if array.ndim == 2:
        raise InputError(
            f"{given}, which are vectors: poise train takes images, "
            "(n, h, w), (n, h, w, c) or (n, c, h, w)"
        )
    if array.ndim not in (3, 4) or 0 in array.shape[1:]:
        raise InputError(f"{given}: images come as (n, h, w), (n, h, w, c) or (n, c, h, w)")
    if array.ndim == 3 and array.shape[2] in (1, 3, 4) and array.shape[1] != array.shape[2]:
        raise InputError(
            f"{given}, which looks like a single image: "
            "images come as (n, h, w), (n, h, w, c) or (n, c, h, w)"
        )
    if array.ndim == 3:
        return array[:, None]
    if _channel_axis(array.shape, given) == 1:
        return array
    images = array.transpose(0, 3, 1, 2)
    return images if isinstance(array, np.memmap) else np.ascontiguousarray(images)


def _channel_axis(shape: tuple[int, ...], given: str) -> int:
    axes = [axis for axis in (1, 3) if shape[axis] in (1, 3)]
    if not axes:
        raise InputError(
            f"{given}: images have 1 or 3 channels, first (n, c, h, w) or last (n, h, w, c)"
        )
    square = [axis for axis in axes if shape[2] == shape[4 - axis]]
    if len(axes) == 2 and len(square) != 1:
        raise InputError(
            f"{given}: the channels may be first or last; "
            "give another shape, as (n, h, w) for grey images"
        )
    return axes[0] if len(axes) == 1 else square[0]


def _with_channels(images: np.ndarray, channels: int) -> np.ndarray:
    """Repeat grey three times, or reduce RGB to the luma of ITU-R 601.

    uint8 images use the integer weights of Pillow.
    """
    if images.shape[1] == channels:
        return images
    if channels == 3:
        return images.repeat(3, 1)
    if images.dtype == np.uint8:
        weights = np.array([19595, 38470, 7471], np.uint32)
        return (
            (np.einsum("nchw,c->nhw", images.astype(np.uint32), weights) + 0x8000) >> 16
        ).astype(np.uint8)[:, None]
    return np.einsum("nchw,c->nhw", images, np.array([0.299, 0.587, 0.114], images.dtype)).clip(
        0, 1
    )[:, None]


def _resized(images: np.ndarray, size: int) -> np.ndarray:
    from PIL import Image

    if images.shape[2:] == (size, size):
        return images
    planes = images.reshape(-1, *images.shape[2:])
    resized = np.stack(
        [np.asarray(square_resize(Image.fromarray(plane), size)) for plane in planes]
    )
    # Bicubic interpolation overshoots at edges.
    in_range = resized if images.dtype == np.uint8 else resized.clip(0, 1)
    return in_range.reshape(*images.shape[:2], size, size)
