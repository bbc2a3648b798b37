"""List the files of a folder, following links, and recognise the sides of a split.

A folder that can be reached by several paths is read once, by its path without links if it has one.
"""

import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from poise.data.dataset import shortened
from poise.data.opening import shown
from poise.errors import InputError
from poise.support.progress import plural

IMAGE_ENDINGS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".heic", ".heif", ".hif"),
    *(".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"),
)
_SIDES = {
    "train": ("train", "training"),
    "test": ("test", "testing"),
    "val": ("val", "valid", "validation"),
}
# A side's name may have a suffix: trainA, test_images, val2017, train-set.
_SUFFIX = r"([ab]|[-_ ]?(set|data|images?|imgs?|pics|pictures|photos|hr|lr|\d+))?"
_PATTERNS = {
    side: re.compile(f"({'|'.join(names)}){_SUFFIX}", re.IGNORECASE)
    for side, names in _SIDES.items()
}
_MOST_NAMED = 3


@dataclass
class Listing:
    """The files of a folder.

    Attributes:
        files: sorted by path.
        notes: what is not read.
        unreadable: what cannot be read, with the reason.
    """

    files: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


def list_files(folder: Path) -> Listing:
    """List the files in a folder and its subfolders, except those that begin with a dot.

    Symbolic links are followed. Pipes, sockets and devices are noted, because to open them may
    take forever.
    """
    found, seen, waiting = Listing(), dict[tuple[int, int], Path](), [folder]
    for parent in folder.resolve().parents:  # a link to one of them is a loop
        place = parent.stat()
        seen[place.st_dev, place.st_ino] = parent
    # Links are followed after all real folders, and a link before the links inside its target, so
    # that train/ and test/ keep their names.
    while waiting:
        links: list[Path] = []
        for start in [start for start in waiting if _is_new(start, found, seen)]:
            _add_tree(start, found, seen, links)
        waiting = sorted(links)
    found.files.sort()
    return found


def _is_new(folder: Path, found: Listing, seen: dict[tuple[int, int], Path]) -> bool:
    """Return whether a folder is not in `seen`, and add it."""
    try:
        place = folder.stat()
    except OSError as error:
        found.unreadable.append(f"{shown(folder)} cannot be read: {error.strerror}")
        return False
    first = seen.setdefault((place.st_dev, place.st_ino), folder)
    if first != folder:
        found.notes.append(f"{shown(folder)} is not read again: it is {shown(first)}")
    return first == folder


def _add_tree(
    folder: Path, found: Listing, seen: dict[tuple[int, int], Path], links: list[Path]
) -> None:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        found.unreadable.append(f"{shown(folder)} cannot be read: {error.strerror}")
        return
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        kind = _kind(entry)
        if kind == "folder" and entry.name != "__MACOSX":
            if is_run(path):
                found.notes.append(f"ignored: {shown(path)}, which is the folder of a run")
            elif entry.is_symlink():
                links.append(path)
            elif _is_new(path, found, seen):
                _add_tree(path, found, seen, links)
        elif kind == "file":
            found.files.append(path)
        elif kind == "special" and is_image(path):
            found.notes.append(f"ignored: {shown(path)}, which is a pipe, a socket or a device")


def is_run(folder: Path) -> bool:
    """Return whether a folder holds what `poise train` writes. Its pictures are no data."""
    written = any((folder / name).exists() for name in ("checkpoints", "metrics.jsonl"))
    return written and is_config(folder / "config.json")


def is_config(path: Path) -> bool:
    """Return whether a config.json is of a run. Other programs have files of this name, too."""
    try:
        return path.is_file() and {"recipe", "data"} <= json.loads(path.read_bytes()).keys()
    except (OSError, ValueError, AttributeError):
        return True  # it is damaged: whoever reads it says so


def _kind(entry: os.DirEntry[str]) -> str:
    """Return "folder", "file" or "special". A broken link is a file, which cannot be opened."""
    if entry.is_file(follow_symlinks=False):
        return "file"
    try:
        mode = entry.stat().st_mode
    except OSError:
        return "file"
    if stat.S_ISDIR(mode):
        return "folder"
    return "file" if stat.S_ISREG(mode) else "special"


def is_image(path: Path) -> bool:
    """Return whether a file has the ending of an image."""
    return path.suffix.lower() in IMAGE_ENDINGS


def by_ending(files: Iterable[Path]) -> str:
    """Return the number of files of each ending.

    Example:
        >>> by_ending([Path("a.txt"), Path("b.TXT"), Path("c")])
        '2 .txt, 1 without ending'
    """
    endings = Counter(path.suffix.lower() or "without ending" for path in files)
    return ", ".join(f"{number:,} {shown(ending)}" for ending, number in endings.most_common())


@dataclass(frozen=True)
class FolderSplit:
    """Hold the files of a folder by side: training, test and validation.

    Attributes:
        train, test: the images of both sides; without an official split all images, and none.
        sides: the side of each image: train, test, val, or an empty text.
        notes: what the user has to know.
    """

    train: list[Path]
    test: list[Path]
    sides: dict[Path, str]
    notes: tuple[str, ...]


