"""Protect a run: signals wait for its checkpoint, and a lock keeps others out of its folder."""

import errno
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from poise.errors import InputError

_signal_times: list[list[float]] = []  # one list for each open block of the main thread
# torchrun, srun and terminals each forward a signal: one request can arrive several times.
ECHO_SECONDS = 1.0
WITHOUT_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)

_other_reason: ContextVar[Callable[[], bool]] = ContextVar("other_reason", default=lambda: False)


@contextmanager
def stopping_when(reason: Callable[[], bool]) -> Iterator[None]:
    """Inside the block, also ask a run of this thread to stop when `reason()` is true.

    The function that `stop_signals` yields then returns true, too.
    """
    token = _other_reason.set(reason)
    try:
        yield
    finally:
        _other_reason.reset(token)


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C or SIGTERM has arrived inside the block.

    The first signal only makes this function return true. A signal more than a second later acts as
    usual. Python delivers signals to the main thread. In another thread, the function returns
    whether a block of the main thread received a signal.
    """
    asked: list[float] = []
    other_reason = _other_reason.get()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: any(_signal_times) or other_reason()
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: Any) -> None:
        asked.append(time.monotonic())
        if asked[-1] - asked[0] > ECHO_SECONDS:
            signal.signal(number, before[signal.Signals(number)])
            signal.raise_signal(number)

    for known in before:
        signal.signal(known, handle)
    _signal_times.append(asked)
    try:
        yield lambda: bool(asked) or other_reason()
    finally:
        _signal_times.pop()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other processes; make it first if it does not exist.

    The lock ends with the block, and also when the process is killed. On exit an empty folder is
    removed. Two blocks of one process refuse each other too.

    Raises:
        InputError: another process has locked the folder, the folder cannot be written to, or its
            file system has no locks. No marker file replaces a lock, because it would outlive a
            killed job and block its restart on another machine.
    """
    path = folder / ".lock"
    lock = FileLock(path, timeout=0, fallback_to_soft=False)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise InputError(f"{folder}: another process is training there") from None
    except OSError as error:
        raise InputError(f"cannot use {folder} for the run: {_refusal(folder, error)}") from None
    try:
        yield
    finally:
        with suppress(OSError):  # the folder is gone; or Windows, where release() deletes the file
            if list(folder.iterdir()) == [path]:
                path.unlink()
        lock.release()
        with suppress(OSError):  # the folder is not empty
            folder.rmdir()


def _refusal(folder: Path, error: OSError) -> str:
    if error.errno in WITHOUT_LOCKS:
        return "its file system has no file locks; give --out (out=) a folder on another one"
    reason = "it is a file" if folder.is_file() else error.strerror or error
    return f"{reason}; give --out (out=) a folder that can be written to"
