"""A process that does tasks: train, measure, write the result. One after another, or several at a time on one GPU.

Tasks come as lines of JSON on stdin and answers go to stdout, so that no script needs a main guard and nothing is pickled.
Whatever else is printed goes to stderr, which the parent sends to a file. When stdin ends, the parent is gone or has no more
work: the process saves what it is training and ends, as it does on SIGTERM.
"""

import json
import os
import queue
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from pathlib import Path

import torch

from poise.data import Dataset
from poise.errors import InputError, Interrupted, RunError
from poise.recipes.settings import Data
from poise.runs.folder import read_data
from poise.runs.options import Options
from poise.runs.pipeline import train
from poise.studies.comparison.measuring import measured
from poise.studies.comparison.plan import Task
from poise.studies.results import result_of, source_commit, write_result
from poise.support.guards import stop_signals

POLL_SECONDS = 0.5


def main() -> None:
    """Do tasks until stdin ends."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(143)
    )  # an exit like any other: half-written files go
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    shelf = Shelf()
    source_commit()  # of what was imported: by the end of the first run the clone may have moved on

    def carry_out(line: bytes) -> None:
        order = json.loads(line)
        said = answer(Task.from_json(order["task"]), order["device"], shelf)
        print(json.dumps({"seat": order["seat"], **said}) + "\n", end="", file=answers, flush=True)

    try:
        if int(sys.argv[1]) == 1:
            for line in lines_of_stdin():
                carry_out(line)
        else:
            in_threads(carry_out, shelf)
    except KeyboardInterrupt:  # Ctrl-C reaches all processes of a terminal
        sys.exit(130)


def in_threads(carry_out: Callable[[bytes], None], shelf: "Shelf") -> None:
    """Carry out each order in a thread and CUDA stream of its own, so that the GPU works on all of them side by side.

    When asked to stop, runs in training save their state. What is being measured is given up: it is measured again.
    """

    def beside_others(line: bytes) -> None:
        with (
            torch.cuda.stream(torch.cuda.Stream(json.loads(line)["device"]))
            if torch.cuda.is_available()
            else nullcontext()
        ):
            carry_out(line)

    threads: list[threading.Thread] = []
    with stop_signals() as asked:  # heard by the main thread for all
        for line in lines_of_stdin(asked):
            threads.append(threading.Thread(target=beside_others, args=[line], daemon=True))
            threads[-1].start()
        for thread in threads:
            while thread.is_alive() and thread not in shelf.measuring:
                thread.join(POLL_SECONDS)
        if any(thread.is_alive() for thread in threads):
            os._exit(143)  # threads that are measuring would not let the interpreter end


def lines_of_stdin(asked: Callable[[], bool] = lambda: False) -> Iterator[bytes]:
    """Lines as they come, until they end or something `asked` to stop.

    Another thread waits for them, and when they end asks whatever is being done to stop.

    The end is put in the queue too: a signal that arrives just before a thread goes to sleep does not wake it.
    """
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()

    def read() -> None:
        for line in open(
            0, "rb", buffering=0, closefd=False
        ):  # unbuffered: no lock is held when the process ends
            lines.put(line)
        lines.put(None)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=read, daemon=True).start()
    while not asked():
        with suppress(queue.Empty):
            if (line := lines.get(timeout=POLL_SECONDS)) is None:
                return
            yield line


def answer(task: Task, device: str, shelf: "Shelf") -> dict[str, str]:
    """What became of a task: its "state" is done, failed or interrupted."""
    try:
        perform(task, device, shelf)
    except Interrupted:
        return {"state": "interrupted"}
    except (InputError, RunError, OSError, MemoryError) as error:
        return {"state": "failed", "message": " ".join(str(error).split()) or type(error).__name__}
    except Exception as error:  # the others go on: the traceback is in this worker's file
        traceback.print_exc()
        return {
            "state": "failed",
            "message": f"{type(error).__name__}: {' '.join(str(error).split())}",
        }
    return {"state": "done"}


def perform(task: Task, device: str, shelf: "Shelf") -> Path:
    """Train, measure and write the result, from wherever each of them stands; the result's path."""
    options = Options(device=device, quiet=True, save_seconds=task.save_seconds, engine=task.engine)  # pyright: ignore
    run = train(
        shelf.dataset(task.recipe.data, task.folder.parent / "cache"),
        recipe=task.recipe,
        out=task.folder,
        options=options,
    )
    shelf.measuring.add(threading.current_thread())
    evaluation = measured(run, task.measuring, task.recipe.seed)
    seconds = {"evaluation": evaluation.pop("seconds")}
    result = result_of(
        run, evaluation, experiment=task.experiment, label=task.label, seconds=seconds
    )
    return write_result(result, task.results)


class Shelf:
    """The images read last, which the tasks of an experiment have in common, and the threads that are past training."""

    def __init__(self) -> None:
        self.measuring: set[threading.Thread] = set()
        self._held: tuple[Data, Dataset] | None = None
        self._reading = threading.Lock()

    def dataset(self, settings: Data, cache: Path) -> Dataset:
        with self._reading:
            if self._held is None or self._held[0] != settings:
                self._held = None  # before the next is read
                self._held = settings, read_data(settings, cache=cache)
            return self._held[1]
