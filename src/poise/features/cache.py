"""Cache features on disk, so that the features of real images are computed only once.

Each key has one safetensors file. The key is the SHA-256 of what the features depend on: content,
type and shape of the images; name, checksum, resize and precision of the extractor.

The file name is the key; the file holds the features and a hash of key and features. A damaged file
is computed again and replaced. Writes are atomic, so several runs may share the folder, and a run
may be killed at any moment. The folder may be deleted at any time.
"""

import hashlib
import json
import os
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
from poise.support.files import delete_leftovers, read_regular, write_file
from poise.support.progress import warn

CACHE_VARIABLE = "POISE_CACHE"
FORMAT = 1  # part of the key; raise it when the same key would mean other numbers


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
    """Return the features of `extract`, from the cache if possible; otherwise cache them.

    Args:
        extractor: from `make_extractor`.
        images: see `extract`. If the features are in the cache, an iterable is not consumed.
        content: a checksum of the images' values.
        total: see `extract`.
        title: see `extract`.
        quiet: show no progress. Warnings about a damaged file or an unwritable folder still go to
            stderr.
        cache: the folder. None: the folder in the environment variable POISE_CACHE ("off": no
            cache), else ~/.cache/poise/features.

    Raises:
        InputError, RunError: see `extract`.
    """
    folder = cache or default_cache()
    if folder is None:
        return extract(extractor, images, total=total, title=title, quiet=quiet)
    path = folder / f"{_key(extractor, images, content)}.safetensors"
    count = len(images) if hasattr(images, "shape") else total
    features = _read(path, count)
    if features is None:
        features = extract(extractor, images, total=total, title=title, quiet=quiet)
        _write(path, features)
    return features


def default_cache() -> Path | None:
    """Return the folder in POISE_CACHE, or ~/.cache/poise/features if that is not set.

    Returns None if POISE_CACHE is "off", or the user has no home folder.
    """
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return None if named == "off" else Path(named).expanduser()
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


def _read(path: Path, count: int | None) -> Features | None:
    """Return the features in a file, or None if the file is missing or damaged.

    Args:
        path: the file.
        count: number of images. None: unknown.
    """
    try:
        tensors = load(read_regular(path))  # one read: another run may replace the file
        features, digest = tensors["features"], tensors["sha256"]
        if not torch.equal(digest, _digest(path, features)):
            reason = "its hash does not match"
        elif (
            features.ndim != 2 or features.shape[1] < 1 or len(features) != (count or len(features))
        ):
            reason = f"they have shape {tuple(features.shape)}, for {count or 'some'} images"
        elif features.dtype != torch.float32 or not features.isfinite().all():
            reason = f"they are not finite numbers of type float32, but {features.dtype}"
        else:
            return features
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (SafetensorError, KeyError, OSError, TypeError, ValueError, RuntimeError) as error:
        reason = first_line(error)
    warn(f"the features in {path} cannot be used ({reason}); computing them again")
    return None


def _digest(path: Path, features: Tensor) -> Tensor:
    """Return the SHA-256 of the key and the features, (32,), uint8.

    The key is included to detect a file that was renamed.
    """
    digest = hashlib.sha256(f"{path.stem} {features.dtype} {tuple(features.shape)}\n".encode())
    digest.update(features.numpy().data)
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def _write(path: Path, features: Features) -> None:
    features = features.contiguous()
    try:
        write_file(path, save({"features": features, "sha256": _digest(path, features)}))
        delete_leftovers(path.parent)
    except (RunError, OSError) as error:
        warn(f"features are not kept for the next time: {error}")
