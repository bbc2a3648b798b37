"""Read a folder of image files or of tar files, with an optional split into train/ and test/."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from poise.data.cached import decode
from poise.data.dataset import Found, Reading, Split
from poise.data.encoded import Encoded
from poise.data.listing import (
    IMAGE_ENDINGS,
    FolderSplit,
    by_ending,
    check_readable,
    classes_of_folders,
    is_image,
    list_files,
    official_split,
)
from poise.data.opening import shown
from poise.data.storage import part
from poise.data.tars import is_tar, list_images
from poise.errors import InputError
from poise.support.progress import plural


def read_folder(folder: Path, reading: Reading) -> Found:
    """Return all images in a folder and its subfolders, sorted by path.

    The split is that of `listing.official_split`. Links are followed. Files and folders whose names
    begin with a dot are skipped. The notes count other files by their ending. A folder without
    image files may hold tar files, which are read as `read_tars` does.

    Raises:
        InputError: the folder holds no files or no images, or has a subfolder that cannot be read;
            see also `encoded.decode`.
    """
    listing = list_files(folder)
    notes = [*check_readable(listing.unreadable, skip=reading.skip_unreadable), *listing.notes]
    images = [path for path in listing.files if is_image(path)]
    others = [path for path in listing.files if not is_image(path)]
    if not images:
        tars = [path for path in listing.files if is_tar(path)]
        if tars:
            return read_tars(tars, folder, reading, notes)
        raise _no_images(folder, listing.files)
    if others:
        notes.append(f"ignored: {by_ending(others)}")
    found = official_split(folder, images)
    if reading.whole:
        labels = _classes(images, folder, found, reading)
        split = read_files(images, [], reading, [found.sides[path] for path in images], labels)
    else:
        notes += found.notes
        used = [*found.train, *found.test]
        labels = _classes(used, folder, found, reading)
        split = read_files(found.train, found.test, reading, labels=labels)
    inside = f"{shown(folder)}/"
    split = split._replace(names=tuple(name.removeprefix(inside) for name in split.names))
    return Found(shown(folder.resolve().name), split, shown(folder), tuple(notes))


def read_tars(
    tars: Sequence[Path], folder: Path, reading: Reading, notes: Sequence[str] = ()
) -> Found:
    """Return all images in tar files, in the order of the files and of their members.

    A tar file counts as a folder: its name and the folders inside say the side of its images.

    Args:
        tars: the files.
        folder: the folder that holds them.
        reading: how to read the images.
        notes: what is known about the folder.

    Raises:
        InputError: a file is damaged, or there are no images; see also `encoded.decode`.
    """
    listed = list_images(tars, folder)
    source = folder if len(tars) > 1 else tars[0]
    if not listed.files:
        held = f" ({', '.join(listed.notes)})" if listed.notes else ""
        raise InputError(f"{shown(source)} holds no image{held}: name tar files of images")
    images = list(listed.files)
    found = official_split(folder, images)
    files = listed.files
    if reading.whole:
        sides = [found.sides[path] for path in images]
        labels = _classes([listed.inner[path] for path in images], folder, found, reading)
        split = decode_split([*files.values()], [], reading, sides, labels)
    else:
        train, test = ([files[path] for path in side] for side in (found.train, found.test))
        inner = [listed.inner[path] for path in (*found.train, *found.test)]
        labels = _classes(inner, folder, found, reading)
        split = decode_split(train, test, reading, labels=labels)
        notes = [*notes, *found.notes]
    inside = f"{shown(folder)}/"
    split = split._replace(names=tuple(name.removeprefix(inside) for name in split.names))
    return Found(shown(source.resolve().stem), split, shown(source), (*notes, *listed.notes))


def _classes(
    paths: Sequence[Path], folder: Path, split: FolderSplit, reading: Reading
) -> list[str] | None:
    """Return the classes of images by their folders. None: none are wanted."""
    if not reading.labels:
        return None
    return classes_of_folders(paths, folder, has_split=bool(split.test))


def read_files(
    train: Sequence[Path],
    test: Sequence[Path],
    reading: Reading,
    sides: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
) -> Split:
    """Decode the files of a split.

    Args:
        train, test: the files of both sides.
        reading: how to read them.
        sides: the side of each training file; None: train.
        labels: the class of each file, of training and then of test files. None: not known.
    """
    files = [_encoded(path) for path in train], [_encoded(path) for path in test]
    return decode_split(*files, reading, sides, labels)


def decode_split(
    train: Sequence[Encoded],
    test: Sequence[Encoded],
    reading: Reading,
    sides: Sequence[str] | None = None,
    labels: Sequence[Any] | None = None,
) -> Split:
    """Decode the files of a split; see `read_files`.

    Both sides are decoded together, so that they have one size and one number of channels. Without
    files in `test`, the source has no split.
    """
    files = [*train, *test]
    found = decode(files, reading)
    count = int((found.positions < len(train)).sum())
    shared = found.notes, found.levels, found.skipped, found.names
    classes = None if labels is None else np.asarray(labels)[found.positions]
    if reading.whole:
        if sides is None:
            sides = ["train"] * len(train) + ["test"] * len(test) if test else [""] * len(train)
        of_images = tuple(sides[int(position)] for position in found.positions)
        return Split(found.images, None, *shared, of_images, classes)
    shared = *shared[:3], found.names[:count]
    split = Split(
        part(found.images, slice(count)) if test else found.images,
        part(found.images, slice(count, None)) if test else None,
        *shared,
    )
    if classes is None:
        return split
    return split._replace(labels=classes[:count], test_labels=classes[count:])


def _encoded(path: Path) -> Encoded:
    return Encoded(shown(path), partial(Path, path), path)


def _no_images(folder: Path, files: list[Path]) -> InputError:
    endings = ", ".join(ending[1:] for ending in IMAGE_ENDINGS)
    if not files:
        return InputError(f"{shown(folder)} is empty: put images there ({endings})")
    arrays = [path for path in files if path.suffix.lower() in (".npy", ".npz")]
    tables = [path for path in files if path.suffix.lower() in (".arrow", ".parquet")]
    hint = ""
    if arrays:
        hint = f"; for an array, name the file itself, as {shown(arrays[0])}"
    elif tables:
        hint = f"; for a data set of the Hub's library, give hf:{shown(folder)}"
    return InputError(
        f"{shown(folder)} holds {plural(len(files), 'file')}, none an image: "
        f"accepted are {endings}; there are {by_ending(files)}{hint}"
    )
