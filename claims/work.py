"""Trials done two at a time, each by a process of one thread, which does one after another."""

import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

from claims.design import Trial
from claims.measure import finished, perform


def work(
    trials: Sequence[Trial], runs: Path, results: Path, sources: dict[str, str], *, processes: int = 2, keep: bool = False
) -> None:
    """Do what is not finished. A trial that was interrupted goes on where it stopped.

    Args:
        trials: in the order in which they are done.
        runs, results, sources, keep: see `measure.perform`.
        processes: at a time; 0: in this process.
    """
    left = [trial for trial in trials if not finished(trial, results)]
    print(f"{len(trials)} runs, {len(trials) - len(left)} of them finished", file=sys.stderr)
    results.mkdir(parents=True, exist_ok=True)
    runs.mkdir(parents=True, exist_ok=True)
    task = partial(perform, runs=runs, results=results, sources=sources, keep=keep)
    if processes == 0:
        for trial in left:
            task(trial)
        return
    began = time.monotonic()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        futures = [pool.submit(task, trial) for trial in left]
        try:
            for number, future in enumerate(as_completed(futures), start=1):
                path = future.result()
                elapsed = time.monotonic() - began
                print(f"{number}/{len(left)} {path.stem}, {elapsed / 60:.1f} min", file=sys.stderr, flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
