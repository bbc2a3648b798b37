"""Execution of tasks by joblib, with one progress display for all.

By default joblib starts one process per task that runs at the same time. `joblib.parallel_config`
selects another backend, such as Dask or Ray. Its workers must see the experiment's folder.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from filelock import FileLock
from joblib import Parallel, delayed, parallel_config
from joblib.externals.loky import get_reusable_executor

from poise.errors import InputError, Interrupted
from poise.runs.log import OF_EVERY_ENTRY, Entry
from poise.studies.comparison.plan import Crew, Share, Task
from poise.studies.comparison.worker import POLL_SECONDS, Ended, forget_images, leased, work
from poise.support.files import decode_json
from poise.support.guards import stop_signals
from poise.support.progress import duration, progress, say

IDLE_SECONDS = 10.0  # until an idle worker ends; loky adds 30 if this process was killed
SHOWN = 4  # tasks in the progress display
TAIL_BYTES = 2_000  # enough for the last line of a log


@dataclass(frozen=True)
class Outcome:
    """Outcome of a set of tasks.

    Attributes:
        failed: error messages of failed tasks, by `Task.result_path`.
        late: True if the time limit came before all tasks were done.
    """

    failed: dict[Path, str] = field(default_factory=dict)
    late: bool = False


def execute(
    tasks: Sequence[Task],
    crew: Crew,
    *,
    title: str,
    until: float | None = None,
    quiet: bool = False,
) -> Outcome:
    """Do tasks. The others continue if a task fails or its process is killed.

    Args:
        tasks: the tasks, in order.
        crew: number of processes, and their devices.
        title: title of the progress display.
        until: time limit by `time.monotonic`, when all runs stop with their state saved; None: no
            limit.
        quiet: show no progress.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state of all runs is saved.
    """
    following = Following(tasks)
    with (
        stop_signals() as asked,
        leased(tasks[0].folder.parent) as lease,
        progress(title, following.total, following.done(), quiet=quiet) as display,
    ):
        study = Study(crew, lease, following)

        def look() -> None:
            if asked():
                study.stop("asked")
            if until is not None and time.monotonic() > until:
                study.stop("late")
            display.update(following.done(), following.figures(study.in_flight))
            if not (quiet or study.stopping):
                following.say_estimate(study.in_flight, len(crew.devices))

        try:
            with repeated(look):
                study.run(tasks)
        finally:
            study.close()
        display.update(following.done(), {})
    if study.stopping == "asked":
        raise Interrupted("stopped; every run is saved: run the same command to go on")
    return Outcome(study.failed, study.stopping == "late")


@contextmanager
def repeated(action: Callable[[], None]) -> Iterator[None]:
    """Call `action` twice a second in a thread until the block ends."""
    over = threading.Event()

    def repeat() -> None:
        while not over.wait(POLL_SECONDS):
            action()

    thread = threading.Thread(target=repeat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@final
class Study:
    """State of the tasks while workers do them.

    Attributes:
        failed: error messages of failed tasks, by `Task.result_path`.
        stopping: reason to stop all runs: "asked" or "late"; "" while they run.
    """

    def __init__(self, crew: Crew, lease: FileLock, following: "Following") -> None:
        self.failed: dict[Path, str] = {}
        self.stopping = ""
        self._crew, self._lease, self._following = crew, lease, following
        self._given: dict[Path, Task] = {}

    @property
    def in_flight(self) -> list[Task]:
        """Return the tasks that workers have received and not finished."""
        return list(self._given.values())

    def stop(self, reason: str) -> None:
        """Make all runs save their state and stop."""
        self.stopping = self.stopping or reason
        self._lease.release()

    def run(self, tasks: Sequence[Task]) -> None:
        """Do all tasks. After a worker is killed, repeat its tasks at the end, one at a time.

        Full memory is the usual cause, so running fewer tasks at a time may help. joblib ends all
        workers when one is killed. A task is certainly the cause only if it runs alone.
        """
        left, suspects = list(tasks), list[Task]()
        while left and not self.stopping:
            if self._attempt(left) is None:
                break
            lost = self.in_flight
            begun = [task for task in lost if (task.folder / "config.json").exists()] or lost
            suspects += begun
            left = [
                t for t in left if t not in begun and t.result_path not in self._following.ended
            ]
        for task in suspects:
            if not self.stopping and (complaint := self._attempt([task])) is not None:
                self._conclude(Ended(task, "failed", f"its process was killed twice: {complaint}"))

    def _attempt(self, tasks: Sequence[Task]) -> str | None:
        """Do tasks. Return an error message if joblib's workers fail."""
        self._given.clear()
        shares = self._crew.shares(tasks)
        try:
            answers: Any = self._pool()(self._calls(shares))
            for ended in answers:
                for one in ended:
                    self._conclude(one)
        except Exception as error:  # of joblib: `perform` catches errors of tasks
            if not self._given:
                raise
            return " ".join(str(error).split()) or type(error).__name__
        return None

    def _calls(self, shares: Sequence[Share]) -> Iterator[Any]:
        for share in shares:
            self._given |= {task.result_path: task for task in share.tasks}
            yield delayed(work)(share, Path(self._lease.lock_file))

    def _pool(self) -> Parallel:
        how: dict[str, Any] = {
            "return_as": "generator_unordered",
            "pre_dispatch": "n_jobs",  # so every dispatched task without an answer is in flight
            "batch_size": 1,
        }
        threads = self._crew.threads
        if threads is None:
            return Parallel(n_jobs=len(self._crew.devices), **how)
        processes: dict[str, Any] = {
            "inner_max_num_threads": threads,
            "idle_worker_timeout": IDLE_SECONDS,
            "initializer": ignore_signals_of_terminals,
        }
        with parallel_config("loky", **processes):
            return Parallel(n_jobs=self._crew.processes, **how)

    def _conclude(self, ended: Ended) -> None:
        self._given.pop(ended.task.result_path, None)
        self._following.ended.add(ended.task.result_path)
        if ended.state == "failed" and not self.stopping:
            self.failed[ended.task.result_path] = ended.message
        if ended.state == "interrupted":
            self.stop("asked")  # the worker itself may have received the signal

    def close(self) -> None:
        """End the worker processes, and free the images that this process keeps."""
        forget_images()
        if self._crew.threads is not None and self._crew.processes > 1:
            get_reusable_executor().shutdown()


