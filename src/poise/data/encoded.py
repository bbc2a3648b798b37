"""Decode image files of a folder or of the Hub into one array, in threads.

Threads work in parallel because Pillow releases Python's lock while it decodes.
"""

import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from io import BytesIO
from itertools import accumulate, count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from poise.data.dataset import Reading, levels_note, shortened
from poise.data.decoding import (
    ALIGNED,
    Header,
    common_white,
    counts_above,
    crop_and_resize,
    decoded,
    deep_pixels,
    has_deep_colour,
    header_of,
    square_resize,
)
from poise.data.opening import (
    Picture,
    RefusedError,
    allow_megapixels,
    collecting_warnings,
    named,
    opened,
    remark,
)
from poise.data.storage import Pixels, Rows, room
from poise.data.streamed import Pictures, Seen
from poise.errors import InputError
from poise.support.progress import SafeStream, plural, progress

# Files per call of the thread pool: limits the pending results, and the delay of an interrupt.
_FILES_AT_ONCE = 512
# Memory of the pictures that are decoded at the same time.
_BYTES_AT_ONCE = 2**30
# Pillow takes 4 bytes per pixel, for the picture and for its crop.
_BYTES_PER_PIXEL = 8
_ANIMATED = ("GIF", "WEBP", "PNG", "AVIF", "HEIF")
_REDUCED_OR_MASK = 0b101  # of TIFF's NewSubfileType: a smaller copy of a page, or its mask


@dataclass(frozen=True)
class Encoded:
    """An image file that is not decoded yet.

    Attributes:
        label: the name of the file in messages.
        open: returns its path or its content.
        path: of the file that it is, or that holds it.
        pages: the pages of the file that are images.
    """

    label: str
    open: Callable[[], Path | BytesIO]
    path: Path | None = None
    pages: tuple[int, ...] = (0,)

    def page_label(self, page: int) -> str:
        return self.label if len(self.pages) == 1 else f"{self.label} (page {page + 1})"


class Decoded(NamedTuple):
    """Decoded image files.

    Attributes:
        images: (n, channels, side, side), uint8; with `Reading.stream` decoded when they are read.
        positions: (n,), the position of each image's file in the list of files.
        names: (n,), the label of each image's file, and its page if there are several.
        notes, levels, skipped: see `Dataset`.
    """

    images: Pixels
    positions: np.ndarray
    names: tuple[str, ...]
    notes: tuple[str, ...]
    levels: int | None
    skipped: tuple[str, ...]


class _Form(NamedTuple):
    channels: int
    size: int


