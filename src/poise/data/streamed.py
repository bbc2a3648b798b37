"""Images of which memory holds as many as fit. The others are decoded whenever they are read.

Nothing is written to the disk. Memory also holds a hash of the pixels of each image, 16 bytes,
because the split by content needs it.
"""

import hashlib
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import final

import numpy as np

HASH_BYTES = 16


@final
class Pictures:
    """Images (n, channels, side, side), uint8. Those that are not in memory are decoded in threads.

    Args:
        seen: hashes and pixels of the first pass over all images.
        rows: (n,), the row of each image in that pass.
        read: returns an image by its position among the n. Threads call it.
        threads: number of threads.
    """

    def __init__(
        self, seen: "Seen", rows: np.ndarray, read: Callable[[int], np.ndarray], threads: int
    ) -> None:
        self.shape = (len(rows), *seen.pixels.shape[1:])
        self.dtype = np.dtype(np.uint8)
        self.hashes = seen.hashes[rows]
        self._pixels, self._rows = seen.pixels, rows
        self._read, self._threads = read, threads

    def __len__(self) -> int:
        return len(self.hashes)

    @property
    def in_memory(self) -> bool:
        """Whether no image has to be decoded."""
        return bool((self._rows < len(self._pixels)).all())

    def __getitem__(self, rows: int | np.integer | slice | np.ndarray) -> np.ndarray:
        if isinstance(rows, (int, np.integer)):
            return self[np.array([range(len(self))[rows]])][0]
        wanted = np.arange(*rows.indices(len(self))) if isinstance(rows, slice) else rows
        images = np.empty((len(wanted), *self.shape[1:]), self.dtype)
        sources = self._rows[wanted]
        kept = sources < len(self._pixels)
        images[kept] = self._pixels[sources[kept]]
        # In the order of the files, so that disks read forward.
        places = np.flatnonzero(~kept)
        places = places[np.argsort(wanted[places], kind="stable")]

        def fill(part: np.ndarray) -> None:
            for place in part:
                images[place] = self._read(int(wanted[place]))

        if len(places):
            with ThreadPoolExecutor(self._threads) as pool:
                list(pool.map(fill, np.array_split(places, self._threads)))
        return images


class Seen:
    """Takes images by row, as an array does. Keeps the hashes of all and the pixels of the first.

    Args:
        shape: of all images, (n, channels, side, side).
        memory: bytes for the pixels.
    """

    def __init__(self, shape: tuple[int, ...], memory: int) -> None:
        self.hashes = np.empty(shape[0], f"S{HASH_BYTES}")
        kept = min(shape[0], memory // math.prod(shape[1:]))
        self.pixels = np.empty((kept, *shape[1:]), np.uint8)

    def __setitem__(self, row: int, image: np.ndarray) -> None:
        self.hashes[row] = hash_of(np.ascontiguousarray(image))
        if row < len(self.pixels):
            self.pixels[row] = image


def hash_of(image: np.ndarray) -> bytes:
    """Return a 16-byte hash of the pixels of an image, which is contiguous."""
    return hashlib.blake2b(image.data, digest_size=HASH_BYTES).digest()
