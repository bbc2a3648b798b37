"""Part 1: kill commands (SIGKILL) at random moments, run them again, and compare.

A run that was killed must end with what an undisturbed run has: the same bits of weights, codes and
pictures, the same lines of its log (apart from times), and no file of an unfinished write.

`train`       half of the kills come before a random operation on files (open, rename, delete,
              make a folder), half at a random time after a random line of the log
`evaluate`    before a random operation; the second run must print the same numbers
`report`      before a random operation; an earlier page must be intact, or the new one complete
`compare`     two workers; the main process, one worker, or all are killed
two ranks     torchrun with gloo; one rank, the agent, or all are killed
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.torture.cases import ENVIRONMENT, OK, Case, Ended, command, spread

COUNTS = {"train": 68, "evaluate": 8, "report": 8, "compare": 8, "two ranks": 8}
EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir")
TIMES = ("seconds", "images_per_second")  # entries that differ between two runs of one seed
LONG = 600.0  # seconds, on a busy machine
ORPHANS_END = 90.0  # seconds until workers notice that their main process is gone
SHORT = (  # 51 steps of each stage, most of them with a checkpoint
    *("--epochs", "3", "--second-epochs", "3", "--batch-size", "100"),
    *("--save-seconds", "0.02", "--device", "cpu"),
)
ROUTES = {  # options of `poise train digits`
    "two VAEs": ("--threads", "1"),
    "averaged weights, mirrored": ("--threads", "1", "--ema-decay", "0.9", "--flips"),
    "held-out images, standard latents": (
        *("--threads", "1", "--validation", "0.1", "--standardise", "during"),
    ),
    "labels": ("--threads", "1", "--labels"),
}


def cases(seed: int, jobs: int, scale: float = 1.0) -> tuple[list[Case], dict[str, Any]]:
    os.environ.update(ENVIRONMENT)
    counts = {name: max(1, round(count * scale)) for name, count in COUNTS.items()}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["POISE_CACHE"] = str(Path(scratch, "cache"))
        shares = [counts["train"] // 4 + (n < counts["train"] % 4) for n in range(4)]
        works: list[Callable[[], list[Case]]] = [
            partial(kill_training, seed, number, share, Path(scratch, f"train{number}"))
            for number, share in enumerate(shares)
            if share
        ]
        works.append(partial(kill_measuring, seed, counts, Path(scratch, "measure")))
        found = spread(_call, works, jobs)
        # These start processes of their own.
        found.append(kill_comparison(seed, counts["compare"], Path(scratch, "compare")))
        found.append(kill_ranks(seed, counts["two ranks"], Path(scratch, "ranks")))
    return [case for part in found for case in part], {}


def _call(work: Callable[[], list[Case]]) -> list[Case]:
    return work()


# train


def kill_training(seed: int, number: int, count: int, scratch: Path) -> list[Case]:
    """Kill `poise train` `count` times; whenever it ends, compare it and begin anew."""
    rng, route = random.Random(f"{seed}/train/{number}"), list(ROUTES)[number % len(ROUTES)]

    def train(out: Path, **how: Any) -> Ended:
        return command("train", "digits", *SHORT, *ROUTES[route], "--out", out, seconds=LONG, **how)

    counter = Operations(scratch / "whole")
    scratch.mkdir()
    ended = train(scratch / "whole", prepare=lambda: counter.count(scratch / "operations"))
    assert ended.outcome == OK, ended.err
    operations = int((scratch / "operations").read_text())
    expected, lines = contents(scratch / "whole"), progress(scratch / "whole")
    cases: list[Case] = []
    for folder in folders(scratch):
        killed: list[str] = []
        while len(cases) + len(killed) <= count:
            last = len(cases) + len(killed) == count
            if last:
                ended, moment = train(folder), ""
            elif rng.random() < 0.5:
                place = rng.randint(1, operations)
                hook = Operations(folder)
                ended = train(folder, prepare=partial(hook.die_at, place))
                moment = f"before operation {place} of {operations}"
            else:
                when = AfterLines(folder, rng.randint(0, lines), rng.uniform(0, 0.1))
                ended, moment = train(folder, kill=when.reached), f"after {when.lines} lines"
            if ended.killed:
                killed.append(f"{route}: killed {moment}, {position(folder)}")
                continue
            outcome, detail = "wrong", ended.message
            if ended.outcome == OK:
                outcome, detail = compared(expected, contents(folder))
            # A failure without a kill counts too, or it would be tried for ever.
            what = killed or ([] if outcome == OK else [f"{route}: not killed"])
            cases += [Case("train", each, outcome, detail) for each in what]
            break
        if len(cases) >= count:
            return cases
    raise AssertionError


def folders(scratch: Path) -> Iterator[Path]:
    number = 0
    while True:
        yield scratch / f"run{number}"
        number += 1


class Operations:
    """Operations on the files of a folder, as Python's audit hooks tell them.

    A hook is called before its operation.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.done = str(folder), 0

    def die_at(self, number: int) -> None:
        """Kill this process before an operation."""

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if self._is_mine(event, arguments):
                self.done += 1
                if self.done == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(hook)

    def count(self, into: Path) -> None:
        """Write the number of operations so far to a file, at each of them."""
        descriptor = os.open(into, os.O_WRONLY | os.O_CREAT)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if self._is_mine(event, arguments):
                self.done += 1
                os.pwrite(descriptor, str(self.done).encode(), 0)

        sys.addaudithook(hook)

    def _is_mine(self, event: str, arguments: tuple[Any, ...]) -> bool:
        return event in EVENTS and self.folder in str(arguments[0])


