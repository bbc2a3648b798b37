"""Convert arrays, and .npy and .npz files, to images: check layout, type and range, then resize.

Images have the layout (n, h, w), (n, h, w, c) or (n, c, h, w), with 1 or 3 channels. Values are
uint8, or floats in [0, 1]. An .npy file is memory-mapped and read in blocks.
"""

from pathlib import Path

import numpy as np

from poise.data.dataset import Found, Reading
from poise.data.decoding import center_square_resize
from poise.data.storage import blocks
from poise.errors import InputError

SPLIT_KEYS = (("x_train", "x_test"), ("train_images", "test_images"), ("train", "test"))
WHOLE_KEYS = ("images", "x_train", "train_images", "train")
_STARTS = {".npy": b"\x93NUMPY", ".npz": b"PK"}


def read_npy(path: Path, reading: Reading) -> Found:
    """Return the images of an .npy file, memory-mapped. The file has no split.

    Raises:
        InputError: the file is damaged, holds Python objects, or holds no images (see `as_images`).
    """
    _check_start(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy can raise anything on a damaged file
        raise _unreadable(path, error) from error
    return Found(path.stem, as_images(array, str(path), reading), None, str(path))


def read_npz(path: Path, reading: Reading) -> Found:
    """Return the images of an .npz file.

    The split is x_train and x_test, train_images and test_images, or train and test. Without such a
    pair the file has no split: its images are the array called images, x_train, train_images or
    train, or its only array.

    Raises:
        InputError: the file is damaged, holds Python objects, has no array of such a name, or holds
            no images (see `as_images`).
    """
    _check_start(path)
    try:
        # np.load given a path leaves a damaged file open.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = {key: archive[key] for key in _image_keys(path, archive.files)}
    except InputError:
        raise
    except Exception as error:  # numpy and zipfile can raise anything on a damaged file
        raise _unreadable(path, error) from error
    for key, array in arrays.items():
        if not isinstance(array, np.ndarray):
            raise InputError(f"{path} ({key}) is not an array of numpy: save the images again")
    train, *test = [as_images(array, f"{path} ({key})", reading) for key, array in arrays.items()]
    return Found(path.stem, train, test[0] if test else None, str(path))


def _image_keys(path: Path, keys: list[str]) -> tuple[str, ...]:
    for pair in SPLIT_KEYS:
        if set(pair) <= set(keys):
            return pair
    for key in WHOLE_KEYS:
        if key in keys:
            return (key,)
    if len(keys) == 1:
        return (keys[0],)
    raise InputError(
        f"{path} has the arrays {', '.join(keys) or '(none)'}: "
        "name the images x_train and x_test, train and test, or images"
    )


def _check_start(path: Path) -> None:
    if not path.is_file():  # reading a named pipe would wait for its writer
        raise InputError(f"{path} is not a file: give an {path.suffix} file of numpy")
    start = _STARTS[path.suffix]
    with path.open("rb") as file:
        if file.read(len(start)) != start:
            raise InputError(f"{path} is not an {path.suffix} file of numpy: save the images again")


def _unreadable(path: Path, error: Exception) -> InputError:
    # numpy raises ValueError for damaged files, too: only its text tells Python objects apart.
    if any(words in str(error) for words in ("Object arrays", "Python objects")):
        return InputError(
            f"{path} holds Python objects, which are never loaded: save the images as a uint8 array"
        )
    return InputError(f"{path} is damaged ({' '.join(str(error).split())}): save the images again")


def as_images(array: np.ndarray, label: str, reading: Reading) -> np.ndarray:
    """Convert an array to the images of a `Dataset`: (n, channels, side, side), uint8 or float32.

    Args:
        array: (n, h, w), (n, h, w, c) or (n, c, h, w), with 1 or 3 channels; uint8, or floats in
            [0, 1].
        label: the name of the array in error messages.
        reading: the size and channels to convert to.

    Returns:
        A view of `array` if nothing has to change, otherwise a new array.

    Raises:
        InputError: another layout or type; float values outside [0, 1], NaN or infinite; images are
            not square and `reading` gives no size.
    """
    if array.dtype != np.uint8 and array.dtype.kind != "f":
        raise InputError(
            f"{label} has type {array.dtype}: save as uint8 (0 to 255), or as floats in [0, 1]"
        )
    images = _channels_first(array, label)
    if images.dtype != np.uint8:
        _check_range(images, label)
    return _fit(images, label, reading)


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


def _check_range(images: np.ndarray, label: str) -> None:
    low, high = np.inf, -np.inf
    for rows in blocks(images):
        block = images[rows]
        finite = np.isfinite(block).all(axis=(1, 2, 3))
        if not finite.all():
            first = rows.start + int(np.argmin(finite))
            raise InputError(
                f"{label} holds NaN or infinite values, first in image {first}: "
                "repair or remove such images"
            )
        low, high = min(low, float(block.min())), max(high, float(block.max()))
    if low < 0 or high > 1:
        hint = (
            "divide by 255 or save as uint8"
            if low >= 0
            else "rescale them (bytes: divide by 255 or save as uint8)"
        )
        raise InputError(
            f"{label} has values from {low:g} to {high:g}, allowed are floats in [0, 1]: {hint}"
        )


def _fit(images: np.ndarray, label: str, reading: Reading) -> np.ndarray:
    _, channels, height, width = images.shape
    if reading.size is None and height != width:
        raise InputError(
            f"{label} has images of {width}x{height}, not square: "
            "pass --size N to crop and resize them"
        )
    shape = (reading.channels or channels, reading.size or height, reading.size or width)
    dtype = np.dtype(np.uint8 if images.dtype == np.uint8 else np.float32)
    if images.shape[1:] == shape and images.dtype == dtype:
        return images
    fitted = reading.allocate((len(images), *shape), dtype)
    for rows in blocks(images):
        fitted[rows] = _resized(_with_channels(images[rows].astype(dtype), shape[0]), shape[1])
    return fitted


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
        [np.asarray(center_square_resize(Image.fromarray(plane), size)) for plane in planes]
    )
    # Bicubic interpolation overshoots at edges.
    in_range = resized if images.dtype == np.uint8 else resized.clip(0, 1)
    return in_range.reshape(*images.shape[:2], size, size)