def official_split(folder: Path, images: Sequence[Path]) -> FolderSplit:
    """Find the official split of a folder in the names of its subfolders.

    The side of an image is the outermost subfolder that is called like a side: train/cat/1.png,
    archive/test/1.png, cat/val/1.png. Train and test (or val, without test) make a split.
    """
    inner = {parent: parent.relative_to(folder).parts for parent in {p.parent for p in images}}
    of_folder = {parent: side_of(parts) for parent, parts in inner.items()}
    sides = {path: of_folder[path.parent][0] for path in images}
    plain = _plain_sides(images, inner)
    groups: dict[str, list[Path]] = {}
    for path, side in (plain or sides).items():
        groups.setdefault(side, []).append(path)
    held_out = "test" if "test" in groups else "val"
    named = {} if plain else _names_of_sides(of_folder.values())
    notes = tuple(_split_notes(images, named, groups, held_out))
    if "train" in groups and held_out in groups:
        return FolderSplit(groups["train"], groups[held_out], sides, notes)
    return FolderSplit(list(images), [], sides, notes)


def _plain_sides(
    images: Sequence[Path], inner: Mapping[Path, tuple[str, ...]]
) -> dict[Path, str] | None:
    """Return the sides of a folder with train/ and test/ (or val/, ...) at its top, else None.

    Other folders are then outside the split, whatever is in them.
    """
    tops = {parent: parts[0].lower() if parts else "" for parent, parts in inner.items()}
    names = (*_SIDES["test"][:1], *_SIDES["val"])
    test = next((name for name in names if name in tops.values()), None)
    if test is None or "train" not in tops.values():
        return None
    side = {"train": "train", test: "test"}
    return {path: side.get(tops[path.parent], "") for path in images}


def side_of(folders: Sequence[str]) -> tuple[str, str]:
    """Return the side that a path belongs to, and the path of the folder that says so.

    Example:
        >>> side_of(("archive", "trainA", "x")), side_of(("cats",))
        (('train', 'archive/trainA'), ('', ''))
    """
    for depth, name in enumerate(folders, 1):
        for side, pattern in _PATTERNS.items():
            if pattern.fullmatch(name):
                return side, "/".join(folders[:depth])
    return "", ""


def classes_of_folders(paths: Sequence[Path], folder: Path, *, has_split: bool) -> list[str] | None:
    """Return the class of each image: the folder it is in. None: an image is in none.

    The class is the first folder, after those that all images share. In an official split it is
    the folder below that of a side (train/cat/1.png), or above it (cat/train/1.png).

    Args:
        paths: the images.
        folder: the folder that holds them.
        has_split: whether folders are sides of an official split. Else a folder that is called
            like a side, such as valid/ beside invalid/, is a class.
    """
    inner = [path.parent.relative_to(folder).parts for path in paths]
    found: list[tuple[str, ...]] = []
    for parts in inner:
        side, place = side_of(parts) if has_split else ("", "")
        depth = len(place.split("/")) if side else 0
        found.append(parts[depth:] or parts[: depth - 1][-1:] if side else parts)
    while found and all(len(parts) > 1 and parts[0] == found[0][0] for parts in found):
        found = [parts[1:] for parts in found]
    return [parts[0] for parts in found] if all(found) else None


def _names_of_sides(sides: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    names: dict[str, set[str]] = {}
    for side, name in sides:
        if side:
            names.setdefault(side, set()).add(name)
    return names


def _split_notes(
    images: Sequence[Path],
    names: Mapping[str, set[str]],
    groups: Mapping[str, list[Path]],
    held_out: str,
) -> Iterator[str]:
    """Yield notes about a split, and about names that look like a split and are none.

    Args:
        images: all images.
        names: the folders of each side; empty if they are train/ and test/ at the top.
        groups: the images of each side.
        held_out: the side that is used for testing.
    """
    if "train" in groups and held_out in groups:
        if names and (held_out == "val" or len(names["train"]) > 1):
            yield f"split: train is {_some(names['train'])}, test is {_some(names[held_out])}"
        rest = len(images) - len(groups["train"]) - len(groups[held_out])
        if rest:
            yield f"ignored: {plural(rest, 'image')} outside the split's two folders"
    elif names:
        found = _some({name for some in names.values() for name in some})
        missing = "train" if "train" not in names else "test"
        yield (
            f"the folders' names are no split, because {missing} is missing beside {found}: "
            "all images are used together"
        )
    else:
        named = {
            side
            for path in images
            for side, words in _SIDES.items()
            if re.match(rf"({'|'.join(words)})[-_ .\d]", path.name, re.IGNORECASE)
        }
        if len(named) > 1:
            yield (
                f"the file names begin with {' and '.join(sorted(named))}, but are no split: "
                "to keep such a split, move the files into folders train and test"
            )


def _some(names: Iterable[str]) -> str:
    listed = sorted(map(shown, names))
    more = len(listed) - _MOST_NAMED
    return ", ".join(listed[:_MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def check_readable(unreadable: Sequence[str], *, skip: bool) -> Iterator[str]:
    """Yield notes about folders that cannot be read.

    Raises:
        InputError: there are some, and `skip` is false.
    """
    if unreadable and not skip:
        raise InputError(f"{unreadable[0]}; change its permissions, or pass --skip-unreadable")
    yield from shortened([f"skipped: {line}" for line in unreadable], "skipped", "folder")