class AfterLines:
    """True some seconds after the logs and results in a folder have so many lines."""

    def __init__(self, folder: Path, lines: int, seconds: float) -> None:
        self.folder, self.lines, self.seconds, self.since = folder, lines, seconds, 0.0

    def reached(self) -> bool:
        if not self.since and self.folder.exists() and progress(self.folder) >= self.lines:
            self.since = time.monotonic()
        return bool(self.since) and time.monotonic() > self.since + self.seconds


def progress(folder: Path) -> int:
    """Return the number of lines of the logs in a run or comparison, and of files at its end."""
    inner = [folder, *folder.glob("*/")]
    logs = [path for path in (part / "metrics.jsonl" for part in inner) if path.exists()]
    ends = [path for path in (part / "summary.json" for part in inner) if path.exists()]
    lines = [path.read_bytes().count(b"\n") for path in logs]
    return sum(lines) + len(ends) + len([*folder.glob("results/*.json")])


def position(folder: Path) -> str:
    """Describe the newest checkpoint of a run."""
    manifests = sorted((folder / "checkpoints").glob("[0-9]*/manifest.json"))
    if not manifests:
        return "without a checkpoint"
    meta = json.loads(manifests[-1].read_text())["meta"]
    end = ", finished" if meta["finished"] else ""
    return f"at step {meta['step']} of stage {meta['stage']}{end}"


def contents(folder: Path) -> dict[str, Any]:
    """Return what two runs of one seed have in common: hashes of files, and lines of the log."""
    newest = sorted((folder / "checkpoints").glob("[0-9]*"))[-1]
    names = ("samples.png", "reconstructions.png", "progress.png", "latents.json")
    files = [folder / name for name in names]
    files += [part / "tensors.safetensors" for part in (newest, folder / "codes")]
    mixture = folder / "mixture" / "tensors.safetensors"
    found = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in [*files, *([mixture] if mixture.exists() else [])]
    }
    summary = json.loads((folder / "summary.json").read_text())
    return found | {
        "summary.json": untimed(summary),
        "metrics.jsonl": log_of(folder),
        "left behind": [path.name for path in folder.rglob(".writing-*")],
    }


def log_of(folder: Path) -> list[Any]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [untimed(json.loads(line)) for line in lines]


def untimed(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in TIMES}


def compared(expected: dict[str, Any], found: dict[str, Any]) -> tuple[str, str]:
    """Return the outcome, and the names of what differs."""
    differing = [name for name in {**expected, **found} if expected.get(name) != found.get(name)]
    return ("wrong", f"differs: {', '.join(differing)}") if differing else (OK, "")


# evaluate and report


def kill_measuring(seed: int, counts: dict[str, int], scratch: Path) -> list[Case]:
    rng, run, page = random.Random(f"{seed}/measure"), scratch / "run", scratch / "page.html"
    scratch.mkdir()
    assert command("train", "digits", *SHORT, "--out", run, seconds=LONG).outcome == OK

    def evaluate(**how: Any) -> Ended:
        options = ("--extractor", "pixels", "--images", "50", "--device", "cpu")
        return command("evaluate", run, *options, seconds=LONG, **how)

    def report(**how: Any) -> Ended:
        return command("report", run, "--out", page, "--device", "cpu", seconds=LONG, **how)

    def numbers() -> str:
        path = run / "evaluation.json"
        return path.read_text() if path.exists() else ""

    def text() -> str:  # apart from the time of writing
        return "".join(line for line in page.read_text().splitlines(True) if "UTC" not in line)

    cases: list[Case] = []
    for name, act, state in (("evaluate", evaluate, numbers), ("report", report, text)):
        counter = Operations(scratch)
        ended = act(prepare=partial(counter.count, scratch.parent / f"operations-{name}"))
        assert ended.outcome == OK, ended.err
        before, operations = state(), int((scratch.parent / f"operations-{name}").read_text())
        for _ in range(counts[name]):
            place = rng.randint(1, operations)
            killed = act(prepare=partial(Operations(scratch).die_at, place))
            whole = state() == before
            again = act()
            outcome, detail = OK, ""
            if again.outcome != OK:
                outcome, detail = "wrong", again.message
            elif not killed.killed:
                outcome, detail = "wrong", f"it was not killed: {killed.message}"
            elif not whole:
                outcome, detail = "wrong", "the earlier file was damaged"
            elif state() != before:
                outcome, detail = "wrong", "the second run wrote other numbers"
            what = f"killed before operation {place} of {operations}"
            cases.append(Case(name, what, outcome, detail))
    return cases


