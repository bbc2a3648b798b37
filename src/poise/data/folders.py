"""Read a folder of image files, at any depth, with an optional split into train/ and test/."""

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np

from poise.data.dataset import Found, Reading
from poise.data.encoded import Encoded, decode
from poise.errors import InputError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
Split = tuple[np.ndarray, np.ndarray | None, tuple[str, ...]]  # train, test, notes

_TEST_FOLDERS = ("test", "val", "valid", "validation")


def read_folder(folder: Path, reading: Reading) -> Found:
    """Return all images in a folder and its subfolders, sorted by path.

    The split is train/ and test/ (or val/, valid/, validation/), if the folder has both sides.
    Files and folders whose names begin with a dot are skipped. The notes count other files.

    Raises:
        InputError: the folder holds no files or no images; see also `encoded.decode`.
    """
    files = _visible_files(folder)
    images = [path for path in files if path.suffix.lower() in IMAGE_ENDINGS]
    if not images:
        raise _no_images(folder, files)
    notes = (
        [f"ignored: {_count(len(files) - len(images), 'other file')}"]
        if len(images) < len(files)
        else []
    )
    train, test = _official_split(folder, images)
    if test and len(train) + len(test) < len(images):
        notes.append(
            f"ignored: {_count(len(images) - len(train) - len(test), 'image')} "
            "outside the split's two folders"
        )
    found = read_files(train, test, reading)
    return Found(folder.resolve().name, *found[:2], str(folder), (*notes, *found[2]))


def read_files(train: Sequence[Path], test: Sequence[Path], reading: Reading) -> Split:
    """Return the train images, the test images (None if `test` is empty) and the notes."""
    return decode_split(
        [_encoded(path) for path in train], [_encoded(path) for path in test], reading
    )


def decode_split(train: Sequence[Encoded], test: Sequence[Encoded], reading: Reading) -> Split:
    """Decode the files of a split; returns the same as `read_files`.

    Both sides are decoded together, so that they have one size and one number of channels.
    """
    images, positions, notes = decode([*train, *test], reading)
    count = int((positions < len(train)).sum())
    return images[:count], images[count:] if test else None, notes


def _encoded(path: Path) -> Encoded:
    return Encoded(str(path), partial(Path, path))


def _visible_files(folder: Path) -> list[Path]:
    files: list[Path] = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name != "__MACOSX"]
        files += [Path(parent, name) for name in names if not name.startswith(".")]
    return sorted(files)


def _official_split(folder: Path, images: list[Path]) -> tuple[list[Path], list[Path]]:
    below: dict[str, list[Path]] = {}
    for path in images:
        inner = path.relative_to(folder).parts
        below.setdefault(inner[0].lower() if len(inner) > 1 else "", []).append(path)
    test = next((name for name in _TEST_FOLDERS if name in below), None)
    return (below["train"], below[test]) if test and "train" in below else (images, [])


def _no_images(folder: Path, files: list[Path]) -> InputError:
    endings = ", ".join(ending[1:] for ending in IMAGE_ENDINGS)
    arrays = [path.name for path in files if path.suffix in (".npy", ".npz")]
    hint = f"; for an array, name the file itself, as {folder / arrays[0]}" if arrays else ""
    if not files:
        return InputError(f"{folder} is empty: put images there ({endings})")
    return InputError(
        f"{folder} holds {_count(len(files), 'file')}, none an image: accepted are {endings}{hint}"
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + "s" * (number != 1)
