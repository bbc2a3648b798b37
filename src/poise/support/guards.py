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
_any_asked = threading.Event()
HANGUP: int | None = getattr(signal, "SIGHUP", None)  # absent on Windows
STOPPING = [number for number in (signal.SIGINT, signal.SIGTERM, HANGUP) if number is not None]
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
    """Yield a function that returns whether a signal to stop has arrived inside the block.

    The signals are Ctrl-C, SIGTERM, and SIGHUP (its terminal was closed) unless it is ignored, as
    under nohup. The first signal only makes this function return true. A signal more than a second
    later acts as usual. Python delivers signals to the main thread. In another thread, the function
    returns whether a block of the main thread received a signal.
    """
    asked: list[float] = []
    other_reason = _other_reason.get()
    if threading.current_thread() is not threading.main_thread():
        yield lambda: any(_signal_times) or other_reason()
        return
    before = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOPPING}
    if HANGUP is not None and before.get(HANGUP) == signal.SIG_IGN:
        del before[HANGUP]

    def handle(number: int, frame: Any) -> None:
        asked.append(time.monotonic())
        _any_asked.set()
        if asked[-1] - asked[0] > ECHO_SECONDS:
            signal.signal(number, before[number])
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


def any_asked() -> bool:
    """Return whether any block of `stop_signals` of this process has received a signal."""
    return _any_asked.is_set()


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock the folder against other processes; make it first if it does not exist.

    The lock ends with the block, and also when the process is killed. On exit an empty folder is
    removed. Two blocks of one process refuse each other too.

    Raises:
        InputError: another process has locked the folder, the folder cannot be written to, its
            .lock is a symbolic link, or its file system has no locks. No marker file replaces a
            lock, because it would outlive a killed job and block its restart on another machine.
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
    if error.errno == errno.ELOOP:
        return "its .lock is a symbolic link; delete the link"
    reason = "it is a file" if folder.is_file() else error.strerror or error
    return f"{reason}; give --out (out=) a folder that can be written to"
