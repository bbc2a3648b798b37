"""Load images from any source, with `load` (split into train and test) or `read_images`."""

from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from poise.data.arrays import as_images, read_npy, read_npz
from poise.data.dataset import (
    Dataset,
    FileOrder,
    Found,
    Reading,
    check_enough,
    count_shared,
    split_by_content,
)
from poise.data.decoding import jpeg_round_trip
from poise.data.folders import IMAGE_ENDINGS, read_files, read_folder
from poise.data.hub import read_hub
from poise.data.layouts import find_layouts
from poise.data.names import read_named
from poise.data.storage import Pixels, Rows, blocks, take
from poise.errors import InputError, MissingInputError
from poise.variants import DATA_SETS

HUB_PREFIX = "hf:"


def load(
    source: str | Path | np.ndarray | Tensor,
    *,
    size: int | None = None,
    channels: int | None = None,
    data_dir: str | Path | None = None,
    skip_unreadable: bool = False,
    jpeg_quality: int | None = None,
    file_order: FileOrder = "sorted",
    memory_budget: int | None = None,
    cache: Path | None = None,
) -> Dataset:
    """Load the images of a source and split them into train and test.

    An official split is kept. Otherwise one image in ten (at most 10,000) is for testing, chosen by
    a hash of the pixels: see `poise.data.dataset`.

    Args:
        source: one of

            - a key of `DATA_SETS` (for a folder of that name write ./mnist, or pass a Path);
            - a folder of images, or torchvision's folder of MNIST, CIFAR-10 or CelebA;
            - an .npz or .npy file;
            - "hf:owner/name" or "hf:folder";
            - an array or tensor (n, h, w), (n, h, w, c) or (n, c, h, w), uint8 or floats in [0, 1].
        size: crop each image to its central square and resize it to this side, in pixels, at least
            1. None: images must already be square and of one size.
        channels: 1 (grey) or 3 (RGB). None: keep the channels; files are grey if all of them are.
        data_dir: the data folder, for named data sets. None: the folder in the environment variable
            POISE_DATA, or ./data.
        skip_unreadable: skip files that cannot be decoded, and list them in the notes.
        jpeg_quality: encode every image as JPEG at this quality, 1 to 95, and decode it again, as
            the released CIFAR-10 loader does (75). None: do not.
        file_order: of CelebA's split: "sorted" (official), or "listing", the order of the file
            system, as in the released code.
        memory_budget: bytes of decoded images above which they go to a temporary file. None: half
            of the free memory.
        cache: folder for that file, which is deleted with the images. None: the system's folder for
            temporary files.

    Raises:
        MissingInputError: the source does not exist, or a named data set is not available.
        MissingExtraError: "hf:" needs the `datasets` library, which is not installed.
        InputError: the images or options are invalid; the message names the file and the remedy.
        RunError: the decoded images do not fit on the disk.

    Example:
        >>> load("digits").shape
        (1, 8, 8)
    """
    reading = Reading(
        size, channels, skip_unreadable, jpeg_quality, file_order, memory_budget, cache
    )
    found = _find(source, data_dir, reading)
    if found.file_order != file_order:
        raise InputError(
            f'file_order "{file_order}" is for CelebA\'s folder of .jpg files, '
            f"which {found.source} is not: leave file_order out"
        )
    train, test = _split(found)
    notes = list(found.notes)
    if (
        found.test is not None
        and found.name not in DATA_SETS
        and (shared := count_shared(train, test))
    ):
        notes.append(f"{shared} of {len(test)} test images also occur in training")
    if jpeg_quality is not None:
        train, test = _through_jpeg(train, reading), _through_jpeg(test, reading)
        notes.append(f"every image went through JPEG at quality {jpeg_quality}")
    if file_order == "listing":
        notes.append(
            "split by the order in which the file system lists the files, not the official one"
        )
    return Dataset(found.name, train, test, found.source, tuple(notes))


def read_images(
    source: str | Path | np.ndarray | Tensor,
    *,
    size: int | None = None,
    channels: int | None = None,
    side: Literal["train", "test"] = "test",
) -> Pixels:
    """Read the images of a source without splitting them, for uses other than training.

    Args:
        source: as for `load`, or a single image file.
        size: side in pixels to crop and resize to; None: images must be square and of one size.
        channels: 1 (grey) or 3 (RGB); None: keep the channels.
        side: the side of an official split to return.

    Returns:
        (n, channels, side, side), any number of images: one side of an official split, otherwise
        all images.

    Raises:
        InputError: see `load`.
    """
    return find_images(source, size=size, channels=channels, side=side)[0]


def find_images(
    source: str | Path | np.ndarray | Tensor,
    *,
    size: int | None = None,
    channels: int | None = None,
    side: Literal["train", "test"] = "test",
) -> tuple[Pixels, Literal["train", "test", "given"]]:
    """Return the images of `read_images`, and the side of the official split that they are.

    Without an official split the side is "given": all images of the source.
    """
    reading = Reading(size=size, channels=channels)
    if (
        isinstance(source, (str, Path))
        and Path(source).is_file()
        and Path(source).suffix.lower() in IMAGE_ENDINGS
    ):
        return read_files([Path(source)], [], reading)[0], "given"
    found = _find(source, None, reading)
    if found.test is None:
        return found.train, "given"
    return (found.train if side == "train" else found.test), side


