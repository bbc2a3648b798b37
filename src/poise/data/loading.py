"""Load images from any source, with `load` (split into train and test) or `read_images`."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from poise.data.arrays import ROUNDING, as_split, read_npy, read_npz
from poise.data.dataset import (
    Crop,
    Dataset,
    FileOrder,
    Found,
    Reading,
    check_enough,
    count_shared,
    split_by_content,
)
from poise.data.decoding import jpeg_round_trip
from poise.data.folders import read_files, read_folder, read_tars
from poise.data.hub import read_hub
from poise.data.labels import HOW, Labels, as_labels, labels_of
from poise.data.layouts import find_layouts
from poise.data.listing import is_image
from poise.data.names import read_named
from poise.data.opening import shown
from poise.data.storage import Pixels, Rows, blocks, take
from poise.data.streamed import Pictures
from poise.data.tars import is_tar, refuse_compressed
from poise.errors import InputError, MissingInputError
from poise.support.progress import warn
from poise.variants import DATA_SETS

HUB_PREFIX = "hf:"
NARROW = 0.1  # images that use less of the range look black, or like fog
WIDE = ("uint16", "bool")  # types of arrays that become bytes
CHECK_RANGE = "check the range"  # the beginning of such a note


def load(
    source: str | Path | np.ndarray | Tensor,
    *,
    size: int | None = None,
    channels: int | None = None,
    data_dir: str | Path | None = None,
    skip_unreadable: bool = False,
    jpeg_quality: int | None = None,
    file_order: FileOrder = "sorted",
    levels: int | None = None,
    max_megapixels: int | None = None,
    memory_budget: int | None = None,
    cache: Path | None = None,
    stream: bool = False,
    labels: Any = None,
) -> Dataset:
    """Load the images of a source and split them into train and test.

    An official split is kept. Otherwise one image in ten (at most 10,000) is for testing, chosen by
    a hash of the pixels: see `poise.data.dataset`.

    Args:
        source: one of

            - a key of `DATA_SETS` (for a folder of that name write ./mnist, or pass a Path);
            - a folder of images, or torchvision's folder of MNIST, CIFAR-10 or CelebA;
            - a tar file of images, or a folder of such files;
            - an .npz or .npy file;
            - "hf:owner/name" or "hf:folder";
            - an array or tensor (n, h, w), (n, h, w, c) or (n, c, h, w): bytes, booleans, 16-bit
              integers, or floats in [0, 1].
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
        levels: the value that becomes white, such as 4095 for 12 bits, or 1 for masks of 0 and 1.
            Larger values become white, too. Files and arrays whose type cannot hold the value are
            not scaled, nor are floats in [0, 1]. None: 255 for bytes. For 16 bits the smallest of
            255, 1023, 4095, 16383 and 65535 that holds 99.9 % of the values of every image.
        max_megapixels: refuse larger image files, in megapixels, at least 1. None: 179.
        memory_budget: bytes of decoded images above which they go to a temporary file, or twice
            those that `stream` keeps. None: half of the free memory.
        cache: folder for that file, which is deleted with the images, and for the decoded images of
            a folder that takes seconds to decode, which are kept for the next call. None: the
            system's folder for temporary files, and nothing is kept.
        stream: keep decoded images in memory only, as many as fit. The others are decoded again
            whenever they are read. Only for image files, in folders, tar files or data sets of the
            Hub.
        labels: True: read the classes of the images: the folders they are in, y_train and y_test of
            an .npz file, the labels of torchvision's files and of the Hub's ClassLabel. Or the
            label of each image of an array: (n,), whole numbers or text. None: no labels.

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
        size=size,
        channels=channels,
        skip_unreadable=skip_unreadable,
        jpeg_quality=jpeg_quality,
        file_order=file_order,
        levels=levels,
        max_megapixels=max_megapixels,
        memory_budget=memory_budget,
        cache=cache,
        stream=stream,
        labels=labels is True,
    )
    found = _find(source, data_dir, reading)
    if stream and not _is_streamed(found.split.train):
        raise InputError(
            f"stream is for image files in folders, tar files or data sets of the Hub, "
            f"which {found.source} is not: leave it out"
        )
    if labels is not None and not isinstance(labels, bool):
        found = _labelled(found, labels)
    if found.file_order != file_order:
        raise InputError(
            f'file_order "{file_order}" is for CelebA\'s folder of .jpg files, '
            f"which {found.source} is not: leave file_order out"
        )
    train, test, classes = _split(found)
    if labels is not None and labels is not False and classes is None:
        raise InputError(f"{found.source} has no labels: {HOW}")
    notes = [*range_notes(train, test), *found.notes, *found.split.notes]
    if (
        found.split.test is not None
        and not (isinstance(source, str) and source in DATA_SETS)
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
    return Dataset(
        found.name,
        train,
        test,
        found.source,
        tuple(notes),
        found.split.levels,
        found.split.skipped,
        classes,
    )


def _labelled(found: Found, labels: Any) -> Found:
    """Return the images of an array with the label of each."""
    if found.source != "array":
        raise InputError(
            f"{found.source} is not an array: labels=True reads its labels, and an array of "
            "labels is for an array of images"
        )
    values = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else labels
    given = as_labels(values, len(found.split.train), "labels")
    return replace(found, split=found.split._replace(labels=given))


def range_notes(*parts: Pixels) -> Iterator[str]:
    """Yield a note if images use less than `NARROW` of the range of their values."""
    whole = 255 if parts[0].dtype == np.uint8 else 1
    low, high = np.inf, -np.inf
    for block in (part[rows] for part in parts for rows in blocks(part)):
        low, high = min(low, float(block.min())), max(high, float(block.max()))
        if high - low >= NARROW * whole:
            return
    if high < low:  # no images
        return
    span = f"{low:.4g} to {high:.4g} of 0 to {whole}"
    if whole == 1:
        remedy = "if they were divided by 255 twice, multiply them by 255"
    else:
        remedy = (
            f"if {high:.0f} means white, pass --levels {high:.0f}" if high else "they are black"
        )
    yield f"{CHECK_RANGE}: the images use only the values from {span}; {remedy}"


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
    return find_images(source, size=size, channels=channels, side=side).images


class Given(NamedTuple):
    """Images for uses other than training.

    Attributes:
        images: (n, channels, side, side).
        side: the side of the official split that they are; "given": all images of the source.
        notes: what the reader skipped, ignored or changed.
        names: of each image: its path inside the folder, or its array and row. Empty for a test
            side alone.
        sides: of each image: train, test or val, or an empty text without an official split.
        labels: the class of each image. Empty: not asked for, or the source has none.
    """

    images: Pixels
    side: Literal["train", "test", "given"]
    notes: tuple[str, ...]
    names: tuple[str, ...]
    sides: tuple[str, ...]
    labels: tuple[str, ...] = ()


def find_images(
    source: str | Path | np.ndarray | Tensor,
    *,
    size: int | None = None,
    channels: int | None = None,
    side: Literal["train", "test", "all"] = "test",
    skip_unreadable: bool = False,
    levels: int | None = None,
    max_megapixels: int | None = None,
    labels: bool = False,
    crop: Crop = "square",
) -> Given:
    """Return the images of `read_images`, with their names and what the user has to know.

    Args:
        source, size, channels: see `read_images`.
        side: the side of an official split to return, or "all": the images of all sides.
        skip_unreadable, levels, max_megapixels: see `load`.
        labels: also return the class of each image, if the source has them. With `side` "all".
        crop: "aligned": pictures of 178x218 pixels are CelebA's aligned faces and get their crop.

    Raises:
        InputError: see `load`.
    """
    reading = Reading(
        size=size,
        channels=channels,
        skip_unreadable=skip_unreadable,
        levels=levels,
        max_megapixels=max_megapixels,
        whole=side == "all",
        labels=labels,
        crop=crop,
    )
    path = Path(source).expanduser() if isinstance(source, (str, Path)) else None
    if path is not None and path.is_file() and is_image(path):
        split = read_files([path], [], reading)
        notes = (*range_notes(split.train), *split.notes)
        return Given(split.train, "given", notes, split.names, ("",) * len(split.train))
    found = _find(source, None, reading)
    split, notes = found.split, [*found.notes, *found.split.notes]
    if side == "all" or split.test is None:
        sides = split.sides or ("",) * len(split.train)
        notes = (*range_notes(split.train), *notes)
        classes = () if split.labels is None else tuple(map(str, split.labels.tolist()))
        return Given(split.train, "given", notes, split.names, sides, classes)
    images = split.train if side == "train" else split.test
    total = len(split.train) + len(split.test)
    part = f"{found.source}: {len(images)} of {total} images, those for {side}"
    names = split.names if side == "train" else ()
    return Given(images, side, (*range_notes(images), part, *notes), names, (side,) * len(images))


def _find(
    source: str | Path | np.ndarray | Tensor, data_dir: str | Path | None, reading: Reading
) -> Found:
    if isinstance(source, (np.ndarray, Tensor)):
        array = source if isinstance(source, np.ndarray) else to_numpy(source)
        return Found("array", as_split({"the array": array}, reading), "array")
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


def to_numpy(images: Tensor) -> np.ndarray:
    """Return a tensor on any device as an array. bfloat16 becomes float32."""
    images = images.detach().cpu()
    return (images.float() if images.dtype == torch.bfloat16 else images).numpy()


def _read_path(path: Path, reading: Reading) -> Found:
    if path.is_dir():
        return _read_folder(path, reading)
    if not path.exists():
        return _read_nothing(str(path))
    if path.suffix.lower() == ".npy":
        return read_npy(path, reading)
    if path.suffix.lower() == ".npz":
        return read_npz(path, reading)
    if is_tar(path):
        return read_tars([path], path.parent, reading)
    refuse_compressed(path)
    raise InputError(
        f"{shown(path)} is a single file: "
        "give a folder of images, or a .tar, .npy or .npz file (unpack other archives first)"
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
        "a folder of images, a .tar, .npz or .npy file, hf:owner/name, "
        f"or one of {', '.join(DATA_SETS)}"
    )
    raise MissingInputError(f"{source!r} does not exist{guess}: give {known}")


def _split(found: Found) -> tuple[Pixels, Pixels, Labels | None]:
    train, test = found.split.train, found.split.test
    classes, test_classes = found.split.labels, found.split.test_labels
    check_enough(len(train) + (0 if test is None else len(test)))
    if test is None:
        rows, test_rows = split_by_content(train)
        labels = (
            None if classes is None else labels_of(classes[rows], classes[test_rows], found.source)
        )
        return take(train, rows), take(train, test_rows), labels
    if not len(train) or not len(test) or train.shape[1:] != test.shape[1:]:
        shapes = f"training images {train.shape} and test images {test.shape}"
        raise InputError(
            f"{found.source}: {shapes} do not go together: both need images, of one shape"
        )
    if classes is None or test_classes is None:
        return train, test, None
    return train, test, labels_of(classes, test_classes, found.source)


def _is_streamed(images: Pixels) -> bool:
    return isinstance(images, Rows) and isinstance(images.array, Pictures)


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


def checked_images(images: Any, shape: Sequence[int], levels: int | None = None) -> Any:
    """Check images for a network that takes images of `shape`, and return them as NCHW.

    Args:
        images: an array or tensor (n, channels, height, width), (n, height, width) or (n, height,
            width, channels), uint8 or floats in [0, 1]; or `Rows`, which are returned as they are.
            Booleans and 16-bit integers are converted to bytes.
        shape: channels, height, width of the images that the network takes.
        levels: the value of 16-bit integers that becomes white; see `load`. Bytes have the
            network's scale already, and a warning says so if they do not exceed this value.

    Raises:
        InputError: the shape or the type differs, a float is outside [0, 1], or there are no
            images.
    """
    if isinstance(images, Rows):  # the reader checked their values
        _check_shape(images, shape)
        return images
    images = images if isinstance(images, Tensor) else np.asarray(images)
    wide = images.dtype in (torch.uint16, torch.bool) or getattr(images.dtype, "name", "") in WIDE
    if wide or (len(images.shape) in (3, 4) and list(images.shape[1:]) != list(shape)):
        try:
            # Bytes and floats have the network's scale.
            images = find_images(images, levels=levels if wide else None).images
        except InputError:  # the checks below name what is wrong with other shapes
            if list(images.shape[1:]) == [*shape[1:], shape[0]]:
                raise
    _check_shape(images, shape)
    if images.dtype in (torch.uint8, np.uint8):
        if levels is not None and levels < 255 and 0 < (most := int(images.max())) <= levels:
            warn(
                f"the bytes reach only {most}, and are taken as values from 0 to 255; the images "
                f"of training had values from 0 to {levels}. If these have, too, divide them by "
                f"{levels} and pass floats"
            )
    else:
        least, most = float(images.min()), float(images.max())
        if not ("float" in str(images.dtype) and least >= -ROUNDING and most <= 1 + ROUNDING):
            given = f"{images.dtype} from {least:.9g} to {most:.9g}"
            raise InputError(f"images must be bytes or floats in [0, 1], not {given}")
        if least < 0 or most > 1:
            return images.clip(0, 1)
    return images


def _check_shape(images: Any, shape: Sequence[int]) -> None:
    if list(images.shape[1:]) != list(shape):
        wanted = f"(n, {', '.join(map(str, shape))})"
        raise InputError(f"images must have shape {wanted}, not {tuple(images.shape)}")
    if not len(images):
        raise InputError("there are no images")
