"""Images that are decoded whenever they are read, and kept neither in memory nor on the disk.

Memory holds a hash of the pixels of each image, 16 bytes. The split by content needs no more.
"""

import hashlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import final

import numpy as np

HASH_BYTES = 16


@final
class Pictures:
    """Images (n, channels, side, side), uint8, that are decoded in threads when they are indexed.

    Args:
        shape: channels, side, side.
        hashes: (n,), the hash of each image.
        read: returns an image by its row. Threads call it.
        threads: number of threads.
    """

    def __init__(
        self,
        shape: tuple[int, int, int],
        hashes: np.ndarray,
        read: Callable[[int], np.ndarray],
        threads: int,
    ) -> None:
        self.shape = (len(hashes), *shape)
        self.dtype = np.dtype(np.uint8)
        self.hashes = hashes
        self._read, self._threads = read, threads

    def __len__(self) -> int:
        return len(self.hashes)

    def __getitem__(self, rows: int | np.integer | slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, (int, np.integer)):
            return self._read(range(len(self))[rows])
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        images = np.empty((len(wanted), *self.shape[1:]), self.dtype)

        def fill(places: np.ndarray) -> None:
            for place in places:
                images[place] = self._read(int(wanted[place]))

        # In the order of the files, so that disks read forward.
        parts = np.array_split(np.argsort(wanted, kind="stable"), self._threads)
        with ThreadPoolExecutor(self._threads) as pool:
            list(pool.map(fill, parts))
        return images


class Hashes:
    """Takes images by row, as an array does, and keeps their hashes.

    Args:
        count: number of images.
    """

    def __init__(self, count: int) -> None:
        self.values = np.empty(count, f"S{HASH_BYTES}")

    def __setitem__(self, row: int, image: np.ndarray) -> None:
        self.values[row] = hash_of(np.ascontiguousarray(image))


def hash_of(image: np.ndarray) -> bytes:
    """Return a 16-byte hash of the pixels of an image, which is contiguous."""
    return hashlib.blake2b(image.data, digest_size=HASH_BYTES).digest()
