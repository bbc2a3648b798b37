"""Allocate arrays of images in memory or in a file, and read them by rows.

The images of a data set are NCHW, uint8 or float32. They are a numpy array, in memory or
memory-mapped, or the `Rows` of a memory-mapped array or of `Pictures`, which are decoded when they
are read.
"""

import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from poise.data.decoding import to_float
from poise.data.streamed import Pictures
from poise.errors import RunError
from poise.shapes import Values

BLOCK_BYTES = 2**24
READERS = 8  # threads that read rows of a memory-mapped file
FAR_APART = 4  # mean distance of rows, in rows; above it read-ahead costs more than it saves


@final
class Rows:
    """A subset of the rows of a memory-mapped array or of `Pictures`, such as a side of a split.

    Indexing reads the rows.
    """

    def __init__(self, array: np.ndarray | Pictures, indices: np.ndarray) -> None:
        self.array = array
        self.indices = indices
        self.shape = (len(indices), *array.shape[1:])
        self.dtype = array.dtype

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        indices = self.indices[rows]
        if isinstance(self.array, np.ndarray) and isinstance(indices, np.ndarray):
            return _in_file_order(self.array, indices)
        return np.array(self.array[indices])

    @property
    def in_memory(self) -> bool:
        """Whether reading an image needs no disk."""
        return bool(getattr(self.array, "in_memory", False))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


Pixels = np.ndarray | Rows


def gather(array: Pixels | Tensor, indices: Sequence[int] | np.ndarray | Tensor) -> Values:
    """Return the images at `indices`, in that order: float32 in [0, 1], contiguous NCHW.

    Memory-mapped arrays are read in the order of the file, whatever the order of the indices.

    Args:
        array: images such as those of a `Dataset`: uint8, or floats in [0, 1].
        indices: row numbers, on the CPU.

    Returns:
        (indices, channels, height, width), on the CPU, or on the device of a tensor.
    """
    return scale(gather_rows(array, indices))


def gather_rows(array: Pixels | Tensor, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    """Return the images at `indices`, in that order, in their dtype."""
    rows = np.asarray(indices, np.int64)
    if isinstance(array, Tensor):
        return array[torch.from_numpy(rows).to(array.device)].contiguous()
    images = _in_file_order(array, rows) if isinstance(array, np.memmap) else array[rows]
    return torch.from_numpy(np.ascontiguousarray(images))


def scale(rows: Tensor) -> Values:
    """Return float32 images; uint8 is scaled to [0, 1]."""
    return to_float(rows) if rows.dtype == torch.uint8 else rows.float()


def _in_file_order(array: np.ndarray, indices: np.ndarray) -> np.ndarray:
    """Read rows of a memory-mapped file in the order of the file.

    If they lie far apart, threads read them: a row that is not in memory causes a page fault, which
    waits for the disk. Threads wait in parallel, because numpy releases Python's lock while it
    copies rows.
    """
    order = np.argsort(indices, kind="stable")
    rows = np.empty((len(indices), *array.shape[1:]), array.dtype)

    def read(part: np.ndarray) -> None:
        rows[part] = array[indices[part]]

    if not _far_apart(array, indices):
        read(order)
        return rows
    with _without_read_ahead(array), ThreadPoolExecutor(READERS) as pool:
        list(pool.map(read, np.array_split(order, min(READERS, len(order)))))
    return rows


def _far_apart(array: np.ndarray, indices: np.ndarray) -> bool:
    """Return whether rows are spread over a part of the file too large to be read at once."""
    span = int(np.ptp(indices)) if len(indices) else 0
    return span >= FAR_APART * len(indices) and span * array[0].nbytes > BLOCK_BYTES


@contextmanager
def _without_read_ahead(array: np.ndarray) -> Iterator[None]:
    """Turn off the read-ahead of a memory-mapped file inside the block.

    With read-ahead the system reads megabytes around each row, 1,420 bytes for each byte wanted.
    That pushes other rows out of memory: 190 rows of 3 KB a second from a file five times the
    memory (docs/log.md, 2026-11-24).
    """
    mapping = _mapping(array)
    if mapping is None:
        yield
        return
    mapping.madvise(mmap.MADV_RANDOM)
    try:
        yield
    finally:
        mapping.madvise(mmap.MADV_NORMAL)


def _mapping(array: Any) -> mmap.mmap | None:
    """Return the mapped file of an array, or None if there is none or the system has no madvise."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, mmap.mmap) and hasattr(array, "madvise") else None


def blocks(array: Pixels) -> Iterator[slice]:
    """Yield slices of the first axis, in order, of about 16 MiB each."""
    bytes_per_row = max(1, array.dtype.itemsize * int(np.prod(array.shape[1:])))
    step = max(1, BLOCK_BYTES // bytes_per_row)
    for start in range(0, len(array), step):
        yield slice(start, min(start + step, len(array)))


def take(array: Pixels, indices: np.ndarray) -> Pixels:
    """Return some rows: a copy, or `Rows` of what is not in memory."""
    if isinstance(array, Rows):
        return Rows(array.array, array.indices[indices])
    return (
        Rows(array, indices)
        if isinstance(array, np.memmap)
        else np.ascontiguousarray(array[indices])
    )


def part(images: Any, rows: slice) -> Any:
    """Return a slice of images without reading those of `Rows`."""
    return Rows(images.array, images.indices[rows]) if isinstance(images, Rows) else images[rows]


def head(images: Any, count: int) -> Any:
    """Return the first `count` images; those of `Rows` are not read."""
    return part(images, slice(count))


def spread(images: Any, count: int) -> Any:
    """Return `count` images, evenly spaced; those of `Rows` are not read.

    The first images of a data set can differ from the others: the first 2,000 test images of MNIST
    have 7 % less ink.
    """
    if count >= len(images):
        return images
    rows = np.arange(count) * len(images) // count
    return Rows(images.array, images.indices[rows]) if isinstance(images, Rows) else images[rows]


def allocate(
    shape: tuple[int, ...], dtype: np.dtype, memory_budget: int | None, cache: Path | None
) -> np.ndarray:
    """Return an empty array, in memory if it fits the budget, else in a temporary file.

    The file is deleted with the array.

    Args:
        shape, dtype: of the array.
        memory_budget: bytes; None: half of the free memory, shared by the processes of this
            machine.
        cache: folder for the file; None, or if it cannot be written: the system's folder for
            temporary files.

    Raises:
        RunError: too little space on the disk.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    if fits(size, memory_budget):
        return np.empty(shape, dtype)
    folder = Path(tempfile.gettempdir() if cache is None else cache)
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):  # such as that of a shared run
        folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free
    if free < size:  # a mapped file on a full disk kills the process instead of raising
        raise RunError(
            f"the decoded images need {size / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB "
            f"free: free some space, or choose a smaller --size"
        )
    return _mapped_file(folder, shape, dtype)


