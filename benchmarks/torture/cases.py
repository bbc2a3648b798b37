"""Run a call or a command of Poise in a forked process with limits, and say how it ended.

A fork of this process has torch and the package in milliseconds; a new interpreter takes seconds.
This process must not compute with several threads before it forks.
"""

import importlib
import json
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from PIL import Image

from poise.errors import InputError, RunError

OK = "ok"  # the work was done, and its results are right
REFUSED = "one line"  # an error of one line that says what is wrong
FAILURES = ("wrong", "traceback", "hang", "memory")
OUTCOMES = (OK, REFUSED, *FAILURES)
SECONDS = 10.0  # more is a hang
MIB = 1024.0  # above the memory of the start
ADDRESS_SPACE = 2**33  # bytes above the start, so that a fault cannot take the whole machine
UNEXPECTED = 70  # exit code after an exception that is no error of Poise
IMPORTED = (
    *("matplotlib.backends.backend_agg", "matplotlib.figure", "rich.progress", "torch._dynamo"),
    *(
        "sklearn.datasets",
        "sklearn.mixture",
        "poise.diagnosis",
        "poise.evaluation",
        "poise.explore",
    ),
    *("poise.report", "poise.runs.pipeline", "poise.studies.comparison"),
)
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg"}

Item = TypeVar("Item")
Found = TypeVar("Found")


@dataclass(frozen=True)
class Case:
    """One thing that was tried.

    Attributes:
        group: row of the table that counts it.
        what: what was done.
        outcome: one of `OUTCOMES`.
        detail: message of the error, or how a result differs.
    """

    group: str
    what: str
    outcome: str
    detail: str = ""

    @property
    def failed(self) -> bool:
        return self.outcome in FAILURES


@dataclass(frozen=True)
class Ended:
    """Outcome of a process.

    Attributes:
        code: exit code; negative: the number of a signal; None: it was still running after the
            time limit.
        out, err: what it printed.
        value: what the call returned, as JSON has it.
        seconds: its duration.
        mib: its peak memory above that of the start.
    """

    code: int | None
    out: str
    err: str
    value: Any
    seconds: float
    mib: float

    @property
    def outcome(self) -> str:
        """One of `OUTCOMES`, apart from "wrong"."""
        if self.code is None:
            return "hang"
        if self.mib > MIB:
            return "memory"
        if "Traceback (most recent call last)" in self.err or self.code < 0:
            return "traceback"
        if self.code == 0:
            return OK
        return REFUSED if self.message.startswith("poise: ") else "traceback"

    @property
    def message(self) -> str:
        """The last line on stderr."""
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else f"exit code {self.code}, nothing on stderr"

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


def forked(
    call: Callable[[], Any],
    *,
    seconds: float = SECONDS,
    kill: Callable[[], bool] = lambda: False,
    prepare: Callable[[], None] = lambda: None,
) -> Ended:
    """Run a call in a fork of this process.

    Args:
        call: returns a value that JSON can hold.
        seconds: time limit.
        kill: asked again and again; when true, the process gets SIGKILL.
        prepare: called in the fork before `call`.
    """
    with (
        tempfile.TemporaryFile() as out,
        tempfile.TemporaryFile() as err,
        tempfile.TemporaryFile() as value,
    ):
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _work(call, prepare, out, err, value)
        status, peak = _wait(child, began + seconds, kill)
        before, _, returned = _text(value).partition("\n")
        return Ended(
            None if status is None else os.waitstatus_to_exitcode(status),
            _text(out),
            _text(err),
            json.loads(returned or "null"),
            time.monotonic() - began,
            peak - float(before or peak),
        )


def _wait(child: int, until: float, kill: Callable[[], bool]) -> tuple[int | None, float]:
    """Return the status of a process and its peak memory in MiB."""
    while True:
        found, status, usage = os.wait4(child, os.WNOHANG)
        if found:
            return status, usage.ru_maxrss / 1024
        if late := time.monotonic() > until or kill():
            os.kill(child, signal.SIGKILL)
            _, status, usage = os.wait4(child, 0)
            return (None if late and time.monotonic() > until else status), usage.ru_maxrss / 1024
        time.sleep(0.002)


def _work(
    call: Callable[[], Any],
    prepare: Callable[[], None],
    out: IO[bytes],
    err: IO[bytes],
    value: IO[bytes],
) -> None:
    """Call, and end the process."""
    code = UNEXPECTED
    try:
        for number, file in ((1, out), (2, err)):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        _, most = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESS_SPACE, most))
        value.write(f"{_resident_mib()}\n".encode())
        value.flush()
        prepare()
        value.write(json.dumps(call()).encode())
        value.flush()
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except (InputError, RunError) as error:
        print(f"poise: error: {' '.join(str(error).split())}", file=sys.stderr)
        code = 2 if isinstance(error, InputError) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def command(*arguments: str | Path, **how: Any) -> Ended:
    """Run the command `poise` in a fork of this process; see `forked`."""
    return forked(lambda: _command([str(word) for word in arguments]), **how)


def _command(arguments: list[str]) -> None:
    from poise import cli

    sys.argv = ["poise", *arguments]
    cli.main()


def _text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode(errors="replace")


def _resident_mib() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**20


def import_what_commands_import() -> None:
    """Import what the commands import when they run, so that forks have it."""
    for name in IMPORTED:
        importlib.import_module(name)
    Image.init()
    torch.set_num_threads(1)


def spread(work: Callable[[Item], Found], items: Sequence[Item], jobs: int) -> list[Found]:
    """Return `work` of each item, in order, computed by processes that share the items."""
    if jobs == 1:
        return [work(item) for item in items]
    with get_context("fork").Pool(jobs) as pool:
        return pool.map(work, items, chunksize=1)


def counted(cases: Iterable[Case]) -> list[dict[str, Any]]:
    """Return a row of counts for each group, and one for all."""
    groups: dict[str, Counter[str]] = {}
    for case in cases:
        groups.setdefault(case.group, Counter())[case.outcome] += 1
    return [
        {"group": group, "tried": count.total()} | {name: count[name] for name in OUTCOMES}
        for group, count in groups.items()
    ]


def as_json(cases: Sequence[Case]) -> dict[str, Any]:
    """Return the counts of each group, and the cases that failed."""
    failed = [asdict(case) for case in cases if case.failed]
    return {"groups": counted(cases), "failed": failed}
