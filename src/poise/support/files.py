"""Write files atomically: a file appears complete or not at all, even if a process is killed."""

import errno
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from poise.errors import InputError, RunError


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
    writing = path.with_name(f".writing-{path.name}-{os.getpid()}")
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
    with open(path, "wb") as file:
        file.write(content)
        sync(file)


def sync(file: IO[bytes]) -> None:
    """Flush a file and wait until its content is on the disk."""
    file.flush()
    os.fsync(file.fileno())
