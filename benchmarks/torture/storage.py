"""Part 3: full, read-only and slow disks, a clock that moves back, two users of one folder.

Full and read-only disks are file systems in memory (tmpfs) of some kilobytes, mounted in a
namespace of this process alone. That needs Linux and the right to make namespaces; without it these
cases are left out, and the report says so.

A slow disk is simulated: every sync takes 0.2 seconds longer, every opening of a file 0.02. The
clock is simulated, too: `time.time` of the process goes back by a day at a random moment, or shows
1970, as machines without a battery do.
"""

import builtins
import ctypes
import json
import os
import random
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import poise
from benchmarks.torture.cases import (
    ENVIRONMENT,
    FAILURES,
    OK,
    REFUSED,
    Case,
    Ended,
    command,
    forked,
    spread,
)
from benchmarks.torture.kills import (
    LONG,
    SHORT,
    Operations,
    compared,
    contents,
    processes_of,
    started,
)
from benchmarks.torture.material import IMAGES, OPTIONS, RECIPE, make_features
from poise.errors import InputError

COUNTS = {"full": 12, "clock": 8}
NEW_MOUNTS = 0x00020000  # CLONE_NEWNS
SMALLEST, LARGEST = 8, 900  # KiB of the full disk; a whole run needs about 1,000
DAY = 86_400.0
FILLER = "filler"


def cases(seed: int, jobs: int, scale: float = 1.0) -> tuple[list[Case], dict[str, Any]]:
    os.environ.update(ENVIRONMENT)
    counts = {name: max(1, round(count * scale)) for name, count in COUNTS.items()}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["POISE_CACHE"] = str(Path(scratch, "cache"))
        whole = Path(scratch, "whole")
        assert train(whole).outcome == OK
        works: list[Callable[[], list[Case]]] = [
            partial(on_small_disks, seed, counts["full"], whole, Path(scratch)),
            partial(on_slow_disks, whole, Path(scratch)),
            partial(with_odd_clocks, seed, counts["clock"], whole, Path(scratch)),
            partial(with_two_users, whole, Path(scratch)),
        ]
        found = spread(_call, works, jobs)
    return [case for part in found for case in part], {}


def _call(work: Callable[[], list[Case]]) -> list[Case]:
    return work()


def train(out: Path, **how: Any) -> Ended:
    options = ("--threads", "1", "--out", out)
    return command("train", "digits", *SHORT, *options, seconds=LONG, **how)


def judged(group: str, what: str, ended: Ended, *allowed: str, problem: str = "") -> Case:
    """Make a case: an outcome that is not allowed, or a problem, is wrong."""
    outcome = ended.outcome
    if outcome in FAILURES:
        return Case(group, what, outcome, ended.err[-300:])
    if outcome not in allowed:
        return Case(group, what, "wrong", ended.message or "it succeeded")
    if problem:
        return Case(group, what, "wrong", problem)
    return Case(group, what, outcome, ended.message if outcome == REFUSED else "")


def difference(whole: Path, folder: Path) -> str:
    """Return how a finished run differs from an undisturbed one."""
    return compared(contents(whole), contents(folder))[1]


# Full and read-only disks


