"""What protects a run's folder: signals that wait for the checkpoint, and a lock against a second run."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import IO, Any

from poise.errors import InputError

_heard: list[list[float]] = []  # when the blocks that the main thread is in were asked to stop
ECHO_SECONDS = 1.0  # torchrun, srun and terminals each pass a signal on, so that one request may arrive several times

_further: ContextVar[Callable[[], bool]] = ContextVar("further", default=lambda: False)


@contextmanager
def stopping_when(reason: Callable[[], bool]) -> Iterator[None]:
    """Inside the block `stop_signals` asks a run of this thread to stop when `reason()` is true, too."""
    token = _further.set(reason)
    try:
        yield
    finally:
        _further.reset(token)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Inside the block, a first Ctrl-C or SIGTERM only sets what the yielded function tells; one after a second acts.

    Only the main thread hears signals. In another thread the function tells what the main thread's block has heard.
    """
    asked: list[float] = []
    further = _further.get()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: any(_heard) or further()
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        asked.append(time.monotonic())
        if asked[-1] - asked[0] > ECHO_SECONDS:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for known in before:
        signal.signal(known, handle)
    _heard.append(asked)
    try:
        yield lambda: bool(asked) or further()
    finally:
        _heard.pop()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the folder, made if need be, against a second process; a folder left empty is removed.

    Raises:
        InputError: another process is training there, or the folder cannot be made.
    """
    lock = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(lock, "w")
    except OSError as error:
        reason = "it is a file" if folder.is_file() else error.strerror or error
        remedy = "give --out (out=) a folder that can be written to"
        raise InputError(f"cannot use {folder} for the run: {reason}; {remedy}") from None
    with file:
        _hold(file, folder)
        try:
            yield
        finally:
            if list(folder.iterdir()) == [lock]:
                lock.unlink()
                folder.rmdir()


def _hold(file: IO[str], folder: Path) -> None:
    if os.name != "posix":  # no advisory locks there
        return
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise InputError(f"{folder}: another process is training there") from None
