"""Features kept on disk, so that those of a real set are computed once: one safetensors file for each key.

The key is the SHA-256 of what the features depend on: the images' content, type and shape, the extractor's checksum, resize
and precision.
A file holds its key and a hash of its values; one that is damaged is computed again and replaced. Files appear whole or not at
all, so that runs may share the folder and be killed at any moment. The folder can be deleted at any time.
"""

import hashlib
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from poise.errors import RunError
from poise.features.extractor import Extractor, extract
from poise.features.weights import first_line
from poise.shapes import Features
from poise.support.files import write_file

CACHE_VARIABLE = "POISE_CACHE"
FORMAT = 1  # to be raised when the same key comes to mean other numbers
LEFTOVER_SECONDS = (
    24 * 3600.0
)  # no file is written for so long: an older unfinished one is of a killed process


def cached_features(
    extractor: Extractor,
    images: Any,
    content: str,
    *,
    total: int | None = None,
    title: str = "features",
    quiet: bool = True,
    cache: Path | None = None,
) -> Features:
    """What `extract` gives, from the cache if it is there, and else kept in it.

    Args:
        extractor: from `make_extractor`.
        images: see `extract`; an iterable is not touched if its features are there.
        content: a checksum of the images' values.
        total: see `extract`.
        title: see `extract`.
        quiet: no progress display. Warnings of a damaged file or an unwritable folder come nevertheless, on stderr.
        cache: the folder. None: the one in POISE_CACHE ("off": none), else ~/.cache/poise/features.

    Raises:
        InputError, RunError: see `extract`.
    """
    folder = cache or default_cache()
    if folder is None:
        return extract(extractor, images, total=total, title=title, quiet=quiet)
    path = folder / f"{_key(extractor, images, content)}.safetensors"
    features = _read(path)
    if features is None:
        features = extract(extractor, images, total=total, title=title, quiet=quiet)
        _write(path, features)
    return features


def default_cache() -> Path | None:
    """The folder that POISE_CACHE names, or ~/.cache/poise/features; None: POISE_CACHE is "off", or there is no home."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return None if named == "off" else Path(named)
    try:
        return Path.home() / ".cache" / "poise" / "features"
    except RuntimeError:
        return None


def _key(extractor: Extractor, images: Any, content: str) -> str:
    kind = (
        [str(images.dtype).removeprefix("torch."), list(images.shape)]
        if hasattr(images, "shape")
        else "batches"
    )
    parts = [FORMAT, content, kind, extractor.name, extractor.checksum, extractor.resize]
    parts += [] if extractor.precision == "float32" else [extractor.precision]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read(path: Path) -> Features | None:
    """The features in a file; None: there is none, or it is damaged."""
    try:
        tensors = load(path.read_bytes())  # opened once: another run may replace the file meanwhile
        if torch.equal(tensors["sha256"], _digest(path, tensors["features"])):
            return tensors["features"]
        reason = "its hash does not match"
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (SafetensorError, KeyError, OSError) as error:
        reason = first_line(error)
    _warn(f"the features in {path} cannot be used ({reason}); computing them again")
    return None


def _digest(path: Path, features: Tensor) -> Tensor:
    """SHA-256, (32,) bytes, over the values and the key, so that a file under another's name is found out."""
    digest = hashlib.sha256(f"{path.stem} {features.dtype} {tuple(features.shape)}\n".encode())
    digest.update(features.numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _write(path: Path, features: Features) -> None:
    features = features.contiguous()
    try:
        write_file(path, save({"features": features, "sha256": _digest(path, features)}))
        _sweep(path.parent)
    except (RunError, OSError) as error:
        _warn(f"features are not kept for the next time: {error}")


def _sweep(folder: Path) -> None:
    """Unfinished files of processes that were killed long ago."""
    for leftover in folder.glob(".writing-*"):
        with suppress(OSError):  # finished or swept up meanwhile, or another's
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()


def _warn(line: str) -> None:
    print(f"poise: warning: {line}", file=sys.stderr, flush=True)
