"""The data set, and the split rule for images without an official split.

The rule: order the images by a hash of their pixels, and test on the first tenth, at most 10,000.
Identical images stay together. So the split depends on the images alone, not on file names or
order, and the two sides never overlap.
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
        name: shown to users.
        train, test: (n, channels, side, side), uint8 or float32 in [0, 1]: numpy arrays, or `Rows`
            of a memory-mapped file.
        source: where the images came from.
        notes: what the loader skipped, ignored or changed, one short sentence each.
    """

    name: str
    train: Pixels
    test: Pixels
    source: str
    notes: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """The shape of one image: (channels, side, side)."""
        _, channels, height, width = self.train.shape
        return channels, height, width

    @cached_property
    def checksum(self) -> str:
        """The SHA-256 of the types, shapes and pixels of train and test, in order.

        Reads all images once, block by block.
        """
        digest = hashlib.sha256()
        for part, images in (("train", self.train), ("test", self.test)):
            digest.update(f"{part} {images.dtype} {tuple(images.shape)}\n".encode())
            for block in blocks(images):
                digest.update(np.ascontiguousarray(images[block]).data)
        return digest.hexdigest()


@dataclass(frozen=True)
class Reading:
    """The validated options of `load`: how to read images."""

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
        """Return an empty array, in memory or in a file; see `storage.allocate`."""
        return allocate(shape, dtype, self.memory_budget, self.cache)


@dataclass(frozen=True, eq=False)
class Found:
    """The images of a source, before the split rule.

    Attributes:
        name, source, notes: see `Dataset`.
        train: all images, or the training side of the official split.
        test: the test side of the official split. None: the source has no official split.
        file_order: the file order that the reader used.
    """

    name: str
    train: np.ndarray
    test: np.ndarray | None
    source: str
    notes: tuple[str, ...] = ()
    file_order: FileOrder = "sorted"


def check_enough(count: int) -> None:
    """Raise InputError for fewer than 10 images."""
    if count < FEWEST_IMAGES:
        noun = "1 image is" if count == 1 else f"{count} images are"
        raise InputError(f"{noun} too few: at least {FEWEST_IMAGES} are needed")


def split_by_content(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the row numbers of the training and the test images, each ascending.

    The split rule stands at the top of this file. A group of identical images that is larger than
    what the test side still needs stays in training. If every group is too large, the smallest
    group is the test side.

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
    hashes = np.empty(len(images), f"S{HASH_BYTES}")
    for block in blocks(images):
        digests = (
            hashlib.blake2b(image.data, digest_size=HASH_BYTES).digest()
            for image in np.ascontiguousarray(images[block])
        )
        hashes[block] = np.fromiter(digests, hashes.dtype, block.stop - block.start)
    return hashes


def count_shared(train: Pixels, test: Pixels) -> int:
    """Return how many test images also occur in training, with equal pixels."""
    return int(np.isin(content_hashes(test), content_hashes(train)).sum())