# compare, and two ranks


def started(*words: str | Path) -> subprocess.Popen[str]:
    """Start a Python module in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", *map(str, words)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def processes_of(session: int) -> list[int]:
    """Return the processes of a session that have not ended."""
    found: list[int] = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, of = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(of) == session and state != "Z":
            found.append(int(path.parent.name))
    return found


def kill_when(
    process: subprocess.Popen[str], when: AfterLines, choose: Callable[[list[int]], list[int]]
) -> tuple[bool, str]:
    """Kill the chosen processes of a session when the time has come.

    Returns:
        Whether any was killed, and what the process said. All processes of the session have ended.
    """
    until, killed = time.monotonic() + LONG, False
    while process.poll() is None and not killed and time.monotonic() < until:
        if when.reached():
            for victim in choose(processes_of(process.pid)):
                os.kill(victim, signal.SIGKILL)
                killed = True
        time.sleep(0.002)
    said = ""
    try:
        said = process.communicate(timeout=ORPHANS_END)[1]
    except subprocess.TimeoutExpired:
        said = "hang"
    until = time.monotonic() + ORPHANS_END
    while left := processes_of(process.pid):
        if time.monotonic() > until:
            said = f"hang: {len(left)} processes go on without their main process"
            for one in left:
                os.kill(one, signal.SIGKILL)
        time.sleep(0.05)
    process.wait()
    return killed, said


def kill_again_and_again(
    name: str,
    count: int,
    rng: random.Random,
    scratch: Path,
    start: Callable[[Path], subprocess.Popen[str]],
    found: Callable[[Path], dict[str, Any]],
) -> list[Case]:
    """Kill commands of several processes, and compare what they have written at the end."""
    scratch.mkdir()
    whole = start(scratch / "whole")
    said = whole.communicate()[1]
    assert whole.returncode == 0, said
    expected, lines = found(scratch / "whole"), progress(scratch / "whole")
    cases: list[Case] = []
    for folder in folders(scratch):
        killed: list[str] = []
        while True:
            process = start(folder)
            victims = rng.choice(("the main process", "another process", "all processes"))
            choose = partial(chosen, victims, process.pid, rng)
            lines_before = rng.randint(0, lines) if len(cases) + len(killed) < count else lines * 9
            when = AfterLines(folder, lines_before, rng.uniform(0, 0.2))
            was_killed, said = kill_when(process, when, choose)
            if said.startswith("hang"):
                cases.append(Case(name, f"{victims} killed after {when.lines} lines", "hang", said))
            elif was_killed and process.returncode != 0:
                killed.append(f"{victims} killed after {when.lines} lines")
                continue
            elif process.returncode != 0:
                outcome, detail = "wrong", said[-300:]
            else:
                if was_killed:  # the others have done its work
                    killed.append(f"{victims} killed after {when.lines} lines")
                outcome, detail = compared(expected, found(folder))
                cases += [Case(name, what, outcome, detail) for what in killed]
                break
            cases += [Case(name, what, "wrong", said[-300:]) for what in killed]
            break
        if len(cases) >= count:
            return cases
    raise AssertionError


def chosen(victims: str, main: int, rng: random.Random, there: list[int]) -> list[int]:
    others = [process for process in there if process != main]
    if victims == "the main process":
        return [main]
    if victims == "another process":
        return [rng.choice(others)] if others else []
    return there


def kill_comparison(seed: int, count: int, scratch: Path) -> list[Case]:
    def start(out: Path) -> subprocess.Popen[str]:
        options = ("--balances", "computed", "learned", "--seeds", "1", "--jobs", "2")
        measured = ("--images", "50", "--priors", "normal", "second-stage")
        return started("poise", "compare", "digits", *options, *measured, *SHORT, "--out", out)

    def found(out: Path) -> dict[str, Any]:
        results = {path.name: json.loads(path.read_text()) for path in out.glob("results/*.json")}
        logs = {str(path.parent.name): log_of(path.parent) for path in out.glob("*/metrics.jsonl")}
        left = [path.name for path in out.rglob(".writing-*")]
        return {name: without_times(result) for name, result in results.items()} | {
            "logs": logs,
            "left behind": left,
        }

    rng = random.Random(f"{seed}/compare")
    return kill_again_and_again("compare", count, rng, scratch, start, found)


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in result.items() if key not in ("seconds", "provenance")}
    return kept | {"curves": {k: untimed(curve) for k, curve in result["curves"].items()}}


def kill_ranks(seed: int, count: int, scratch: Path) -> list[Case]:
    def start(out: Path) -> subprocess.Popen[str]:
        torchrun = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "poise")
        return started(*torchrun, "train", "digits", *SHORT, "--out", out)

    rng = random.Random(f"{seed}/ranks")
    return kill_again_and_again("two ranks", count, rng, scratch, start, contents)