def fits(size: int, memory_budget: int | None) -> bool:
    """Return whether so many bytes fit into memory; see `allocate`."""
    return size <= room(memory_budget)


def room(memory_budget: int | None) -> int:
    """Return how many bytes of images this process may keep in memory; see `allocate`."""
    return _free_memory() // (2 * _processes_here()) if memory_budget is None else memory_budget


def _processes_here() -> int:
    """Return how many processes torchrun started on this machine; each reads all images."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _mapped_file(folder: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    handle, name = tempfile.mkstemp(".npy", "poise-images-", folder)
    os.close(handle)
    array = np.lib.format.open_memmap(name, "w+", dtype, shape)
    if os.name == "posix":
        Path(name).unlink()  # the mapping stays valid, and a killed process leaves no file
    else:
        weakref.finalize(array, Path(name).unlink, missing_ok=True)
    return array


def _free_memory() -> int:
    """Return the bytes that could be allocated (Linux), all memory (macOS) or 4 GiB (Windows)."""
    report = Path("/proc/meminfo")
    if report.exists():  # sysconf's SC_AVPHYS_PAGES would count the file cache as taken
        free = 1024 * int(_fields(report)["MemAvailable:"])
        return min([free, *_left_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])
    known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 2**32


def _left_in_groups(membership: Path, mounted: Path) -> Iterator[int]:
    """Yield the bytes that each control group of this process still allows.

    Containers and batch jobs run in such groups. Linux kills a process that exceeds them.

    Args:
        membership: the system's list of the groups of a process.
        mounted: the folder of control groups, of version 1 or 2.
    """
    for line in membership.read_text().splitlines() if membership.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        group = mounted / controllers / path.lstrip("/")
        limit, usage = ("limit_in_bytes", "usage_in_bytes") if controllers else ("max", "current")
        for folder in [group, *group.parents]:
            allowed = folder / f"memory.{limit}"
            if allowed.exists() and (number := allowed.read_text().strip()) != "max":
                yield (
                    int(number)
                    - int((folder / f"memory.{usage}").read_text())
                    + _cached(folder / "memory.stat")
                )


def _cached(report: Path) -> int:
    """Return the bytes of cached files in a control group, which the system frees on demand."""
    found = _fields(report)  # in version 1, "total_" includes the groups below
    return sum(
        int(found.get(f"total_{name}", found.get(name, "0")))
        for name in ("active_file", "inactive_file")
    )


def _fields(report: Path) -> dict[str, str]:
    """Return the first two words of each line, as a dictionary."""
    words = (line.split()[:2] for line in report.read_text().splitlines())
    return {pair[0]: pair[1] for pair in words if len(pair) == 2}
