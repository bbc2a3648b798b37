"""Decode image files of a folder or of the Hub into one array, in threads.

Threads work in parallel because Pillow releases Python's lock while it decodes.
"""

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np

from poise.data.dataset import Reading
from poise.data.decoding import (
    Header,
    Picture,
    center_square_resize,
    crop_and_resize,
    read_header,
    read_image,
)
from poise.errors import InputError
from poise.support.progress import SafeStream, progress

Result = TypeVar("Result")

# Files per call of the thread pool: limits the pending results, and the delay of an interrupt.
_FILES_AT_ONCE = 512


class Encoded(NamedTuple):
    """An image file that is not decoded yet.

    Attributes:
        label: the name of the file in messages.
        open: returns its path or its content.
    """

    label: str
    open: Callable[[], Path | BytesIO]


class Decoded(NamedTuple):
    """Decoded image files.

    Attributes:
        images: (n, channels, side, side), uint8.
        positions: (n,), the position of each image in the list of files.
        notes: one note for each skipped file.
    """

    images: np.ndarray
    positions: np.ndarray
    notes: tuple[str, ...]


class _Form(NamedTuple):
    channels: int
    size: int


def decode(files: Sequence[Encoded], reading: Reading) -> Decoded:
    """Decode all files to one size and one number of channels.

    Without a size in `reading`, the size is that of the files. Without a number of channels, images
    are grey if all files are grey, and RGB otherwise. The first pass reads the headers, if size or
    channels are unknown. The second pass reads the pixels.

    Raises:
        InputError: a file cannot be decoded and `reading` does not skip such files; `reading` gives
            no size and the files are not all of one square size; no file can be decoded.
    """
    errors: dict[int, InputError] = {}
    form = _form(files, reading, errors)
    images = reading.allocate((len(files), form.channels, form.size, form.size), np.dtype(np.uint8))

    def fill(position: int) -> None:
        images[position] = _pixels(files[position], form, reading)

    left = [position for position in range(len(files)) if position not in errors]
    for _ in _map_in_threads(fill, left, errors, reading, "decoding images"):
        pass
    kept = [position for position in left if position not in errors]
    for row, position in enumerate(kept if errors else ()):
        images[row] = images[position]
    notes = tuple(f"skipped: {errors[position]}" for position in sorted(errors))
    return Decoded(images[: len(kept)], np.array(kept, int), notes)


def _form(files: Sequence[Encoded], reading: Reading, errors: dict[int, InputError]) -> _Form:
    if reading.size and reading.channels:
        return _Form(reading.channels, reading.size)

    def header(position: int) -> Header:
        return read_header(files[position].open(), files[position].label)

    headers = dict(_map_in_threads(header, range(len(files)), errors, reading, "reading headers"))
    if not headers:
        raise InputError(
            f"none of the {len(files)} images can be decoded: "
            f"{next(iter(errors.values()), 'there are none')}"
        )
    grey = all(header.grey for header in headers.values())
    return _Form(
        reading.channels or (1 if grey else 3), reading.size or _common_side(files, headers)
    )


def _common_side(files: Sequence[Encoded], headers: dict[int, Header]) -> int:
    (first, size), *others = [(files[k].label, f"{h.width}x{h.height}") for k, h in headers.items()]
    other = next(((label, s) for label, s in others if s != size), None)
    remedy = "pass --size N to crop and resize all images to N x N"
    if other:
        raise InputError(
            f"images differ in size: {first} is {size} and {other[0]} is {other[1]}; {remedy}"
        )
    width, height, _ = next(iter(headers.values()))
    if width != height:
        raise InputError(f"images are not square: {first} and {others[0][0]} are {size}; {remedy}")
    return width


def _pixels(file: Encoded, form: _Form, reading: Reading) -> np.ndarray:
    image = read_image(file.open(), "L" if form.channels == 1 else "RGB", file.label)
    if reading.celeba_crop:
        image = _celeba_face(image, form.size, file.label)
    elif reading.size:
        image = center_square_resize(image, form.size)
    pixels = np.asarray(image).reshape(form.size, form.size, form.channels)
    return pixels.transpose(2, 0, 1)


def _celeba_face(image: Picture, size: int, label: str) -> Picture:
    try:
        return crop_and_resize(image, size=size)
    except InputError as error:
        raise InputError(f"{label}: {error}") from error


def _map_in_threads(
    function: Callable[[int], Result],
    positions: Sequence[int],
    errors: dict[int, InputError],
    reading: Reading,
    title: str,
) -> Iterator[tuple[int, Result]]:
    """Yield (position, result) in order. Put the errors of skipped files into `errors`."""

    def attempt(position: int) -> Result | InputError:
        try:
            return function(position)
        except InputError as error:
            return error

    quiet = not SafeStream(sys.stderr).isatty()
    with (
        progress(title, len(positions), quiet=quiet) as bar,
        ThreadPoolExecutor(os.cpu_count()) as threads,
    ):
        for start in range(0, len(positions), _FILES_AT_ONCE):
            batch = positions[start : start + _FILES_AT_ONCE]
            for position, result in zip(batch, threads.map(attempt, batch), strict=True):
                if not isinstance(result, InputError):
                    yield position, result
                elif reading.skip_unreadable:
                    errors[position] = result
                else:
                    raise InputError(
                        f"{result}; repair or remove it, or pass --skip-unreadable"
                    ) from result
            bar.update(start + len(batch), {})