@dataclass
class _Work:
    """The files, and what is known about them so far.

    Attributes:
        files, reading: as given.
        errors: the reason why a page cannot be decoded, by position of the file and page.
        remarks: warnings about files, by label.
        frames: number of frames that are not read, by label.
        counts: of each 16-bit page, see `counts_above`.
        clipped: number of values above white, of each page with such values.
        deep_colours: labels of pages of 16-bit colour.
    """

    files: Sequence[Encoded]
    reading: Reading
    errors: dict[tuple[int, int], InputError] = field(default_factory=dict)
    remarks: dict[str, str] = field(default_factory=dict)
    frames: dict[str, int] = field(default_factory=dict)
    counts: dict[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    clipped: dict[tuple[int, int], int] = field(default_factory=dict)
    deep_colours: set[str] = field(default_factory=set)


def decode(files: Sequence[Encoded], reading: Reading) -> Decoded:
    """Decode all files to one size and one number of channels.

    Every page of a TIFF file is an image. Without a size in `reading`, the size is that of the
    files. Without a number of channels, images are grey if all files are grey, and RGB otherwise.
    The first pass reads headers, if size or channels are unknown or there are TIFF files. The
    second pass reads the pixels. If `reading` has no `levels`, a third pass reads 16-bit pages
    again, because their scale depends on all of them. With `reading.stream` the second pass keeps
    only as many images as fit into memory.

    Raises:
        InputError: a file cannot be decoded and `reading` does not skip such files; `reading` gives
            no size and the files are not all of one square size; no file can be decoded.
    """
    work = _Work(files, reading)
    with collecting_warnings(reading.max_megapixels):
        _list_pages(work)
        files, form = work.files, _form(work)
        first = [0, *accumulate(len(file.pages) for file in files)]
        shape = (first[-1], form.channels, form.size, form.size)
        images = (
            Seen(shape, room(reading.memory_budget) // 2)
            if reading.stream
            else reading.allocate(shape, np.dtype(np.uint8))
        )
        levels = reading.levels

        def fill(image: Picture, position: int, page: int) -> None:
            deep = deep_pixels(image) if levels is None else None
            if deep is not None:
                work.counts[position, page] = counts_above(deep.visible)
                return
            row = first[position] + files[position].pages.index(page)
            images[row] = _pixels(image, form, work, (position, page), levels)

        _each_page(fill, range(len(files)), work, "decoding images", _Room(_BYTES_AT_ONCE))
        if work.counts:
            levels = common_white([*work.counts.values()])
            deep = sorted({position for position, _ in work.counts})
            _each_page(fill, deep, work, "scaling 16-bit images", _Room(_BYTES_AT_ONCE))
    rows = [(position, page) for position, file in enumerate(files) for page in file.pages]
    kept = [row for row, place in enumerate(rows) if place not in work.errors]
    if isinstance(images, Seen):
        pictures = _streamed(work, form, levels, [rows[row] for row in kept], images, kept)
    else:
        for row, source in enumerate(kept if work.errors else ()):
            images[row] = images[source]
        pictures = images[: len(kept)]
    positions = np.array([rows[row][0] for row in kept], int)
    names = tuple(
        files[position].page_label(page) for position, page in map(rows.__getitem__, kept)
    )
    skipped = tuple(str(work.errors[place]) for place in sorted(work.errors))
    notes = tuple(_notes(work, levels))
    return Decoded(pictures, positions, names, notes, levels, skipped)


def _streamed(
    work: _Work,
    form: _Form,
    levels: int | None,
    places: Sequence[tuple[int, int]],
    seen: Seen,
    kept: Sequence[int],
) -> Rows:
    """Return images that are decoded when they are read, unless they are in memory.

    Args:
        work, form, levels: how they are decoded.
        places: the position of the file, and the page, of each image.
        seen: what the pass over all pages kept.
        kept: the row of each image in that pass.
    """
    allow_megapixels(work.reading.max_megapixels)
    room = _Room(_BYTES_AT_ONCE)

    def read(row: int) -> np.ndarray:
        position, page = places[row]
        file = work.files[position]
        with (
            opened(file.open(), file.page_label(page)) as image,
            room.taken_by(image),
        ):
            if file.pages != (0,):
                image.seek(page)
            return _pixels(image, form, work, (position, page), levels)

    pictures = Pictures(seen, np.array(kept, int), read, available_cores())
    return Rows(pictures, np.arange(len(kept)))


def _list_pages(work: _Work) -> None:
    """Replace each TIFF file in `work` by the same with all its pages."""
    listed = [
        position
        for position, file in enumerate(work.files)
        if Path(file.label).suffix.lower() in (".tif", ".tiff")
    ]
    found: dict[int, Encoded] = {}

    def pages(image: Any, position: int, _: int) -> None:
        if image.format != "TIFF":
            return
        kept: list[int] = []
        for page in count():
            try:
                image.seek(page)
            except EOFError:
                break
            except Exception:
                remark(f"its page {page + 1} is damaged: only the pages before it are read")
                break
            if not image.tag_v2.get(254, 0) & _REDUCED_OR_MASK:
                kept.append(page)
        found[position] = replace(work.files[position], pages=tuple(kept) or (0,))

    _each_page(pages, listed, work, "listing pages")
    work.files = [found.get(position, file) for position, file in enumerate(work.files)]


def _form(work: _Work) -> _Form:
    reading = work.reading
    if reading.size and reading.channels:
        return _Form(reading.channels, reading.size)
    headers: dict[tuple[int, int], Header] = {}

    def header(image: Picture, position: int, page: int) -> None:
        headers[position, page] = header_of(image)

    _each_page(header, range(len(work.files)), work, "reading headers")
    if not headers:
        raise InputError(
            f"none of the {len(work.files)} images can be decoded: "
            f"{next(iter(work.errors.values()), 'there are none')}"
        )
    grey = all(header.grey for header in headers.values())
    in_order = {
        work.files[position].page_label(page): headers[position, page]
        for position, page in sorted(headers)
    }
    return _Form(reading.channels or (1 if grey else 3), reading.size or _common_side(in_order))


def _common_side(headers: dict[str, Header]) -> int:
    (first, size), *others = [(label, f"{h.width}x{h.height}") for label, h in headers.items()]
    other = next(((label, s) for label, s in others if s != size), None)
    remedy = "pass --size N to crop and resize all images to N x N"
    if other:
        raise InputError(
            f"images differ in size: {first} is {size} and {other[0]} is {other[1]}; {remedy}"
        )
    width, height, _ = next(iter(headers.values()))
    if width != height:
        which = f"{first} and {others[0][0]} are" if others else f"{first} is"
        raise InputError(f"images are not square: {which} {size}; {remedy}")
    return width


def _pixels(
    image: Picture, form: _Form, work: _Work, place: tuple[int, int], levels: int | None
) -> np.ndarray:
    reading, label = work.reading, work.files[place[0]].page_label(place[1])
    if has_deep_colour(image):
        work.deep_colours.add(label)
    if image.format in _ANIMATED:
        with suppress(Exception):  # a damaged second frame
            if (frames := getattr(image, "n_frames", 1)) > 1:
                work.frames[label] = frames - 1
    picture, clipped = decoded(image, "L" if form.channels == 1 else "RGB", levels)
    if clipped:
        work.clipped[place] = clipped
    if reading.crop == "celeba" or (reading.crop == "aligned" and picture.size == ALIGNED):
        picture = _celeba_face(picture, form.size, label)
    elif reading.size:
        picture = square_resize(picture, form.size)
    pixels = np.asarray(picture).reshape(form.size, form.size, form.channels)
    return pixels.transpose(2, 0, 1)


def _celeba_face(image: Picture, size: int, label: str) -> Picture:
    try:
        return crop_and_resize(image, size=size)
    except InputError as error:
        raise InputError(f"{label}: {error}") from error


def _notes(work: _Work, levels: int | None) -> Iterator[str]:
    """Yield the notes for the user: what is not as the files say, and what is not read."""
    files = work.files
    if work.counts or work.clipped:
        yield levels_note(
            "16-bit files" if work.counts else "images",
            levels or 0,
            clipped=sum(work.clipped.values()),
            images=len(work.clipped),
            chosen=bool(work.counts),
        )
    if work.deep_colours:
        number = plural(len(work.deep_colours), "image")
        yield f"{number} of 16-bit colour: read with 8 bits a channel, so that 4,095 became 15"
    stacks = [len(file.pages) for file in files if len(file.pages) > 1]
    if stacks:
        yield f"{plural(len(stacks), 'TIFF file')} with {sum(stacks)} pages: each is an image"
    endings = Counter(Path(label).suffix.lower() for label in work.frames)
    for ending, number in sorted(endings.items()):
        lost = sum(n for label, n in work.frames.items() if Path(label).suffix.lower() == ending)
        yield (
            f"only the first frame is read of {plural(number, f'{ending} file')}: "
            f"{plural(lost, 'other frame')}"
        )
    errors = (str(work.errors[place]) for place in sorted(work.errors))
    yield from shortened([f"skipped: {error}" for error in errors], "skipped", "file")
    warned = sorted(f"{label}: {text}" for label, text in work.remarks.items())
    yield from shortened(warned, "warnings about", "file")


class _Room:
    """Limits the memory of the pictures that threads decode at the same time."""

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._changed = limit, 0, threading.Condition()

    @contextmanager
    def taken_by(self, image: Picture) -> Iterator[None]:
        """Wait until there is room for a picture. A picture larger than the limit goes alone."""
        size = image.width * image.height * _BYTES_PER_PIXEL
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._changed:
                self._used -= size
                self._changed.notify_all()


def _each_page(
    visit: Callable[[Picture, int, int], None],
    positions: Sequence[int],
    work: _Work,
    title: str,
    room: _Room | None = None,
) -> None:
    """Call `visit` with each page, its file's position and its number, in threads.

    Raises:
        InputError: a file or page cannot be read, and `work.reading` does not skip such files.
    """

    def attempt(position: int) -> InputError | None:
        file, first_error = work.files[position], None
        if all((position, page) in work.errors for page in file.pages):
            return None
        try:
            with opened(file.open(), file.label, work.remarks) as image:
                for page in file.pages:
                    try:
                        with (
                            named(file.page_label(page), work.remarks),
                            room.taken_by(image) if room else nullcontext(),
                        ):
                            if file.pages != (0,):
                                image.seek(page)
                            visit(image, position, page)
                    except InputError as error:
                        work.errors[position, page] = error
                        first_error = first_error or error
        except InputError as error:
            work.errors |= {(position, page): error for page in file.pages}
            return error
        return first_error

    quiet = not SafeStream(sys.stderr).isatty()
    with (
        progress(title, len(positions), quiet=quiet) as bar,
        ThreadPoolExecutor(available_cores()) as threads,
    ):
        for start in range(0, len(positions), _FILES_AT_ONCE):
            batch = positions[start : start + _FILES_AT_ONCE]
            for error in threads.map(attempt, batch):
                if error is not None and not work.reading.skip_unreadable:
                    remedy = "; " if isinstance(error, RefusedError) else "; repair or remove it, "
                    raise InputError(f"{error}{remedy}or pass --skip-unreadable") from error
            bar.update(start + len(batch), {})


def available_cores() -> int:
    """Return how many cores this process may use: its affinity and its container limit them."""
    from joblib import cpu_count

    return cpu_count()
