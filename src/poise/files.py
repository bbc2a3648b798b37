"""Files that appear whole or not at all, whatever kills the process."""

import errno
import json
import math
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from poise.errors import RunError


def write_file(path: Path, content: bytes) -> None:
    """Write a file so that it appears complete or not at all.

    Raises:
        RunError: the disk is full or cannot be written; a file that was there before is intact.
    """
    writing = path.with_name(f".writing-{path.name}-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_synced(writing, content)
        writing.replace(path)
    except OSError as error:
        with suppress(OSError):  # the folder itself may be what is wrong
            writing.unlink()
        raise write_failure(path, error) from error


def write_json(path: Path, values: Any) -> None:
    """Write values as JSON, those that are no numbers as null: see `strict`."""
    write_file(path, (json.dumps(strict(values), indent=2, allow_nan=False) + "\n").encode())


def strict(values: Any) -> Any:
    """Values that JSON can hold: it has neither infinity nor NaN, which become None."""
    if isinstance(values, dict):
        return {key: strict(value) for key, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [strict(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def write_failure(path: Path, error: OSError) -> RunError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "; what was saved before is intact: make room, run again" if full else ""
    return RunError(f"cannot write {path}: {error.strerror or error}{remedy}")


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until it is on the disk."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
