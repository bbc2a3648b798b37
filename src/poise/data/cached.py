"""Keep the decoded images of a folder in a file, so that they are decoded once.

The file belongs to the names, sizes and times of the image files, and to the options of reading.
If any of them changes, the images are decoded again.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from poise.data.dataset import Reading
from poise.data.encoded import Decoded, Encoded
from poise.data.encoded import decode as decode_now
from poise.data.storage import fits
from poise.errors import RunError
from poise.support.files import appearing, delete_leftovers, read_json, write_json

RULES = 1  # increased if a change of this package changes the decoded images
WORTH_SECONDS = 3.0  # a set that is decoded faster is not kept
_NAME = "decoded-"


@dataclass(frozen=True)
class Told:
    """Contents of the JSON file beside the images; see `Decoded`.

    Attributes:
        sha256: of the pixels and the other values, so that damage is noticed.
    """

    shape: tuple[int, ...]
    sha256: str
    positions: list[int]
    names: tuple[str, ...]
    notes: tuple[str, ...]
    levels: int | None
    skipped: tuple[str, ...]


def decode(files: Sequence[Encoded], reading: Reading) -> Decoded:
    """Return the images of `encoded.decode`, from the folder `reading.cache` if they are there.

    Images are kept if decoding them takes `WORTH_SECONDS` or more, and the disk has room for three
    times their size.
    """
    key = _key(files, reading) if reading.cache and not reading.stream else None
    if key is None or reading.cache is None:
        return decode_now(files, reading)
    kept = _read(reading.cache / f"{_NAME}{key}", reading)
    if kept is not None:
        return kept
    began = time.monotonic()
    found = decode_now(files, reading)
    if time.monotonic() - began >= WORTH_SECONDS:
        with suppress(OSError, RunError):  # a full or read-only disk costs time, and no more
            _write(found, reading.cache, key)
    return found


def _key(files: Sequence[Encoded], reading: Reading) -> str | None:
    """Return the checksum of all that the decoded images depend on; None: not all are files."""
    import PIL

    options = asdict(reading) | {"cache": None, "memory_budget": None, "jpeg_quality": None}
    del options["stream"]  # what is kept was not streamed
    del options["labels"]  # they do not change the images
    heic = find_spec("pillow_heif") is not None
    known = f"{RULES} {PIL.__version__} {heic} {sorted(options.items())}\n"
    digest = hashlib.sha256(known.encode())
    for file in files:
        try:
            if file.path is None:
                return None
            found = file.path.stat()
        except OSError:
            return None
        # A file that was skipped is tried again once it may be read.
        readable = os.access(file.path, os.R_OK)
        line = f"{file.label}\0{found.st_size}\0{found.st_mtime_ns}\0{readable}\n"
        digest.update(line.encode())
    return digest.hexdigest()[:32]


def _read(place: Path, reading: Reading) -> Decoded | None:
    """Return the kept images; None: there are none, or they are damaged."""
    try:
        told = read_json(place.with_suffix(".json"), Told)
        pixels = place.with_suffix(".npy")
        in_memory = fits(pixels.stat().st_size, reading.memory_budget)
        # "c" lets the array be written without changing the file.
        images = np.load(pixels, mmap_mode=None if in_memory else "c", allow_pickle=False)
    except Exception:  # numpy can raise anything on a damaged file
        return None
    counts = {len(images), len(told.positions), len(told.names)}
    if images.shape != told.shape or images.dtype != np.uint8 or len(counts) > 1:
        return None
    if told.sha256 != _checksum(images, asdict(told)):
        return None
    positions = np.array(told.positions, int)
    return Decoded(images, positions, told.names, told.notes, told.levels, told.skipped)


def _checksum(images: np.ndarray, told: dict[str, Any]) -> str:
    others = {name: value for name, value in told.items() if name != "sha256"}
    digest = hashlib.sha256(json.dumps(others, sort_keys=True).encode())
    digest.update(np.ascontiguousarray(images).data)
    return digest.hexdigest()


def _write(found: Decoded, folder: Path, key: str) -> None:
    assert isinstance(found.images, np.ndarray)
    folder.mkdir(parents=True, exist_ok=True)
    delete_leftovers(folder)
    if shutil.disk_usage(folder).free < 3 * found.images.nbytes:
        return
    for old in folder.glob(f"{_NAME}*"):
        with suppress(OSError):
            old.unlink()
    with appearing(folder / f"{_NAME}{key}.npy") as writing, open(writing, "wb") as file:
        np.save(file, found.images, allow_pickle=False)
    # Written last: without it the images do not count.
    told = found._asdict() | {
        "shape": list(found.images.shape),
        "positions": found.positions.tolist(),
    }
    del told["images"]
    told["sha256"] = _checksum(found.images, told)
    write_json(folder / f"{_NAME}{key}.json", told)
