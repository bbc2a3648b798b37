"""What a data set is, and how images without an official split are split.

The rule: one image in ten, at most 10,000, goes to the test side. Images are ordered by a hash of their pixels, and
identical images stay together, so that the split depends on the images alone, not on file names or order, and never
overlaps.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np

from poise.data.storage import Pixels, allocate, blocks
from poise.errors import InputError

FileOrder = Literal["sorted", "listing"]

FEWEST_IMAGES = 10
MOST_TEST_IMAGES = 10_000
HASH_BYTES = 16


@dataclass(frozen=True, eq=False)
class Dataset:
    """Images to train on and images to test on.

    Attributes:
        name: for people.
        train, test: (n, channels, side, side), uint8 or float32 in [0, 1]: numpy arrays, or `Rows` of a mapped file.
        source: where the images came from.
        notes: what was skipped, ignored or changed, one short sentence each.
    """

    name: str
    train: Pixels
    test: Pixels
    source: str
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, side, side) of one image."""
        _, channels, height, width = self.train.shape
        return channels, height, width

    @cached_property
    def checksum(self) -> str:
        """SHA-256 over types, shapes and pixels of train and test, in order; reads everything once, block by block."""
        digest = hashlib.sha256()
        for part, images in (("train", self.train), ("test", self.test)):
            digest.update(f"{part} {images.dtype} {tuple(images.shape)}\n".encode())
            for block in blocks(images):
                digest.update(np.ascontiguousarray(images[block]).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Reading:
    """How images are to be read: the options of `load`, checked."""

    size: int | None = None
    channels: int | None = None
    skip_unreadable: bool = False
    jpeg_quality: int | None = None
    file_order: FileOrder = "sorted"
    memory_budget: int | None = None
    cache: Path | None = None
    celeba_crop: bool = False

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

    def allocate(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array to fill, in memory or in a file: see `storage.allocate`."""
        return allocate(shape, dtype, self.memory_budget, self.cache)


@dataclass(frozen=True, eq=False)
class Found:
    """What a source holds: `test` is None where there is no official split; `file_order` is the one that was used."""

    name: str
    train: np.ndarray
    test: np.ndarray | None
    source: str
    notes: tuple[str, ...] = ()
    file_order: FileOrder = "sorted"


def check_enough(count: int) -> None:
    """Raises InputError for fewer than 10 images."""
    if count < FEWEST_IMAGES:
        noun = "1 image is" if count == 1 else f"{count} images are"
        raise InputError(f"{noun} too few: at least {FEWEST_IMAGES} are needed")


def split_by_content(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of the training and of the test images, ascending; the rule is at the top of this file.

    A group of identical images that would pass the test side's share stays in training; where every group would, the
    smallest one is tested.

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
    share = min(max(1, round(len(images) / 10)), MOST_TEST_IMAGES)
    chosen, count = np.zeros(len(sizes), bool), 0
    for group, size in enumerate(sizes):  # in the order of their hashes
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
    """One hash of 16 bytes for the pixels of each image, (n,); equal exactly where images are equal.

    An array, not a list: beside images of 784 bytes, 16 bytes for each are little, and 150 for objects are not.
    """
    hashes = np.empty(len(images), f"S{HASH_BYTES}")
    for block in blocks(images):
        digests = (
            hashlib.blake2b(image.data, digest_size=HASH_BYTES).digest()
            for image in np.ascontiguousarray(images[block])
        )
        hashes[block] = np.fromiter(digests, hashes.dtype, block.stop - block.start)
    return hashes


def count_shared(train: Pixels, test: Pixels) -> int:
    """How many test images also occur in training, pixel by pixel."""
    return int(np.isin(content_hashes(test), content_hashes(train)).sum())
