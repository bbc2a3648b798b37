"""Shared parts of the benchmarks: worker processes in turns, ratios, matrix rate, memory, tables.

A machine's speed changes from minute to minute, so compare only measurements that took turns in
one run. Each compared loop runs in the main thread of its own process (`Worker`). Two computing
threads in one process have two OpenMP thread pools, which slow each other down.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from poise.support.files import write_json
from poise.training import TrainingState

Task = Callable[[], Any]
MATRIX_SIDE = 2048


def seconds(task: Task, device: torch.device) -> float:
    """Return the seconds of a task, including the work it queued on the device."""
    synchronise(device)
    began = time.perf_counter()
    task()
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Worker:
    """A worker process that works in turns and sleeps between them.

    Args:
        command: a Python script and its arguments. The script calls `send` once it is ready, then
            serves turns with `wait_for_turn` and `send`.
        environment: variables added to those of this process.
        prefix: a command that runs the interpreter, for example `nice -n 5`.
    """

    def __init__(
        self,
        command: Sequence[str],
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.process = subprocess.Popen(
            [*prefix, sys.executable, *command],
            env={**os.environ, **(environment or {})},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    @cached_property
    def ready(self) -> Any:
        """Return the script's first report."""
        return self.answer()

    def turn(self, amount: float) -> Any:
        """Run one turn of `amount` steps or seconds and return its report."""
        self.begin(amount)
        return self.answer()

    def begin(self, amount: float) -> None:
        """Start a turn; `answer` returns its report."""
        _ = self.ready
        assert self.process.stdin is not None
        print(amount, file=self.process.stdin, flush=True)

    def end(self) -> None:
        """Stop the process and wait until it has ended."""
        self.process.communicate()

    def answer(self) -> Any:
        """Wait for the next report and return it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"a process of the benchmark ended with {self.process.wait()}")
        return json.loads(line)


def send(figures: Any) -> None:
    """Send figures to the benchmark. Called in a worker."""
    print(json.dumps(figures), file=sys.__stdout__, flush=True)


def wait_for_turn() -> float | None:
    """Return the amount of the next turn, or None after the last. Called in a worker."""
    line = sys.stdin.readline()
    return float(line) if line else None


def serve(task_of: Callable[[int], Task], device: torch.device) -> None:
    """Report the seconds of each turn's task. Called in a worker.

    The call `task_of(amount)`, which prepares the task, is not timed.
    """
    while (amount := wait_for_turn()) is not None:
        send(seconds(task_of(int(amount)), device))


class Turns:
    """`Watch.stop` of a worker: after step 1, report each turn and wait for the next."""

    def __init__(self, state: TrainingState, device: torch.device) -> None:
        self.state, self.device = state, device
        self.until, self.began = 1, 0.0

    def __call__(self) -> bool:
        if self.state.step < self.until:
            return False
        synchronise(self.device)
        send(time.perf_counter() - self.began if self.began else {})
        steps = wait_for_turn()
        self.until += int(steps or 0)
        self.began = time.perf_counter()
        return steps is None


def take_turns(
    workers: Mapping[str, Any], amounts: Mapping[str, float], rounds: int
) -> dict[str, list[Any]]:
    """Return the reports of each worker. Every other round reverses the order of the turns."""
    reports: dict[str, list[Any]] = {name: [] for name in workers}
    for number in range(rounds):
        for name in list(workers) if number % 2 == 0 else list(workers)[::-1]:
            reports[name].append(workers[name].turn(amounts[name]))
    return reports


def matrix_products(device: torch.device, at_least: float) -> tuple[Task, float]:
    """Return a task of large float32 matrix products, and its FLOPs.

    The task takes about `at_least` seconds. Its FLOPs per second are the machine's matrix rate.
    """
    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device)
    torch.mm(matrix, matrix)
    number = math.ceil(at_least / seconds(lambda: torch.mm(matrix, matrix), device))

    def multiply() -> None:
        for _ in range(number):
            torch.mm(matrix, matrix)

    return multiply, 2.0 * number * MATRIX_SIDE**3


def summary(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Return the median, least and greatest value over the rounds."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in figures.items()}


def over(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Return the summary of the ratios, round by round."""
    return summary([a / b for a, b in zip(numerator, denominator, strict=True)])


def machine(device: torch.device) -> dict[str, Any]:
    """Return the PyTorch version, processor, threads and device for a report."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": torch.__version__,
        "machine": f"{name}, {torch.get_num_threads()} threads, {device.type}",
    }


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    write_json(path, report)
    print(f"written: {path}", file=sys.stderr)


def between(text: str, begin: str, end: str, content: str) -> str:
    """Return a text with new content between two marks.

    Raises:
        ValueError: the text lacks one of the marks.
    """
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(f"{begin} and {end} are not in the text")
    return f"{before}{begin}\n\n{content.strip()}\n\n{end}{after}"


def show(rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table whose first row is the header."""
    head, *body = [
        [cell if isinstance(cell, str) else spread(cell) for cell in row] for row in rows
    ]
    for row in (head, ["---"] * len(head), *body):
        print(f"| {' | '.join(row)} |")


def spread(figure: Any) -> str:
    """Format a number, or a median with its least and greatest value."""
    if isinstance(figure, Mapping):
        return f"{figure['median']:.4g} ({figure['min']:.4g} to {figure['max']:.4g})"
    return f"{figure:.4g}" if isinstance(figure, float) else json.dumps(figure)


def parameters(network: torch.nn.Module) -> int:
    """Return the number of parameters of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


class PeakMemory:
    """Measure the peak anonymous memory of this process inside the block, in MiB.

    Memory-mapped files do not count. Sampled twenty times a second on Linux; elsewhere 0.
    """

    def __enter__(self) -> "PeakMemory":
        self.mib, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            self.mib = max(self.mib, anonymous_mib())
            if self._over.wait(0.05):
                return


def anonymous_mib() -> float:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)
