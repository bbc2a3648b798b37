"""Tasks done by several processes, with one display for all, until all are done or somebody asks to stop."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple, final

from poise.errors import Interrupted
from poise.studies.comparison.plan import Crew, Task
from poise.support.guards import stop_signals
from poise.support.progress import progress

POLL_SECONDS = 0.5
PATIENCE_SECONDS = 30.0  # with a process that has no work and was told to end
SHOWN = 4  # tasks of which the display tells
TAIL_BYTES = 2_000  # of a log, in which its last line lies
START = (  # Ctrl-C while the imports run ends the process without a traceback
    "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL); from poise.studies.comparison.worker import main; main()"
)


@dataclass(frozen=True)
class Outcome:
    """What became of tasks.

    Attributes:
        failed: messages of those that failed, by name.
        late: whether the time was up before all were done.
    """

    failed: dict[str, str] = field(default_factory=dict)
    late: bool = False


def execute(
    tasks: Sequence[Task],
    crew: Crew,
    num_images: int,
    *,
    title: str,
    until: float | None = None,
    quiet: bool = False,
) -> Outcome:
    """Do tasks; one that fails is told in the outcome, and the others go on.

    Args:
        tasks: to be done, in this order; of one experiment.
        crew: processes.
        num_images: to train on.
        title: of the display.
        until: by `time.monotonic`: all stop then, with their state saved; None: never.
        quiet: no display.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; the state of all runs is saved.
    """
    following = Following(tasks, num_images)
    waiting, failed = deque(tasks), dict[str, str]()
    with (
        stop_signals() as asked,
        Workers(crew, tasks[0].folder.parent).running() as workers,
        progress(title, following.total, following.done(), quiet=quiet) as display,
    ):
        stopping = late = False
        while waiting or workers.busy:
            if not stopping and (
                asked() or (late := until is not None and time.monotonic() > until)
            ):
                stopping = True
                waiting.clear()
                workers.stop()
            workers.assign(waiting)
            for task, answer in workers.answers(POLL_SECONDS):
                following.ended.add(task.name)
                if answer["state"] == "failed" and not stopping:
                    failed[task.name] = answer["message"]
            display.update(following.done(), following.figures(workers.busy))
            if not (quiet or stopping):
                following.say_estimate(workers.busy, len(crew.devices))
    if stopping and not late:
        raise Interrupted("stopped; every run is saved: run the same command to go on")
    return Outcome(failed, late)


@final
class Worker:
    """One process, the tasks that it is doing by the numbers of their seats, and the file that it prints into."""

    def __init__(
        self, number: int, crew: Crew, folder: Path, answers: "queue.SimpleQueue[Answer]"
    ) -> None:
        self.device, self.log = crew.devices[number], folder / f"worker-{number + 1}.log"
        self.tasks: dict[int, Task] = {}
        path = os.pathsep.join(filter(None, sys.path))
        environment = os.environ | {"OMP_NUM_THREADS": str(crew.threads), "PYTHONPATH": path}
        with open(self.log, "ab") as log:
            command = [sys.executable, "-c", START, str(crew.seats(number))]
            pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": log}
            self.process = subprocess.Popen(command, env=environment, **pipes)
        self._listener = threading.Thread(target=self._listen, args=[answers], daemon=True)
        self._listener.start()

    def _listen(self, answers: "queue.SimpleQueue[Answer]") -> None:
        with suppress(
            ValueError
        ):  # not an answer: of this process no other is heard, as if it had ended
            for line in self._pipe(self.process.stdout):
                answers.put(Answer(self, json.loads(line)))
        answers.put(Answer(self, None))

    @staticmethod
    def _pipe(pipe: IO[bytes] | None) -> IO[bytes]:
        assert pipe is not None
        return pipe

    def give(self, seat: int, task: Task) -> None:
        self.tasks[seat] = task
        order = json.dumps({"seat": seat, "task": task.to_json(), "device": self.device})
        with suppress(OSError):  # it has died: its end will be heard of
            self._pipe(self.process.stdin).write(order.encode() + b"\n")
            self._pipe(self.process.stdin).flush()

    def ask_to_stop(self) -> None:
        with suppress(OSError):
            self.process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Wait for the end of the process, which has been asked for; of one that has no work not for long."""
        with suppress(OSError):
            self._pipe(self.process.stdin).close()
        try:
            self.process.wait(None if self.tasks else PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._listener.join()
        self._pipe(self.process.stdout).close()
        with suppress(OSError):
            if not self.log.stat().st_size:
                self.log.unlink()

    def obituary(self) -> str:
        """How the process died, and the last thing it said."""
        code = self.process.wait()
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        with suppress(OSError, IndexError):
            said = (
                self.log.read_bytes()[-TAIL_BYTES:]
                .decode(errors="replace")
                .strip()
                .splitlines()[-1]
            )
            how += f": {said} (see {self.log})"
        return f"its process ended {how}"


class Answer(NamedTuple):
    """What a worker says, with the seat of the task that it says it of; None: it has ended."""

    worker: Worker
    content: dict[str, Any] | None


@final
class Workers:
    """The processes of a crew, started when there is work for them."""

    def __init__(self, crew: Crew, folder: Path) -> None:
        self._crew, self._folder = crew, folder
        self._places: dict[int, Worker] = {}
        self._answers: queue.SimpleQueue[Answer] = queue.SimpleQueue()

    @contextmanager
    def running(self) -> Iterator["Workers"]:
        """Themselves; when the block ends all of them have ended. If it fails they are asked to stop, or, if that is not
        waited for either, killed."""
        try:
            yield self
        except BaseException:
            self.stop()
            raise
        finally:
            try:
                for worker in self._places.values():
                    worker.close()
            except BaseException:
                for worker in self._places.values():
                    worker.process.kill()
                raise

    @property
    def busy(self) -> list[Task]:
        return [task for worker in self._places.values() for task in worker.tasks.values()]

    def assign(self, waiting: deque[Task]) -> None:
        """Give a task to each free seat, as long as there are any."""
        for seat in range(len(self._crew.devices)):
            number = self._crew.process(seat)
            worker = self._places.get(number)
            if not waiting or (worker is not None and seat in worker.tasks):
                continue
            worker = worker or Worker(number, self._crew, self._folder, self._answers)
            self._places[number] = worker
            worker.give(seat, waiting.popleft())

    def stop(self) -> None:
        for worker in self._places.values():
            worker.ask_to_stop()

    def answers(self, timeout: float) -> Iterator[tuple[Task, dict[str, str]]]:
        """The task and its answer, for every answer that comes in time; of a worker that died one is made up."""
        with suppress(queue.Empty):
            while True:
                worker, content = self._answers.get(timeout=timeout)
                timeout = 0.0
                if content is None:
                    self._bury(worker)
                    for task in worker.tasks.values():
                        yield task, {"state": "failed", "message": worker.obituary()}
                elif worker.tasks:
                    yield worker.tasks.pop(content.get("seat", next(iter(worker.tasks)))), content

    def _bury(self, worker: Worker) -> None:
        for number, other in list(self._places.items()):
            if other is worker:
                worker.close()
                del self._places[number]


@final
class Following:
    """How far tasks are, in steps, read from the logs of their runs.

    Attributes:
        ended: names of the tasks that are done, or have failed.
    """

    def __init__(self, tasks: Sequence[Task], num_images: int) -> None:
        self.tasks, self.num_images = tasks, num_images
        self.total = sum(
            task.total_steps(num_images) + 1 for task in tasks
        )  # the last is measuring
        self.ended: set[str] = set()
        self._first_seen: dict[int, int] = {}
        self._said: set[int] = set()

    def done(self) -> int:
        """Steps of all tasks."""
        over, going = [
            [t for t in self.tasks if (t.name in self.ended) == ended] for ended in (True, False)
        ]
        return sum(task.total_steps(self.num_images) + 1 for task in over) + sum(
            map(self._steps, going)
        )

    def _steps(self, task: Task) -> int:
        entry = last_entry(task.folder / "metrics.jsonl")
        if entry is None:
            return 0
        before = task.recipe.first.total_steps(self.num_images) if entry["stage"] == 2 else 0
        return before + entry["step"]

    def figures(self, busy: Sequence[Task]) -> Mapping[str, str]:
        """What each worker does, or the first few."""
        more = {"and": f"{len(busy) - SHOWN} more"} if len(busy) > SHOWN else {}
        return {task.name: self._state(task) for task in busy[:SHOWN]} | more

    def _state(self, task: Task) -> str:
        steps, total = self._steps(task), task.total_steps(self.num_images)
        if steps == total:
            return "measuring"
        first = task.recipe.first.total_steps(self.num_images)
        number, share = (
            (1, steps / first) if steps < first else (2, (steps - first) / (total - first))
        )
        return f"stage {number} {share:.0%}"

    def say_estimate(self, busy: Sequence[Task], jobs: int) -> None:
        """One line on stderr for each stage, once its first steps have been timed."""
        for task in busy:
            entry = last_entry(task.folder / "metrics.jsonl")
            if entry is None or entry["stage"] in self._said or not entry["images_per_second"]:
                continue
            stage = int(entry["stage"])
            if (
                self._first_seen.setdefault(stage, entry["step"]) == entry["step"]
            ):  # the first steps of a process are slow
                continue
            self._said.add(stage)
            seconds = self._batch(task, stage) / entry["images_per_second"]
            left = (
                sum(self._left(other, stage) for other in self.tasks)
                * seconds
                / min(jobs, len(self.tasks))
            )
            line = (
                f"stage {stage}: {1000 * seconds:.1f} ms a step, so about {duration(left)} for "
                "what is left of it in all runs"
            )
            print(line, file=sys.stderr, flush=True)

    def _batch(self, task: Task, stage: int) -> int:
        settings = task.recipe.first if stage == 1 else task.recipe.second
        assert settings is not None
        return min(settings.batch_size, self.num_images)

    def _left(self, task: Task, stage: int) -> int:
        """Steps of one stage that are still to be done."""
        first, total = (
            task.recipe.first.total_steps(self.num_images),
            task.total_steps(self.num_images),
        )
        steps = self._steps(task)
        return max(first - steps, 0) if stage == 1 else total - max(steps, first)


def last_entry(log: Path) -> dict[str, Any] | None:
    """The last whole line of a metrics.jsonl; None: there is none yet."""
    try:
        with open(log, "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            lines = file.read().splitlines()
    except OSError:
        return None
    for line in reversed(lines):
        with suppress(ValueError):
            entry = json.loads(line)
            if isinstance(entry, dict):
                return entry
    return None


def duration(seconds: float) -> str:
    """A time in words, to two figures.

    Example:
        >>> duration(50), duration(600), duration(9000)
        ('50 s', '10 min', '2.5 h')
    """
    for unit, size, style in (("h", 3600, ".1f"), ("min", 60, ".0f")):
        if seconds >= 2 * size:
            return f"{seconds / size:{style}} {unit}"
    return f"{seconds:.0f} s"
