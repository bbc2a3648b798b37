"""Write files atomically, and read JSON files with a check of their types.

A file appears complete or not at all, even if a process is killed. It is written under a temporary
name that nobody can predict, and never through a symbolic link.

msgspec reads JSON: it checks a value against a type annotation and names the wrong place. It has no
dependencies and takes 0.7 MB. pydantic takes ten times as much, and cattrs converts plain values
instead of checking them.
"""

import errno
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, TypeVar

from poise.errors import InputError, MissingInputError, RunError

LEFTOVER_SECONDS = 24 * 3600.0  # an unfinished file older than this is from a killed process
LONE_SURROGATE = re.compile(rb"\\ud[c-f]", re.IGNORECASE)
Read = TypeVar("Read")  # `type[Read] | Any`: at run time dict[str, int] is not a type


def write_file(path: Path, content: bytes) -> None:
    """Write a file atomically: it appears complete or not at all.

    Raises:
        RunError: the disk is full or cannot be written. An earlier file of that name is intact.
    """
    with appearing(path) as writing:
        write_synced(writing, content)


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to. On exit rename it to `path`; on an error delete it.

    Raises:
        RunError: the disk is full or cannot be written. An earlier file of that name is intact.
    """
    writing = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield writing
        writing.replace(path)
    except BaseException as error:
        with suppress(OSError):  # the error may come from the folder itself
            writing.unlink()
        if isinstance(error, OSError) and not isinstance(error, InputError):
            raise write_failure(path, error) from error
        raise


def temporary(path: Path) -> Path:
    """Return a path beside `path` that nobody can predict, to write to before a rename."""
    return path.with_name(f".writing-{path.name}-{os.getpid()}-{secrets.token_hex(4)}")


def delete_leftovers(folder: Path) -> None:
    """Delete the temporary files in a folder whose processes were killed long ago."""
    for leftover in folder.glob(".writing-*"):
        with suppress(OSError):  # renamed or deleted by its process or another, or not ours
            if time.time() - leftover.stat().st_mtime > LEFTOVER_SECONDS:
                leftover.unlink()


def remove(path: Path) -> None:
    """Delete a file, a folder or a symbolic link (not its target), if that is allowed."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON, with null for infinity and NaN."""
    write_file(path, (json.dumps(strict(values), indent=2, allow_nan=False) + "\n").encode())


def strict(values: Any) -> Any:
    """Replace infinity and NaN, which JSON lacks, by None."""
    if isinstance(values, dict):
        return {key: strict(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [strict(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def write_failure(path: Path, error: OSError) -> RunError:
    """Return the error for a file that cannot be written, with a remedy."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = (
        "what was saved before is intact: make room, run again"
        if full
        else "choose a place that can be written to"
    )
    return RunError(f"cannot write {path}: {error.strerror or error}; {remedy}")


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until its content is on the disk."""
    with open(path, "xb") as file:  # "x" does not follow a symbolic link
        file.write(content)
        sync(file)


def sync(file: IO[bytes]) -> None:
    """Flush a file and wait until its content is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def read_regular(path: Path) -> bytes:
    """Return the content of a regular file. Do not wait for a writer of a named pipe.

    Raises:
        OSError: the file cannot be read, or is not a regular file.
    """
    descriptor = os.open(
        path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    )
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def read_json(path: Path, kind: type[Read] | Any) -> Read:
    """Return the content of a JSON file as a type.

    Args:
        path: the file.
        kind: any type: a dataclass, `dict[str, float]`, a union. Numbers must be finite, as JSON
            has no NaN and no infinity.

    Raises:
        MissingInputError: there is no such file.
        InputError: the file cannot be read, is not JSON, or has another type.

    Example:
        >>> read_json(Path("summary.json"), dict[str, int])              # doctest: +SKIP
    """
    try:
        return decode_json(read_regular(path), kind, str(path))
    except FileNotFoundError:
        raise MissingInputError(f"{path}: no such file") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None


def decode_json(content: bytes, kind: type[Read] | Any, where: str) -> Read:
    """Return JSON text as a type; see `read_json`.

    Raises:
        InputError: the text is not JSON, or has another type. `where` names it in the message.
    """
    import msgspec

    try:
        # The name of a folder may hold bytes that are not UTF-8. Python writes them as lone
        # surrogates, which only its own reader takes.
        if LONE_SURROGATE.search(content):
            values = json.loads(content, parse_constant=_finite, parse_float=_finite)
            return msgspec.convert(values, kind)
        return msgspec.json.decode(content, type=kind)
    except msgspec.ValidationError as error:
        raise InputError(f"{where} is damaged: {in_words(error)}") from None
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise InputError(f"{where} cannot be read as JSON: {in_words(error)}") from None


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def convert(values: Any, kind: type[Read] | Any, where: str) -> Read:
    """Return plain values, as JSON has them, as a type; see `read_json`.

    Raises:
        InputError: the values have another type. `where` names them in the message.
    """
    import msgspec

    try:
        return msgspec.convert(values, kind)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise InputError(f"{where}: {in_words(error)}") from None


def in_words(error: Exception) -> str:
    """Return the reason of an error of msgspec without code marks, with the place first."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    reason, _, place = str(error).replace("`", "").partition(" - at $")
    return f"{place.lstrip('.')}: {reason}" if place else reason