@final
class Following:
    """Progress of tasks in steps, read from the logs of their runs.

    Attributes:
        ended: result paths of the tasks that are done or failed.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.total = sum(task.total_steps + 1 for task in tasks)  # 1 for the evaluation
        self.ended: set[Path] = set()
        self._first_seen: dict[int, int] = {}
        self._said: set[int] = set()

    def done(self) -> int:
        """Return the number of steps done in all tasks."""
        return sum(
            task.total_steps + 1 if task.result_path in self.ended else self._steps(task)
            for task in self.tasks
        )

    def _steps(self, task: Task) -> int:
        entry = last_entry(task.folder / "metrics.jsonl")
        if entry is None:
            return 0
        return int(entry["step"]) + (task.first_steps if entry["stage"] == 2 else 0)

    def figures(self, busy: Sequence[Task]) -> Mapping[str, str]:
        """Return the state of the first few tasks in flight, by name."""
        more = {"and": f"{len(busy) - SHOWN} more"} if len(busy) > SHOWN else {}
        return {task.name: self._state(task) for task in busy[:SHOWN]} | more

    def _state(self, task: Task) -> str:
        steps, first, total = self._steps(task), task.first_steps, task.total_steps
        if steps == total:
            return "measuring"
        if steps < first:
            return f"stage 1 {steps / first:.0%}"
        return f"stage 2 {(steps - first) / (total - first):.0%}"

    def say_estimate(self, busy: Sequence[Task], jobs: int) -> None:
        """Print the estimated time of each stage once, on stderr, after its first steps."""
        for task in busy:
            entry = last_entry(task.folder / "metrics.jsonl")
            if entry is None or entry["stage"] in self._said or not entry["images_per_second"]:
                continue
            stage, step = int(entry["stage"]), int(entry["step"])
            if self._first_seen.setdefault(stage, step) == step:
                continue  # the first steps of a process are slow
            self._said.add(stage)
            settings = task.recipe.stages[stage - 1]
            seconds = min(settings.batch_size, task.num_images) / entry["images_per_second"]
            left = sum(self._left(other, stage) for other in self.tasks)
            line = (
                f"stage {stage}: {1000 * seconds:.1f} ms a step, so about "
                f"{duration(left * seconds / min(jobs, len(self.tasks)))} "
                "for the rest of this stage in all runs"
            )
            say(line)

    def _left(self, task: Task, stage: int) -> int:
        """Return the remaining steps of a stage."""
        steps, first = self._steps(task), task.first_steps
        return max(first - steps, 0) if stage == 1 else task.total_steps - max(steps, first)


def ignore_signals_of_terminals() -> None:
    """Ignore Ctrl-C and hang-ups in a worker: a terminal sends them to all processes.

    The main process then ends the lease, and workers save their runs.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):  # Windows has no SIGHUP
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def last_entry(log: Path) -> Entry | None:
    """Return the last complete line of a metrics.jsonl, or None if it has none yet."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(InputError):
            entry = decode_json(line, Entry, str(log))
            if entry.keys() >= OF_EVERY_ENTRY:
                return entry
    return None
