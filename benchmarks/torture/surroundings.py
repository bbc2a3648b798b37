"""Part 6: locale C, no home, packages that cannot be written to, no terminal, NO_COLOR.

Each surrounding runs real commands in new processes: help, train, sample, evaluate, report, and a
wrong option. The folder of images has names that are not ASCII. All must end as they do elsewhere.
"""

import os
import pty
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.torture.cases import FAILURES, OK, REFUSED, Case, spread
from benchmarks.torture.material import make_pictures
from benchmarks.torture.storage import enter_namespace, mount

LONG = 600.0
SOURCE = Path(__file__).parents[2] / "src"
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:[349][0-7]|[34]8|10[0-7])[;\d]*m")  # not bold or italic
CODE = "import sys; from poise.cli import main; sys.argv[0] = 'poise'; main()"


@dataclass(frozen=True)
class Surrounding:
    """A surrounding of a command.

    Attributes:
        environment: variables to set; None: to remove.
        python: options of the interpreter.
        prepare: called in the new process before the interpreter starts.
        terminal: whether the streams are a terminal.
    """

    environment: dict[str, str | None] = field(default_factory=dict)
    python: tuple[str, ...] = ()
    prepare: Callable[[], Any] | None = None
    terminal: bool = False


def without_streams() -> None:
    """Leave the terminal and close stdin, as a service does."""
    os.setsid()
    os.close(0)


def read_only() -> None:
    """Make the interpreter's packages, the source and the home read-only."""
    enter_namespace()
    for place in {Path(sys.prefix), SOURCE, Path.home()}:
        mount("--bind", str(place), str(place))
        mount("-o", "remount,ro,bind", str(place))


NO_HOME: dict[str, str | None] = dict.fromkeys(
    ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR", "USER", "LOGNAME")
)
SURROUNDINGS = {
    "as it is": Surrounding(),
    "locale C": Surrounding(
        {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    ),
    "POSIX locale, ASCII streams": Surrounding({"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}),
    "no HOME": Surrounding(NO_HOME),
    "HOME is a file": Surrounding({"HOME": "/dev/null", "XDG_CACHE_HOME": None}),
    "read-only packages and home": Surrounding(prepare=read_only),
    "no terminal, no stdin": Surrounding({"TERM": None}, prepare=without_streams),
    "a terminal of 80 columns": Surrounding({"TERM": "xterm"}, terminal=True),
    "a terminal, NO_COLOR": Surrounding({"TERM": "xterm", "NO_COLOR": "1"}, terminal=True),
    "TERM=dumb, 20 columns": Surrounding({"TERM": "dumb", "COLUMNS": "20"}, terminal=True),
    "python -OO": Surrounding(python=("-OO",)),
    "python -X dev": Surrounding(python=("-X", "dev")),
    "TMPDIR does not exist": Surrounding({"TMPDIR": "/proc/none"}),
}  # fmt: skip


def cases(seed: int, jobs: int, scale: float = 1.0) -> tuple[list[Case], dict[str, Any]]:
    names = list(SURROUNDINGS)[: max(1, round(len(SURROUNDINGS) * scale))]
    with tempfile.TemporaryDirectory() as scratch:
        photos = Path(scratch, os.fsdecode(b"caf\xc3\xa9 \xe5\xaf\xbf"))
        make_pictures(photos, 40)
        (photos / "3.png").rename(photos / os.fsdecode(b"latin \xe9.png"))
        Path(scratch).chmod(0o777)
        found = spread(partial(surround, scratch=Path(scratch), photos=photos), names, jobs)
    return [case for part in found for case in part], {}


def surround(name: str, *, scratch: Path, photos: Path) -> list[Case]:
    surrounding, place = SURROUNDINGS[name], scratch / name.replace(" ", "-").replace("=", "")
    place.mkdir()
    place.chmod(0o777)
    run = place / "rén"
    tiny = ("--network", "mlp", "--epochs", "2", "--second-epochs", "2", "--latent-dim", "2")
    commands: dict[str, tuple[str | Path, ...]] = {
        "help": ("train", "--help"),
        "train": ("train", photos, *tiny, "--batch-size", "4", "--out", run),
        "sample": ("sample", run, "-n", "4", "--out", place / "grid.png"),
        "evaluate": ("evaluate", run, "--extractor", "pixels"),
        "report": ("report", run, "--out", place / "page.html"),
        "a wrong option": ("train", "--epoks", "3"),
    }
    return [
        judged(name, what, what != "a wrong option", *run_in(surrounding, words, place))
        for what, words in commands.items()
    ]


def judged(name: str, what: str, succeeds: bool, code: int | None, text: str) -> Case:
    outcome = OK if succeeds else REFUSED
    if code is None:
        outcome = "hang"
    elif "Traceback (most recent call last)" in text:
        outcome = "traceback"
    elif code != (0 if succeeds else 2):
        outcome = "wrong"
    elif "NO_COLOR" in name and COLOUR.search(text):
        outcome, text = "wrong", "there are colours"
    return Case(name, what, outcome, text[-400:] if outcome in FAILURES else "")


def run_in(
    surrounding: Surrounding, words: tuple[str | Path, ...], place: Path
) -> tuple[int | None, str]:
    """Run a command; return its exit code (None: it hangs) and what it printed."""
    environment = dict(os.environ) | {"PYTHONPATH": str(SOURCE), "OMP_NUM_THREADS": "1"}
    for key, value in surrounding.environment.items():
        environment.pop(key, None)
        if value is not None:
            environment[key] = value
    command = [sys.executable, *surrounding.python, "-c", CODE, *map(str, words)]
    if surrounding.terminal:
        return in_terminal(command, environment, place)
    try:
        ended = subprocess.run(
            command,
            env=environment,
            cwd=place,
            capture_output=True,
            timeout=LONG,
            preexec_fn=surrounding.prepare,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, ""
    return ended.returncode, (ended.stdout + ended.stderr).decode(errors="replace")


def in_terminal(
    command: list[str], environment: dict[str, str], place: Path
) -> tuple[int | None, str]:
    main, other = pty.openpty()
    with subprocess.Popen(
        command, env=environment, cwd=place, stdin=other, stdout=other, stderr=other
    ) as process:
        os.close(other)
        parts: list[bytes] = []
        while True:
            try:
                part = os.read(main, 65_536)
            except OSError:  # the terminal is closed when its last process ends
                break
            if not part:
                break
            parts.append(part)
        os.close(main)
    return process.returncode, b"".join(parts).decode(errors="replace")