def _find(
    source: str | Path | np.ndarray | Tensor, data_dir: str | Path | None, reading: Reading
) -> Found:
    if isinstance(source, (np.ndarray, Tensor)):
        array = source if isinstance(source, np.ndarray) else _to_numpy(source)
        return Found("array", as_images(array, "the array", reading), None, "array")
    if isinstance(source, Path):
        return _read_path(source.expanduser(), reading)
    if not isinstance(source, str):
        raise InputError(
            f"images must be a path, a name, an array or a tensor, not {type(source).__name__}"
        )
    if source in DATA_SETS:
        return read_named(source, data_dir, reading)
    if source.startswith(HUB_PREFIX):
        return read_hub(source.removeprefix(HUB_PREFIX), reading)
    return _read_path(Path(source).expanduser(), reading) if source else _read_nothing(source)


def _to_numpy(images: Tensor) -> np.ndarray:
    images = images.detach().cpu()
    # numpy has no bfloat16.
    return (images.float() if images.dtype == torch.bfloat16 else images).numpy()


def _read_path(path: Path, reading: Reading) -> Found:
    if path.is_dir():
        return _read_folder(path, reading)
    if not path.exists():
        return _read_nothing(str(path))
    if path.suffix == ".npy":
        return read_npy(path, reading)
    if path.suffix == ".npz":
        return read_npz(path, reading)
    raise InputError(
        f"{path} is a single file: "
        "give a folder of images, or an .npy or .npz file (unpack archives first)"
    )


def _read_folder(folder: Path, reading: Reading) -> Found:
    layouts = find_layouts(folder)
    if len(layouts) > 1:
        places = " or ".join(str(path) for _, path in layouts)
        raise InputError(f"{folder} holds {len(layouts)} data sets: name one, {places}")
    return layouts[0][0](layouts[0][1], reading) if layouts else read_folder(folder, reading)


def _read_nothing(source: str) -> Found:
    close = get_close_matches(source.lower().replace("_", "-"), DATA_SETS, 1)
    guess = f" (did you mean {close[0]}?)" if close else ""
    known = (
        f"a folder of images, an .npz or .npy file, hf:owner/name, or one of {', '.join(DATA_SETS)}"
    )
    raise MissingInputError(f"{source!r} does not exist{guess}: give {known}")


def _split(found: Found) -> tuple[Pixels, Pixels]:
    count = len(found.train) + (0 if found.test is None else len(found.test))
    check_enough(count)
    if found.test is None:
        train, test = split_by_content(found.train)
        return take(found.train, train), take(found.train, test)
    if not len(found.train) or not len(found.test) or found.train.shape[1:] != found.test.shape[1:]:
        shapes = f"training images {found.train.shape} and test images {found.test.shape}"
        raise InputError(
            f"{found.source}: {shapes} do not go together: both need images, of one shape"
        )
    return found.train, found.test


def _through_jpeg(images: Pixels, reading: Reading) -> Pixels:
    if images.dtype != np.uint8:
        raise InputError(
            "jpeg_quality is for bytes, and these images are floats: "
            "save them as uint8, or leave it out"
        )
    stored = reading.allocate(images.shape, images.dtype)
    for rows in blocks(images):
        stored[rows] = jpeg_round_trip(
            torch.from_numpy(np.array(images[rows])), reading.jpeg_quality or 75
        ).numpy()
    return stored


def checked_images(images: Any, shape: Sequence[int]) -> Any:
    """Check images for a network that takes images of `shape`, and return them as NCHW.

    Args:
        images: an array or tensor (n, channels, height, width), (n, height, width) or (n, height,
            width, channels), uint8 or floats in [0, 1]; or `Rows`, which are returned as they are.
        shape: channels, height, width of the images that the network takes.

    Raises:
        InputError: the shape or the type differs, a float is outside [0, 1], or there are no
            images.
    """
    if isinstance(images, Rows):  # the reader checked their values
        _check_shape(images, shape)
        return images
    images = images if isinstance(images, Tensor) else np.asarray(images)
    if len(images.shape) in (3, 4) and list(images.shape[1:]) != list(shape):
        with suppress(InputError):
            images = read_images(images)
    _check_shape(images, shape)
    if images.dtype not in (torch.uint8, np.uint8):
        least, most = float(images.min()), float(images.max())
        if not ("float" in str(images.dtype) and least >= 0 and most <= 1):
            given = f"{images.dtype} from {least:g} to {most:g}"
            raise InputError(f"images must be bytes or floats in [0, 1], not {given}")
    return images


def _check_shape(images: Any, shape: Sequence[int]) -> None:
    if list(images.shape[1:]) != list(shape):
        wanted = f"(n, {', '.join(map(str, shape))})"
        raise InputError(f"images must have shape {wanted}, not {tuple(images.shape)}")
    if not len(images):
        raise InputError("there are no images")
