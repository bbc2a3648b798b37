"""The training log: metrics.jsonl of a run, also as a DataFrame."""

import json
import os
from collections.abc import Container, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from poise.errors import InputError, MissingExtraError, RunError
from poise.support.files import decode_json, read_regular, write_failure, write_file
from poise.support.progress import warn

if TYPE_CHECKING:
    from pandas import DataFrame

Entry = dict[str, int | float]
ERRORS = ("mse", "mae", "error")  # mean squared, mean absolute, and of another power
OF_CURVES = {"stage", "images_seen", "images_per_second"}
HELD_OUT, TRAINING = "held_out_elbo_nats", "train_elbo_nats"
OF_EVERY_ENTRY = OF_CURVES | {"step"}


class Log:
    """Writes metrics.jsonl.

    When training resumes from a checkpoint, entries after that position and damaged lines are
    deleted.

    Args:
        folder: folder of the run.
        stage, step: position that training resumes from.
    """

    def __init__(self, folder: Path, stage: int, step: int) -> None:
        self._path = path = folder / "metrics.jsonl"
        entries, damaged = _read(path, OF_EVERY_ENTRY)
        if damaged:
            warn(f"{path} has {damaged} damaged line{'s' * (damaged > 1)}, left out")
        kept = [entry for entry in entries if (entry["stage"], entry["step"]) <= (stage, step)]
        write_file(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
        self._file = open(path, "a", encoding="utf-8")

    def write(self, entry: dict[str, float]) -> None:
        """Append an entry.

        Raises:
            RunError: the disk is full or not writable, or the run's folder was removed.
        """
        if not self._in_place():
            self._file.close()
            if not (self._path.parent / "config.json").exists():
                raise RunError(
                    f"{self._path.parent} was removed or renamed during training: "
                    "training stops, and what is not saved is lost"
                )
            self._file = open(self._path, "a", encoding="utf-8")
        try:
            print(json.dumps(entry), file=self._file, flush=True)
        except OSError as error:
            raise write_failure(Path(self._file.name), error) from error

    def _in_place(self) -> bool:
        """Return whether the open file is still the one in the folder."""
        try:
            return os.path.samestat(self._path.stat(), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return False

    def close(self) -> None:
        with suppress(OSError):  # a full disk was reported when the entry was written
            self._file.close()


def read_log(path: Path, required: set[str] = OF_CURVES) -> list[Entry]:
    """Return the entries of metrics.jsonl, without damaged lines. Without a file there are none.

    Args:
        path: the file.
        required: names of the values that an entry must have, "stage" among them.

    Raises:
        InputError: the file cannot be read.
    """
    return _read(path, required)[0]


def history(path: Path) -> "DataFrame":
    """Return the log as a pandas DataFrame, one row per entry; see `Run.history`.

    Raises:
        InputError: the file cannot be read.
        MissingExtraError: pandas is not installed.
    """
    try:
        from pandas import DataFrame
    except ImportError:
        raise MissingExtraError("run.history", "track") from None
    frame = DataFrame(read_log(path))
    return frame.astype(dict.fromkeys({"stage", "step", "images_seen"} & {*frame.columns}, int))


def mean_error(entry: Entry) -> float:
    """Return the error of an entry that gamma2 follows.

    Raises:
        KeyError: the entry is of a flow.
    """
    return entry[error_among(entry)]


def error_among(names: Container[str]) -> str:
    """Return which of `ERRORS` is among names of figures; the first, if none is."""
    return next((name for name in ERRORS if name in names), ERRORS[0])


def _read(path: Path, required: set[str]) -> tuple[list[Entry], int]:
    """Return the entries, and the number of damaged lines.

    A last line without its end does not count: the process was killed while it wrote the line.
    """
    try:
        *lines, unfinished = read_regular(path).split(b"\n")
    except FileNotFoundError:
        return [], 0
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from None
    entries = list(_parsed(lines, required))
    return [*entries, *_parsed([unfinished], required)], len(lines) - len(entries)


def _parsed(lines: list[bytes], required: set[str]) -> Iterator[Entry]:
    for line in lines:
        with suppress(InputError):
            entry = decode_json(line, Entry, "")
            if entry.keys() >= required and entry["stage"] in (1, 2):
                yield entry
