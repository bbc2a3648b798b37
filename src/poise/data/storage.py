"""Arrays of images that may be larger than memory: allocated in memory or in a file, read in blocks or by row.

Two kinds hold a data set's images, NCHW, uint8 or float32: numpy arrays (in memory, or memory-mapped), and `Rows` of a
memory-mapped array.
"""

import ctypes
import mmap
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from poise.data.decoding import to_float
from poise.errors import RunError
from poise.shapes import Values

BLOCK_BYTES = 2**24
PIECE_BYTES = (
    2**17
)  # asked of the system at once; Linux cuts requests short that pass its own read-ahead, by default this


@final
class Rows:
    """Some rows of a memory-mapped array, read when indexed: one side of a split that never enters memory whole."""

    def __init__(self, array: np.ndarray, indices: np.ndarray) -> None:
        self.array = array
        self.indices = indices
        self.shape = (len(indices), *array.shape[1:])
        self.dtype = array.dtype

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, rows: int | slice | np.ndarray) -> np.ndarray:
        indices = self.indices[rows]
        return (
            _in_file_order(self.array, indices)
            if isinstance(indices, np.ndarray)
            else np.array(self.array[indices])
        )

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


Pixels = np.ndarray | Rows


def gather(array: Pixels | Tensor, indices: Sequence[int] | np.ndarray | Tensor) -> Values:
    """The images at `indices`, in that order: float32 in [0, 1], contiguous NCHW, on the CPU (or where a tensor is).

    Memory-mapped arrays are read in the order of the file, however the indices are shuffled.

    Args:
        array: images of a `Dataset`, or others like them: bytes, or floats in [0, 1].
        indices: row numbers, on the CPU.
    """
    return scale(gather_rows(array, indices))


