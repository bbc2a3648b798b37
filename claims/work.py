"""Trials done two at a time, each by a process of one thread, which does one after another."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from claims.design import Trial
from claims.measure import finished, perform
from poise.errors import InputError, Interrupted, RunError

Task = partial[Path]


def work(
    trials: Sequence[Trial],
    runs: Path,
    results: Path,
    sources: dict[str, str],
    *,
    processes: int = 2,
    keep: bool = False,
) -> None:
    """Do what is not finished. A trial that was interrupted goes on where it stopped; one that fails does not stop the others.

    Args:
        trials: in the order in which they are done.
        runs, results, sources, keep: see `measure.perform`.
        processes: at a time; 0: in this process.

    Raises:
        RunError: some failed.
    """
    left = [trial for trial in trials if not finished(trial, results)]
    print(
        f"{len(trials)} runs, {len(trials) - len(left)} of them finished",
        file=sys.stderr,
        flush=True,
    )
    results.mkdir(parents=True, exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    tasks = [partial(perform, trial, runs, results, sources, keep=keep) for trial in left]
    began, failed = time.monotonic(), 0
    for number, message in enumerate(
        _in_turn(tasks) if processes == 0 else _at_once(tasks, processes), start=1
    ):
        failed += message.startswith("failed")
        print(
            f"{number}/{len(left)} {message}, {(time.monotonic() - began) / 60:.1f} min",
            file=sys.stderr,
            flush=True,
        )
    if failed:
        raise RunError(f"{failed} of {len(left)} runs failed; the others are done")


def _in_turn(tasks: Sequence[Task]) -> Iterator[str]:
    yield from map(_outcome, tasks)


def _at_once(tasks: Sequence[Task], processes: int) -> Iterator[str]:
    os.environ["OMP_NUM_THREADS"] = (
        "1"  # of torch's and of numpy's threads in the processes: they would wait for each other
    )
    with (
        _ended_by_sigterm(),
        ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool,
    ):
        futures = [pool.submit(_in_pool, task) for task in tasks]
        try:
            for future in as_completed(futures):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()  # what it trains is saved
            raise


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM is an exit like any other inside the block, so that other processes end as well."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _in_pool(task: Task) -> str:
    try:
        return _outcome(task)
    except (Interrupted, KeyboardInterrupt):
        os._exit(130)  # its state is saved; the pool would begin the next one


def _outcome(task: Task) -> str:
    """What became of a task, in words."""
    try:
        return task().stem
    except Interrupted:
        raise
    except (InputError, RunError) as error:
        return f"failed: {' '.join(map(str, task.args[0].key))}: {' '.join(str(error).split())}"
