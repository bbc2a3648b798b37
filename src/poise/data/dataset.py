"""The data set, and the split rule for images without an official split.

The rule: order the images by a hash of their pixels, and test on the first tenth, at most 10,000.
Identical images stay together. So the split depends on the images alone, not on file names or
order, and the two sides never overlap.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from poise.data.labels import Labels
from poise.data.storage import Pixels, Rows, allocate, blocks, take
from poise.data.streamed import HASH_BYTES, Pictures, hash_of
from poise.errors import InputError
from poise.support.progress import plural

FileOrder = Literal["sorted", "listing"]
Crop = Literal["square", "celeba", "aligned"]

FEWEST_IMAGES = 10
MOST_TEST_IMAGES = 10_000
MOST_LISTED = 5  # notes of one kind


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images to train on and images to test on.

    Attributes:
        name: shown to users.
        train, test: (n, channels, side, side), uint8 or float32 in [0, 1]: numpy arrays, or `Rows`
            of a memory-mapped file or of images that are decoded when they are read.
        source: where the images came from.
        notes: what the loader skipped, ignored or changed, one short sentence each.
        levels: the value of the source that became white, if its format leaves that open. None: the
            format says it, as for 8-bit files.
        skipped: the reason for each skipped file. The notes hold the first `MOST_LISTED`.
        labels: the classes of the images. None: they were not asked for.
        validation: training images that are held out, see `hold_out`. They are not in `train`.
            None: none are.
    """

    name: str
    train: Pixels
    test: Pixels
    source: str
    notes: tuple[str, ...] = ()
    levels: int | None = None
    skipped: tuple[str, ...] = ()
    labels: Labels | None = None
    validation: Pixels | None = None

    def __post_init__(self) -> None:
        if self.labels and len(self.labels.train) != len(self.train):
            raise InputError(
                f"{self.source} has {len(self.train)} training images and "
                f"{len(self.labels.train)} labels: give one label for each image"
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image: (channels, side, side)."""
        _, channels, height, width = self.train.shape
        return channels, height, width

    @cached_property
    def checksum(self) -> str:
        """The SHA-256 of the types, shapes and pixels of all sides, in order.

        Reads all images once, block by block.
        """
        digest = hashlib.sha256()
        sides = [("train", self.train), ("test", self.test)]
        if self.validation is not None:
            sides.append(("validation", self.validation))
        for part, images in sides:
            digest.update(f"{part} {images.dtype} {tuple(images.shape)}\n".encode())
            for block in blocks(images):
                digest.update(np.ascontiguousarray(images[block]).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Reading:
    """The validated options of `load`: how to read images.

    With `whole`, a reader of files returns the images of all sides as one set, with the side of
    each image. With `labels`, readers also return the class of each image, if the source has them.
    `crop` "celeba" is the crop of CelebA's aligned faces for all pictures, and "aligned" for those
    of the size of aligned faces.
    """

    size: int | None = None
    channels: int | None = None
    skip_unreadable: bool = False
    jpeg_quality: int | None = None
    file_order: FileOrder = "sorted"
    levels: int | None = None
    max_megapixels: int | None = None
    memory_budget: int | None = None
    cache: Path | None = None
    crop: Crop = "square"
    whole: bool = False
    stream: bool = False
    labels: bool = False

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise InputError(f"size must be at least 1 pixel, not {self.size}")
        if self.channels not in (None, 1, 3):
            raise InputError(f"channels must be 1 (grey) or 3 (RGB), not {self.channels}")
        if self.jpeg_quality is not None and not 1 <= self.jpeg_quality <= 95:
            raise InputError(
                f"jpeg_quality must be 1 to 95 (the released code: 75), not {self.jpeg_quality}"
            )
        if self.file_order not in ("sorted", "listing"):
            raise InputError(f'file_order must be "sorted" or "listing", not {self.file_order!r}')
        if self.stream and self.jpeg_quality is not None:
            raise InputError("jpeg_quality keeps all images, and stream keeps none: leave one out")
        for name in ("levels", "max_megapixels"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InputError(f"{name} must be at least 1, not {value}")

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an empty array, in memory or in a file; see `storage.allocate`."""
        return allocate(shape, dtype, self.memory_budget, self.cache)


class Split(NamedTuple):
    """The images that a reader has found, before the split rule.

    Attributes:
        train: all images, or the training side of the official split.
        test: the test side of the official split. None: the source has no official split.
        notes, levels, skipped: see `Dataset`.
        names: the name of each training image; of all images with `Reading.whole`.
        sides: with `Reading.whole`, the side of each image: train, test, val, or an empty text.
        labels, test_labels: with `Reading.labels`, the class of each image of both sides, (n,), as
            numbers or text. None: the source has no labels.
    """

    train: Pixels
    test: Pixels | None = None
    notes: tuple[str, ...] = ()
    levels: int | None = None
    skipped: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    sides: tuple[str, ...] = ()
    labels: np.ndarray | None = None
    test_labels: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Found:
    """A source and its images, before the split rule.

    Attributes:
        name, source: see `Dataset`.
        split: the images.
        notes: notes about the source, in addition to those in `split`.
        file_order: the file order that the reader used.
    """

    name: str
    split: Split
    source: str
    notes: tuple[str, ...] = ()
    file_order: FileOrder = "sorted"


def shortened(lines: Sequence[str], what: str, noun: str) -> Iterator[str]:
    """Yield the first `MOST_LISTED` lines, and one that counts the others."""
    yield from lines[:MOST_LISTED]
    if len(lines) > MOST_LISTED:
        yield f"{what} {plural(len(lines) - MOST_LISTED, f'more {noun}')}"


def levels_note(what: str, levels: int, *, clipped: int, images: int, chosen: bool) -> str:
    """Return the note that says which value became white.

    Args:
        what: the things that were scaled.
        levels: that value.
        clipped, images: number of larger values, and of the images that have some.
        chosen: whether the value was chosen by the images.
    """
    note = f"{what}: the value {levels:,} became white"
    if clipped:
        note += f", and so did {plural(clipped, 'larger value')} in {plural(images, 'image')}"
    return note + ("; --levels N sets another" if chosen else "")


def check_enough(count: int) -> None:
    """Raise InputError for fewer than 10 images."""
    if count < FEWEST_IMAGES:
        noun = "1 image is" if count == 1 else f"{count} images are"
        raise InputError(f"{noun} too few: at least {FEWEST_IMAGES} are needed")


def split_by_content(images: Pixels) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers of the training and the test images, each ascending.

    The split rule stands at the top of this file. A group of identical images that is larger than
    what the test side still needs stays in training. If every group is too large, the smallest
    group is the test side.

    Raises:
        InputError: all images are identical.
    """
    share = min(max(1, round(len(images) / 10)), MOST_TEST_IMAGES)
    return first_by_content(images, share)


def hold_out(dataset: Dataset, share: float) -> Dataset:
    """Return the data set with a validation side, taken from the training side.

    The images are chosen as test images are: the first ones in the order of a hash of their pixels.
    So the choice depends on the training images alone, and identical images stay together.

    Args:
        dataset: without a validation side.
        share: share of the training images to hold out, in (0, 0.5].

    Raises:
        InputError: the share is fewer than two images, all images are identical, or no training
            image of a class is left.
    """
    count = round(share * len(dataset.train))
    if count < 2:
        raise InputError(
            f"a validation share of {share:g} of {len(dataset.train)} training images is "
            f"{plural(count, 'image')}, and at least two are needed: give a larger share"
        )
    kept, held = first_by_content(dataset.train, count)
    return replace(
        dataset,
        train=take(dataset.train, kept),
        validation=take(dataset.train, held),
        labels=dataset.labels and dataset.labels.of_rows(kept, dataset.source),
    )


def first_by_content(images: Pixels, share: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers of all other images, and of the first `share` ones by their hash.

    See `split_by_content` for groups of identical images.

    Raises:
        InputError: all images are identical.
    """
    hashes = content_hashes(images)
    order = np.argsort(hashes, kind="stable")
    hashes = hashes[order]
    starts = np.r_[0, np.flatnonzero(hashes[1:] != hashes[:-1]) + 1]
    sizes = np.diff(starts, append=len(images))
    if len(sizes) < 2:
        raise InputError(f"all {len(images)} images are identical: nothing is left to test on")
    chosen, count = np.zeros(len(sizes), bool), 0
    for group, size in enumerate(sizes):  # in hash order
        if count + size <= share:
            chosen[group], count = True, count + int(size)
        if count == share:
            break
    if not count:
        chosen[np.argmin(sizes)] = True
    tested = np.empty(len(images), bool)
    tested[order] = np.repeat(chosen, sizes)
    return np.flatnonzero(~tested), np.flatnonzero(tested)


def content_hashes(images: Pixels) -> np.ndarray:
    """Return a 16-byte hash of the pixels of each image, (n,); equal if and only if the images are.

    An array takes 16 bytes per hash, a list of objects 150: an MNIST image itself has 784.
    """
    if isinstance(images, Rows) and isinstance(images.array, Pictures):
        return images.array.hashes[images.indices]
    hashes = np.empty(len(images), f"S{HASH_BYTES}")
    for block in blocks(images):
        digests = map(hash_of, np.ascontiguousarray(images[block]))
        hashes[block] = np.fromiter(digests, hashes.dtype, block.stop - block.start)
    return hashes


def count_shared(train: Pixels, test: Pixels) -> int:
    """Return how many test images also occur in training, with equal pixels."""
    return int(np.isin(content_hashes(test), content_hashes(train)).sum())
