"""Progress on stderr: a bar on a terminal, a line now and then elsewhere. Results go to stdout, never here."""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from types import TracebackType
from typing import Protocol, TypeVar, final, runtime_checkable

Part = TypeVar("Part", bound=Sized)

SECONDS_BETWEEN_LINES = 15.0


@runtime_checkable
class Progress(Protocol):
    """Shows how far a task is."""

    def __enter__(self) -> "Progress": ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...
    def update(self, done: int, figures: Mapping[str, str]) -> None: ...


def progress(title: str, total: int, done: int = 0, *, quiet: bool = False) -> Progress:
    """A display for `total` units of work of which `done` are finished already."""
    if quiet:
        return Silence()
    return Bar(title, total, done) if sys.stderr.isatty() else Lines(title, total, done)


def counted(parts: Iterable[Part], display: Progress) -> Iterator[Part]:
    """The same parts; the display learns how many items have been used up, and at what rate."""
    done, began = 0, time.monotonic()
    for part in parts:
        yield part
        done += len(part)
        display.update(done, {"per second": f"{done / max(time.monotonic() - began, 1e-9):.0f}"})


def hours_minutes(seconds: float) -> str:
    """A time as h:mm, rounded up to a whole minute.

    Example:
        >>> hours_minutes(0), hours_minutes(50), hours_minutes(3 * 3600 + 61)
        ('0:00 h', '0:01 h', '3:02 h')
    """
    minutes = math.ceil(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h"


@final
class Bar:
    """A bar with percentage, time left and figures, redrawn in place."""

    def __init__(self, title: str, total: int, done: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        self._bar = RichProgress(
            *columns, TextColumn("{task.fields[figures]}"), console=Console(stderr=True)
        )
        self._task = self._bar.add_task(title, total=total, completed=done, figures="")

    def __enter__(self) -> "Bar":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, done: int, figures: Mapping[str, str]) -> None:
        self._bar.update(
            self._task, completed=done, figures="  ".join(f"{k} {v}" for k, v in figures.items())
        )


@final
class Lines:
    """A plain line every quarter of a minute, for logs."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self.title, self.total, self.start = title, total, done
        self._began = self._last = time.monotonic()

    def __enter__(self) -> "Lines":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def update(self, done: int, figures: Mapping[str, str]) -> None:
        now = time.monotonic()
        if done < self.total and now - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = now
        left = (now - self._began) / max(done - self.start, 1) * (self.total - done)
        known = f", {hours_minutes(left)} left" if done > self.start or done == self.total else ""
        text = "  ".join(f"{k} {v}" for k, v in figures.items())
        print(f"{self.title} {done}/{self.total}{known}  {text}", file=sys.stderr, flush=True)


@final
class Silence:
    """Nothing."""

    def __enter__(self) -> "Silence":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass

    def update(self, done: int, figures: Mapping[str, str]) -> None:
        pass
