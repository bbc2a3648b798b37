"""What the benchmarks share: tasks that take turns, ratios round by round, the machine's matrix rate, memory, a table, a file.

Machines change their pace from minute to minute, so nothing is compared that was not measured in turns within one run.
"""

import json
import math
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from poise.support.files import write_json

Task = Callable[[], Any]
MATRIX_SIDE = 2048


def seconds(task: Task, device: torch.device) -> float:
    """How long a task takes, the device's queue included."""
    synchronise(device)
    began = time.perf_counter()
    task()
    synchronise(device)
    return time.perf_counter() - began


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(
    tasks: Mapping[str, Task], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each task in each round; every other round goes the other way about."""
    times: dict[str, list[float]] = {name: [] for name in tasks}
    for number in range(rounds):
        for name in list(tasks) if number % 2 == 0 else list(tasks)[::-1]:
            times[name].append(seconds(tasks[name], device))
    return times


def matrix_products(device: torch.device, at_least: float) -> tuple[Task, float]:
    """Large float32 matrix products for so many seconds, about, and their FLOPs: what the machine sustains."""
    matrix = torch.randn(MATRIX_SIDE, MATRIX_SIDE, device=device)
    torch.mm(matrix, matrix)
    number = math.ceil(at_least / seconds(lambda: torch.mm(matrix, matrix), device))

    def multiply() -> None:
        for _ in range(number):
            torch.mm(matrix, matrix)

    return multiply, 2.0 * number * MATRIX_SIDE**3


def summary(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Median and spread over the rounds."""
    figures = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in figures.items()}


def over(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """The ratio, round by round."""
    return summary([a / b for a, b in zip(numerator, denominator, strict=True)])


def machine(device: torch.device) -> dict[str, Any]:
    """What every report says of the machine."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "torch": torch.__version__,
        "machine": f"{name}, {torch.get_num_threads()} threads, {device.type}",
    }


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    write_json(path, report)
    print(f"written: {path}", file=sys.stderr)


def show(rows: Sequence[Sequence[Any]]) -> None:
    """A table whose first row is its head, as Markdown."""
    head, *body = [
        [cell if isinstance(cell, str) else spread(cell) for cell in row] for row in rows
    ]
    for row in (head, ["---"] * len(head), *body):
        print(f"| {' | '.join(row)} |")


def spread(figure: Any) -> str:
    """A number, or a median with its least and greatest."""
    if isinstance(figure, Mapping):
        return f"{figure['median']:.4g} ({figure['min']:.4g} to {figure['max']:.4g})"
    return f"{figure:.4g}" if isinstance(figure, float) else json.dumps(figure)


class PeakMemory:
    """The most anonymous memory (MiB) that this process holds inside the block: files it has mapped are not counted.

    Looked at twenty times a second where the system tells (Linux); elsewhere 0.
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