def gather_rows(array: Pixels | Tensor, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
    """What `gather` gives, before it is scaled: bytes stay bytes."""
    rows = np.asarray(indices, np.int64)
    if isinstance(array, Tensor):
        return array[torch.from_numpy(rows).to(array.device)].contiguous()
    images = _in_file_order(array, rows) if isinstance(array, np.memmap) else array[rows]
    return torch.from_numpy(np.ascontiguousarray(images))


def scale(rows: Tensor) -> Values:
    """Float32 images: bytes are scaled to [0, 1], floats stay as they are."""
    return to_float(rows) if rows.dtype == torch.uint8 else rows.float()


def _in_file_order(array: np.ndarray, indices: np.ndarray) -> np.ndarray:
    order = np.argsort(indices, kind="stable")
    rows = np.empty((len(indices), *array.shape[1:]), array.dtype)
    with _asked_for(array, indices[order]):
        rows[order] = array[indices[order]]
    return rows


@contextmanager
def _asked_for(array: np.ndarray, indices: np.ndarray) -> Iterator[None]:
    """Rows of a mapped file are on their way from the disk, all at once, and nothing else is read inside the block.

    Left alone, each row is a page fault that waits for the disk, and what the system reads around it pushes out pages that
    are still wanted: 190 rows of 3 KB a second from a file five times the memory, 38,000 with this (2026-11-24).

    Args:
        array: perhaps a view of a mapped file; of others nothing is asked.
        indices: ascending; for those outside the array, which are the reader's to refuse, nothing is asked.
    """
    mapping, indices = _mapping(array), indices[(indices >= 0) & (indices < len(array))]
    if mapping is None or not len(indices):
        yield
        return
    origin, madvise = np.frombuffer(mapping, np.uint8).ctypes.data, _madvise()
    mapping.madvise(mmap.MADV_RANDOM)
    try:
        for start, length in _pieces(array, indices, origin):
            madvise(origin + start, length, mmap.MADV_WILLNEED)
        yield
    finally:
        mapping.madvise(
            mmap.MADV_NORMAL
        )  # what is read in blocks is served well by the system's own reading ahead


@cache
def _madvise() -> Any:
    """The C library's, which lets other threads run meanwhile: Python's own holds its lock while the disk is asked, and with
    500 rows a batch a small network trained 8 % slower for it (2026-11-24).
    """
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def _mapping(array: Any) -> mmap.mmap | None:
    """The mapped file that an array is a view of, where there is one and the system takes advice (not on Windows)."""
    while isinstance(array, np.ndarray):
        array = array.base
    return array if isinstance(array, mmap.mmap) and hasattr(array, "madvise") else None


def _pieces(array: np.ndarray, indices: np.ndarray, origin: int) -> Iterator[tuple[int, int]]:
    """Where the pages of these rows begin in the mapping at address `origin`, and their bytes: neighbours joined, then cut."""
    first = array.ctypes.data - origin + indices * array.strides[0]
    row = array.itemsize + sum(
        (count - 1) * stride
        for count, stride in zip(array.shape[1:], array.strides[1:], strict=True)
    )
    begins, ends = first // mmap.PAGESIZE, (first + row - 1) // mmap.PAGESIZE + 1
    new = np.flatnonzero(begins[1:] > ends[:-1]) + 1
    begins, ends = begins[np.r_[0, new]] * mmap.PAGESIZE, ends[np.r_[new - 1, -1]] * mmap.PAGESIZE
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        for start in range(begin, end, PIECE_BYTES):
            yield start, min(PIECE_BYTES, end - start)


def blocks(array: Pixels) -> Iterator[slice]:
    """Slices of the first axis, in order, of about 16 MiB each."""
    bytes_per_row = max(1, array.dtype.itemsize * int(np.prod(array.shape[1:])))
    step = max(1, BLOCK_BYTES // bytes_per_row)
    for start in range(0, len(array), step):
        yield slice(start, min(start + step, len(array)))


def take(array: np.ndarray, indices: np.ndarray) -> Pixels:
    """Some rows: a copy, or for a memory-mapped array a `Rows`."""
    return (
        Rows(array, indices)
        if isinstance(array, np.memmap)
        else np.ascontiguousarray(array[indices])
    )


def head(images: Any, count: int) -> Any:
    """The first `count` images; those of a `Rows` are not read."""
    return (
        Rows(images.array, images.indices[:count]) if isinstance(images, Rows) else images[:count]
    )


def allocate(
    shape: tuple[int, ...], dtype: np.dtype, memory_budget: int | None, cache: Path | None
) -> np.ndarray:
    """An array to fill: in memory where it fits the budget, else in a file, deleted when nothing uses the array any more.

    Args:
        shape, dtype: of the array.
        memory_budget: bytes; None: half of the memory that is free now, shared by the processes that train together.
        cache: folder for the file; None: the system's folder for temporary files.

    Raises:
        RunError: too little space on the disk.
    """
    size = int(np.prod(shape)) * dtype.itemsize
    if size <= (
        _free_memory() // (2 * _processes_here()) if memory_budget is None else memory_budget
    ):
        return np.empty(shape, dtype)
    folder = Path(tempfile.gettempdir() if cache is None else cache)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < size:  # a mapped file on a full disk kills the process instead of raising
        raise RunError(
            f"the decoded images need {size / 1e9:.1f} GB and {folder} has {free / 1e9:.1f} GB free: "
            f"free some space, or choose a smaller --size"
        )
    return _mapped_file(folder, shape, dtype)


def _processes_here() -> int:
    """How many processes torchrun started on this machine: each reads the images for itself."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _mapped_file(folder: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap:
    handle, name = tempfile.mkstemp(".npy", "poise-images-", folder)
    os.close(handle)
    array = np.lib.format.open_memmap(name, "w+", dtype, shape)
    if os.name == "posix":
        Path(name).unlink()  # the mapping outlives the name, and a kill leaves nothing behind
    else:
        weakref.finalize(array, Path(name).unlink, missing_ok=True)
    return array


def _free_memory() -> int:
    """Bytes that could be allocated now (Linux), or all memory (macOS); 4 GiB where the system does not say (Windows)."""
    report = Path("/proc/meminfo")
    if report.exists():  # not sysconf's SC_AVPHYS_PAGES, which counts the file cache as taken
        free = 1024 * int(_fields(report)["MemAvailable:"])
        return min([free, *_left_in_groups(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])
    known = "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {})
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if known else 2**32


def _left_in_groups(membership: Path, mounted: Path) -> Iterator[int]:
    """Bytes that each control group around this process still allows, as of a container or a batch job: Linux kills beyond.

    Args:
        membership: the system's list of the groups of a process.
        mounted: where versions 1 and 2 of control groups are found.
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
    """Bytes of pages of files, which the system takes back when memory is wanted, in a control group and those below it."""
    found = _fields(report)  # version 1 says "total_" where those below are counted
    return sum(
        int(found.get(f"total_{name}", found.get(name, "0")))
        for name in ("active_file", "inactive_file")
    )


def _fields(report: Path) -> dict[str, str]:
    """The first two words of each line."""
    words = (line.split()[:2] for line in report.read_text().splitlines())
    return {pair[0]: pair[1] for pair in words if len(pair) == 2}
