"""List the images in tar files, such as the shards of webdataset, without unpacking them.

A tar file is a row of members: a header, then the content as it is. One pass over the headers finds
where each content begins. Any image is then one read of the file, so that images come in any order.
"""

import posixpath
import re
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path, PurePosixPath

from poise.data.encoded import Encoded
from poise.data.listing import by_ending, is_image, side_of
from poise.data.opening import shown
from poise.errors import InputError
from poise.support.progress import plural

ENDING = ".tar"
MOST_LINKS = 40  # in a chain, as on Linux; a loop has no end
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")


@dataclass(frozen=True)
class TarImages:
    """The images of some tar files.

    Attributes:
        files: each image, by a path whose folders say its side, see `_place`.
        inner: for each of these paths the one without the name of the tar file, whose folders say
            the class of the image.
        notes: what is not read.
    """

    files: dict[Path, Encoded]
    inner: dict[Path, Path]
    notes: tuple[str, ...]


def list_images(tars: Sequence[Path], folder: Path) -> TarImages:
    """List the images of some tar files, in the order of the files and of their members.

    A member is an image by its ending. Of a sample of webdataset with several images (0001.jpg and
    0001.mask.png), only the one with a plain ending is read.

    Args:
        tars: the files.
        folder: the folder that holds them.

    Raises:
        InputError: a file is no intact tar file.
    """
    files: dict[Path, Encoded] = {}
    inner: dict[Path, Path] = {}
    others, beside, notes = list[Path](), 0, list[str]()
    for tar in tars:
        members, links, end = _members(tar)
        if links:
            notes.append(
                f"ignored: {plural(links, 'link')} in {shown(tar)} to files that it does not hold"
            )
        if not end:
            notes.append(f"{shown(tar)} has no mark of its end: it may have been cut short")
        samples = {_sample(name) for name, _, _ in members if _is_plain_image(name)}
        for name, start, size in members:
            if not is_image(Path(name)):
                others.append(Path(name))
                continue
            if not _is_plain_image(name) and _sample(name) in samples:
                beside += 1
                continue
            label = f"{shown(tar)}/{shown(name)}"
            place, within = _place(tar, folder, name)
            files[place] = Encoded(label, partial(_content, tar, start, size), tar)
            inner[place] = within
    if others:
        notes.append(f"ignored: {by_ending(others)}")
    if beside:
        notes.append(f"ignored: {plural(beside, 'image')} beside another one of the same sample")
    return TarImages(files, inner, tuple(notes))


def _sample(name: str) -> str:
    """Return the key of a sample of webdataset: all before the first dot of the file's name."""
    path = PurePosixPath(name)
    return str(path.with_name(path.name.split(".")[0]))


def _is_plain_image(name: str) -> bool:
    return is_image(Path(name)) and PurePosixPath(name).name.count(".") == 1


def _members(tar: Path) -> tuple[list[tuple[str, int, int]], int, bool]:
    """Return the files in a tar file, the number of broken links, and whether it has its end mark.

    Each file has a name, a start and a size. A link to a file in the same tar file is that file
    under another name. Hidden files are left out.
    """
    found: list[tuple[str, tuple[int, int] | str]] = []  # the place of a link is its target's name
    places: dict[str, tuple[int, int] | str] = {}
    try:
        whole = tar.stat().st_size
        with tarfile.open(tar, "r:") as archive:
            for member in archive:
                # tarfile keeps all headers otherwise.
                archive.members = []  # pyright: ignore[reportAttributeAccessIssue]
                parts = PurePosixPath(member.name).parts
                hidden = any(
                    (part.startswith(".") and part != "..") or part == "__MACOSX" for part in parts
                )
                if not (member.isreg() or member.islnk() or member.issym()):
                    continue
                place: tuple[int, int] | str = member.offset_data, member.size
                if member.issym():
                    place = posixpath.join(posixpath.dirname(member.name), member.linkname)
                elif member.islnk():
                    place = member.linkname
                elif member.offset_data + member.size > whole:
                    raise tarfile.ReadError(f"it ends within {member.name}")
                places[posixpath.normpath(member.name)] = place
                if not hidden:
                    found.append((member.name, place))
            # tarfile takes a header that is cut short for the end.
            end = _content(tar, archive.offset, tarfile.BLOCKSIZE).read()
            if end.strip(b"\0"):
                raise tarfile.ReadError(f"it is damaged at byte {archive.offset:,}")
            resolved = [(name, _followed(place, places)) for name, place in found]
            files = [(name, *place) for name, place in resolved if place is not None]
            return files, len(found) - len(files), bool(end)
    except (OSError, tarfile.TarError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(
            f"{shown(tar)} cannot be read as a tar file ({reason}): copy or download it again"
        ) from error


def _followed(
    place: tuple[int, int] | str, places: Mapping[str, tuple[int, int] | str]
) -> tuple[int, int] | None:
    """Return start and size of the file that a link leads to. None: it leads to none."""
    for _ in range(MOST_LINKS):
        if not isinstance(place, str):
            return place
        target = places.get(posixpath.normpath(place))
        if target is None:
            return None
        place = target
    return None


def _content(tar: Path, start: int, size: int) -> BytesIO:
    with tar.open("rb") as file:
        file.seek(start)
        return BytesIO(file.read(size))


def _place(tar: Path, folder: Path, name: str) -> tuple[Path, Path]:
    """Return the path of a member as if the tar file were a folder, and the one without its name.

    The first word in the file's name that names a side becomes a folder as well, as in
    imagenet-train-0001.tar.
    """
    stem = tar.relative_to(folder).with_suffix("")
    words = [word for word in re.split(r"[-_. ]", stem.name) if side_of((word,))[0]]
    above = Path(folder, stem.parent, *words[:1])
    parts = [part for part in PurePosixPath(name).parts if part not in ("/", "//", "..")]
    return Path(above, stem.name, *parts), Path(above, *parts)


def is_tar(path: Path) -> bool:
    """Return whether a file has the ending of a tar file that is not compressed."""
    return path.suffix.lower() == ENDING


def refuse_compressed(path: Path) -> None:
    """Raise InputError for a compressed tar file: its members cannot be read in any order."""
    if path.name.lower().endswith(COMPRESSED):
        raise InputError(
            f"{shown(path)} is compressed, so that its images cannot be read in any order: "
            "decompress it to a .tar file, or unpack it into a folder"
        )
