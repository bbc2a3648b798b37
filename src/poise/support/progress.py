"""Show progress on stderr: a bar on a terminal, otherwise a plain line every 15 seconds.

Work goes on if stderr is closed, its reader has ended or its disk is full.
"""

import io
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar, final

if TYPE_CHECKING:
    import rich.progress

Part = TypeVar("Part", bound=Sized)

SECONDS_BETWEEN_LINES = 15.0
SECONDS_OF_SPEED = 600.0  # window of the speed that gives the time left


@final
class SafeStream:
    """A stream that drops what cannot be written.

    Args:
        stream: the stream. None: Python was started without it.
        only_pipes: drop output only if its reader has ended, and raise other errors.
    """

    def __init__(self, stream: Any, *, only_pipes: bool = False) -> None:
        self._stream = io.StringIO() if stream is None else stream
        # A closed stream raises ValueError.
        self._dropped = (BrokenPipeError,) if only_pipes else (OSError, ValueError)

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except self._dropped as error:
            self._discard_after(error)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except self._dropped as error:
            self._discard_after(error)

    def finish(self) -> None:
        """Flush, and discard what cannot be written: Python flushes again at exit, and fails."""
        try:
            self._stream.flush()
        except self._dropped:
            self._discard()

    def isatty(self) -> bool:
        try:
            return self._stream.isatty()
        except ValueError:
            return False

    def _discard_after(self, error: Exception) -> None:
        if isinstance(error, BrokenPipeError):  # a full disk may have room later
            self._discard()

    def _discard(self) -> None:
        with suppress(OSError, ValueError):  # no file, or a closed one
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def say(line: str) -> None:
    """Print a line on stderr, if it can be written."""
    print(line, file=SafeStream(sys.stderr), flush=True)


def warn(text: str) -> None:
    """Print a warning on stderr, if it can be written."""
    say(f"poise: warning: {text}")


@contextmanager
def progress(title: str, total: int, done: int = 0, *, quiet: bool = False) -> Iterator["Progress"]:
    """Yield a progress display for `total` units of work, of which `done` are already finished."""
    import rich.console
    import rich.progress

    stream: Any = SafeStream(sys.stderr)
    terminal = stream.isatty()
    bar = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}"),
        rich.progress.BarColumn(bar_width=24),
        rich.progress.TaskProgressColumn(),
        rich.progress.TimeRemainingColumn(),
        rich.progress.TextColumn("{task.fields[figures]}"),
        console=rich.console.Console(file=stream),
        speed_estimate_period=SECONDS_OF_SPEED,
        disable=quiet or not terminal,  # a disabled bar still counts
    )
    with bar:
        bar.add_task(title, total=total, completed=done, figures="")
        yield Progress(bar, lines=not (quiet or terminal))


@final
class Progress:
    """The state of a task, shown by rich's bar or by lines in a log.

    Args:
        bar: rich's progress display with one task.
        lines: whether to print a line every 15 seconds, because the bar is switched off.
    """

    def __init__(self, bar: "rich.progress.Progress", *, lines: bool) -> None:
        self._bar, self._task, self._lines = bar, bar.tasks[0], lines
        self._last = time.monotonic()

    def update(self, done: int, figures: Mapping[str, str]) -> None:
        """Show that `done` units are finished, and show figures by name."""
        text = "  ".join(f"{name} {value}" for name, value in figures.items())
        self._bar.update(self._task.id, completed=done, figures=text)
        now = time.monotonic()
        if self._lines and (self._task.finished or now - self._last >= SECONDS_BETWEEN_LINES):
            self._last, left = now, self._task.time_remaining
            known = "" if left is None else f", {hours_minutes(left)} left"
            say(f"{self._task.description} {done}/{self._task.total}{known}  {text}")


def counted(parts: Iterable[Part], display: Progress) -> Iterator[Part]:
    """Yield the parts, and show the number of finished items and the rate per second."""
    done, began = 0, time.monotonic()
    for part in parts:
        yield part
        done += len(part)
        display.update(done, {"per second": f"{done / max(time.monotonic() - began, 1e-9):.0f}"})


def plural(count: int, noun: str) -> str:
    """Format a number with its noun.

    Example:
        >>> plural(1, "run"), plural(1000, "run")
        ('1 run', '1,000 runs')
    """
    return f"{count:,} {noun}" + "s" * (count != 1)


def duration(seconds: float) -> str:
    """Format a time in words, to two figures.

    Example:
        >>> duration(50), duration(600), duration(9000)
        ('50 s', '10 min', '2.5 h')
    """
    for unit, size, style in (("h", 3600, ".1f"), ("min", 60, ".0f")):
        if seconds >= 2 * size:
            return f"{seconds / size:{style}} {unit}"
    return f"{seconds:.0f} s"


def hours_minutes(seconds: float) -> str:
    """Format a time as h:mm, rounded up to a whole minute.

    Example:
        >>> hours_minutes(0), hours_minutes(50), hours_minutes(3 * 3600 + 61)
        ('0:00 h', '0:01 h', '3:02 h')
    """
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"