@contextmanager
def small_disk(folder: Path, kib: int) -> Iterator[Callable[[str], None]]:
    """Mount a file system of some KiB, and yield a function that changes its options."""
    folder.mkdir()
    mount("-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(folder))
    try:
        yield lambda options: mount("-o", f"remount,{options}", str(folder))
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def enter_namespace() -> None:
    """Give this process mounts of its own.

    Raises:
        OSError: the system does not allow it.
    """
    if ctypes.CDLL(None, use_errno=True).unshare(NEW_MOUNTS) != 0:
        raise OSError(ctypes.get_errno(), "no namespace of mounts")
    mount("--make-rprivate", "/")


def on_small_disks(seed: int, count: int, whole: Path, scratch: Path) -> list[Case]:
    """Run the cases in a process with mounts of its own."""

    def work() -> list[list[str]] | None:
        try:
            enter_namespace()
        except (OSError, subprocess.CalledProcessError):
            return None
        found = [*on_full_disks(seed, count, whole, scratch), *on_read_only_disks(whole, scratch)]
        return [[c.group, c.what, c.outcome, c.detail] for c in found]

    ended = forked(work, seconds=10 * LONG)
    assert ended.outcome == OK, ended.err
    if ended.value is None:
        return [Case("small disks", "all cases", REFUSED, "no namespace of mounts: left out")]
    return [Case(*fields) for fields in ended.value]


def on_full_disks(seed: int, count: int, whole: Path, scratch: Path) -> Iterator[Case]:
    rng = random.Random(f"{seed}/full")
    for number in range(count):
        disk, kib = scratch / f"full{number}", rng.randint(SMALLEST, LARGEST)
        with small_disk(disk, kib) as change:
            ended = train(disk / "run")
            left = [str(path) for path in disk.rglob(".writing-*")]
            yield judged(
                "disk full: train",
                f"{kib} KiB",
                ended,
                OK,
                REFUSED,
                problem=f"left behind: {left}" if left else "",
            )
            change("size=64m")
            again = train(disk / "run")
            problem = difference(whole, disk / "run") if again.outcome == OK else ""
            yield judged("disk full: resumed", f"{kib} KiB", again, OK, problem=problem)
    yield from every_writer("disk full", whole, scratch, lambda change: None)


def on_read_only_disks(whole: Path, scratch: Path) -> Iterator[Case]:
    yield from every_writer("read-only disk", whole, scratch, lambda change: change("ro"))
    disk = scratch / "read-only-run"
    with small_disk(disk, 65_536) as change:
        shutil.copytree(whole, disk / "run")
        change("ro")
        for what, words in reading_commands(disk / "run", scratch / "elsewhere").items():
            yield judged("run on a read-only disk", what, command(*words, seconds=LONG), OK)
        yield judged("run on a read-only disk", "train", train(disk / "run"), OK, REFUSED)


def reading_commands(run: Path, out: Path) -> dict[str, list[str | Path]]:
    return {
        "sample": ["sample", run, "-n", "4", "--out", out / "grid.png"],
        "encode": ["encode", run, "--out", out / "codes.npz"],
        "reconstruct": ["reconstruct", run, "--out", out / "pairs.png"],
        "report": ["report", run, "--out", out / "page.html"],
        "explore": ["explore", run, "--out", out / "explore.html"],
    }


def every_writer(
    group: str, whole: Path, scratch: Path, change: Callable[[Callable[[str], None]], None]
) -> Iterator[Case]:
    """Let every command write to a disk where it cannot."""
    for what, words in writers(whole, Path("DISK")).items():
        disk = scratch / f"{group}-{what}".replace(" ", "-").replace(":", "")
        with small_disk(disk, 16) as options:
            fill(disk / FILLER)
            change(options)
            placed = [Path(str(word).replace("DISK", str(disk))) for word in words]
            ended = command(*placed, seconds=LONG)
            left = [path.name for path in disk.rglob("*") if path.is_file() and path.name != FILLER]
            problem = f"left behind: {left}" if left and what != "compare" else ""
            yield judged(f"{group}: every writer", what, ended, REFUSED, problem=problem)


def fill(path: Path) -> None:
    """Write a file until the disk is full."""
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def writers(run: Path, disk: Path) -> dict[str, list[str | Path]]:
    """Return a command for each kind of output."""
    return reading_commands(run, disk) | {
        "sample, array": ["sample", run, "-n", "90", "--out", disk / "samples.npz"],
        "sample, folder": ["sample", run, "-n", "90", "--out", disk / "folder"],
        "sample, grid": ["sample", run, "-n", "90", "--out", disk / "grid.png"],
        "encode, safetensors": ["encode", run, "--out", disk / "codes.safetensors"],
        "compare": ["compare", "digits", *SHORT, "--jobs", "1", "--out", disk / "compared"],
    }


# A slow disk


def on_slow_disks(whole: Path, scratch: Path) -> list[Case]:
    ended = train(scratch / "slow", prepare=slow_down)
    problem = difference(whole, scratch / "slow") if ended.outcome == OK else ""
    cases = [judged("slow disk", "train", ended, OK, problem=problem)]
    for what, words in reading_commands(scratch / "slow", scratch / "slow-out").items():
        cases.append(
            judged("slow disk", what, command(*words, prepare=slow_down, seconds=LONG), OK)
        )
    return cases


def slow_down() -> None:
    """Make syncing and opening files slow in this process."""
    sync, open_file = os.fsync, builtins.open

    def slow_sync(descriptor: Any) -> None:
        time.sleep(0.2)
        sync(descriptor)

    def slow_open(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.02)
        return open_file(*arguments, **options)

    os.fsync, builtins.open = slow_sync, slow_open


# Clocks


def with_odd_clocks(seed: int, count: int, whole: Path, scratch: Path) -> list[Case]:
    """Move the clock back while runs are trained, killed and resumed."""
    rng, cases = random.Random(f"{seed}/clock"), list[Case]()
    operations = 150  # at least so many has the run, see `kills`
    for number in range(count):
        folder, moved = scratch / f"clock{number}", number % 2 == 0
        place, after = rng.randint(20, operations), rng.randint(0, 400)
        clock = partial(set_clock, after) if moved else partial(set_clock, 0, to=0.0)
        hook = Operations(folder)

        killed = train(folder, prepare=partial(_start_clock_and_die, clock, hook, place))
        for path in folder.rglob("*"):  # what was written lies in the future of the second run
            os.utime(path, (time.time() + DAY, time.time() + DAY))
        ended = train(folder, prepare=clock)
        problem = difference(whole, folder) if ended.outcome == OK else ""
        if not killed.killed:
            problem = f"it was not killed: {killed.message}"
        what = f"back by a day after {after} readings" if moved else "1970"
        what += f", killed before operation {place} and resumed"
        cases.append(judged("clock moved back: train", what, ended, OK, problem=problem))
    for what, words in (
        reading_commands(whole, scratch / "clock-out")
        | {
            "sample, array": ["sample", whole, "-n", "9", "--out", scratch / "clock-out/s.npz"],
            "evaluate": ["evaluate", whole, "--extractor", "pixels", "--images", "50"],
            "diagnose": ["diagnose", whole],
        }
    ).items():
        for name, clock in (("1970", partial(set_clock, 0, to=0.0)), ("2200", far_future)):
            ended = command(*words, prepare=clock, seconds=LONG)
            cases.append(judged("clock of 1970 or 2200", f"{what}, {name}", ended, OK))
    return cases


def _start_clock_and_die(clock: Callable[[], None], hook: Operations, place: int) -> None:
    clock()
    hook.die_at(place)


def set_clock(after: int, *, to: float | None = None) -> None:
    """Move the clock of this process back by a day after so many readings, or to a time."""
    real, begin, read = time.time, time.time(), [0]

    def moved() -> float:
        read[0] += 1
        return real() - (DAY if read[0] > after else 0) + (0 if to is None else to - begin + DAY)

    local = time.localtime
    time.time = moved
    time.localtime = lambda seconds=None: local(moved() if seconds is None else seconds)


def far_future() -> None:
    set_clock(0, to=230 * 365.25 * DAY)


# Two users of one folder


def with_two_users(whole: Path, scratch: Path) -> list[Case]:
    return [
        *two_commands(whole, scratch),
        *two_threads(scratch),
        *two_readers(whole, scratch),
    ]


def two_commands(whole: Path, scratch: Path) -> Iterator[Case]:
    """Start the same command twice in one folder: one works, the other is refused."""
    compared_options = ("--balances", "computed", "--priors", "second-stage", "--images", "50")
    for what, words in {
        "train": ["train", "digits", *SHORT, "--threads", "1"],
        "compare": ["compare", "digits", *SHORT, "--seeds", "1", "--jobs", "1", *compared_options],
    }.items():
        folder = scratch / f"two-{what}"
        both = [started("poise", *words, "--out", folder) for _ in range(2)]
        said = [process.communicate(timeout=LONG)[1] for process in both]
        codes = sorted(process.returncode for process in both)
        refusal = next((line for line in said if "poise: error" in line), "").strip()
        problem = ""
        if codes != [0, 2] or "Traceback" in "".join(said):
            problem = f"exit codes {codes}: {' / '.join(text[-200:] for text in said)}"
        elif "another process" not in refusal:
            problem = refusal
        elif what == "train":
            problem = difference(whole, folder)
        left = [one for process in both for one in processes_of(process.pid)]
        problem = problem or (f"{len(left)} processes are left" if left else "")
        yield Case("two processes", what, "wrong" if problem else OK, problem)


def two_threads(scratch: Path) -> Iterator[Case]:
    """Train in one folder from two threads of a process."""

    def work() -> list[str]:
        def one() -> None:
            barrier.wait()
            try:
                run = poise.train(IMAGES, recipe=longer, out=scratch / "threads", options=OPTIONS)
                said.append("ok" if run.finished else "not finished")
            except InputError as error:
                said.append(str(error))

        said: list[str] = []
        barrier = threading.Barrier(2)
        longer = replace(RECIPE, first=replace(RECIPE.first, steps=100))
        threads = [threading.Thread(target=one) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(said)

    ended = forked(work, seconds=LONG)
    said = ended.value or []
    right = len(said) == 2 and said[1] == "ok" and "training there" in said[0]
    problem = "" if right or ended.outcome != OK else f"they said {said}"
    yield judged("two threads", "train", ended, OK, problem=problem)

    def cached() -> bool:
        def one() -> None:
            found.append(make_features(scratch / "features"))

        found: list[np.ndarray] = []
        threads = [threading.Thread(target=one) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return len(found) == 4 and all(np.array_equal(one, found[0]) for one in found)

    ended = forked(cached, seconds=LONG)
    problem = "" if ended.value else "other features"
    yield judged("two threads", "cached features", ended, OK, problem=problem)


def two_readers(whole: Path, scratch: Path) -> Iterator[Case]:
    """Write the same file from two commands at once: one of both is there at the end."""
    run = Path(shutil.copytree(whole, scratch / "two-readers"))
    page = scratch / "two.html"
    for what, words, check in (
        ("evaluate", ["evaluate", run, "--extractor", "pixels", "--images", "50"],
         lambda: json.loads((run / "evaluation.json").read_text()) and ""),
        ("report", ["report", run, "--out", page],
         lambda: "" if page.read_text().rstrip().endswith("</html>") else "half a page"),
    ):  # fmt: skip
        both = [started("poise", *words) for _ in range(2)]
        said = [process.communicate(timeout=LONG)[1] for process in both]
        codes = [process.returncode for process in both]
        problem = f"exit codes {codes}: {said}" if any(codes) else str(check() or "")
        yield Case("two processes", what, "wrong" if problem else OK, problem[-300:])
