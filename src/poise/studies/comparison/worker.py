"""Work of a joblib worker: train a run, measure it, write its result.

The code is independent of the process, thread and machine it runs in. A run continues while the
main process holds a lock file.
"""

import shutil
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from filelock import FileLock, Timeout

from poise.data import Dataset
from poise.errors import InputError, Interrupted, RunError
from poise.recipes.settings import Data
from poise.runs.folder import read_data
from poise.runs.options import Options
from poise.runs.pipeline import train
from poise.studies.comparison.measuring import measured
from poise.studies.comparison.plan import Share, Task
from poise.studies.results import result_of, source_commit, write_result
from poise.support.guards import stopping_when

POLL_SECONDS = 0.5
# Threads share Python's lock. Evaluations at once on one H200, in images per second of all
# together: one 2,400, four 4,100, five 2,600, eight at most 1,900 (docs/log.md, 2026-11-27).
EVALUATED_AT_ONCE = threading.Semaphore(4)
LEASE = ".going-"


class Ended(NamedTuple):
    """Outcome of a task, with an error message if it failed."""

    task: Task
    state: Literal["done", "failed", "interrupted"]
    message: str = ""


@contextmanager
def leased(folder: Path) -> Iterator[FileLock]:
    """Hold a lock file in a folder. Runs continue while it is held.

    They save their state and stop when the lock is released or this process is killed.
    """
    for left in folder.glob(f"{LEASE}*"):
        left.unlink(missing_ok=True)
    lease = FileLock(folder / f"{LEASE}{uuid.uuid4().hex}", thread_local=False)
    with lease:
        try:
            yield lease
        finally:
            lease.release()
            Path(lease.lock_file).unlink(missing_ok=True)


def is_held(lease: Path) -> bool:
    """Return whether the process that made a lock file still holds it."""
    if not lease.exists():
        return False
    try:
        with FileLock(lease, timeout=0):
            return False
    except Timeout:
        return True


def work(share: Share, lease: Path) -> list[Ended]:
    """Do the tasks of a share, one after another or in threads.

    Each thread has its own CUDA stream, so the GPU runs all of them side by side.
    """
    source_commit()  # cached now, because the clone may change before the first run ends

    def in_thread(task: Task) -> Ended:
        on_cuda = share.device.startswith("cuda")
        with torch.cuda.stream(torch.cuda.Stream(share.device)) if on_cuda else nullcontext():
            return perform(task, share.device, lease)

    if share.threads == 1:
        return [perform(task, share.device, lease) for task in share.tasks]
    with ThreadPoolExecutor(share.threads) as pool:
        return list(pool.map(in_thread, share.tasks))


def perform(task: Task, device: str, lease: Path) -> Ended:
    """Do the rest of a task. Save and stop it when the lease is released."""
    stop = now_and_then(lambda: not is_held(lease))
    if stop():
        return Ended(task, "interrupted")
    try:
        with stopping_when(stop):
            _train_and_measure(task, device, stop)
    except Interrupted:
        return Ended(task, "interrupted")
    except (InputError, RunError, OSError, MemoryError) as error:
        return Ended(task, "failed", " ".join(str(error).split()) or type(error).__name__)
    except Exception as error:  # the other tasks continue
        traceback.print_exc()
        message = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return Ended(task, "failed", message)
    return Ended(task, "done")


def now_and_then(ask: Callable[[], bool]) -> Callable[[], bool]:
    """Return `ask`, called at most twice a second. In between it returns the last answer."""
    last, answer = -POLL_SECONDS, False

    def asked() -> bool:
        nonlocal last, answer
        if time.monotonic() - last >= POLL_SECONDS:
            last, answer = time.monotonic(), ask()
        return answer

    return asked


def _train_and_measure(task: Task, device: str, stop: Callable[[], bool]) -> None:
    if task.result() is not None:  # by a worker that was killed later
        return
    options = Options(device=device, quiet=True, save_seconds=task.save_seconds, engine=task.engine)
    images = dataset(task.recipe.data, task.folder.parent / "cache")
    run = train(images, recipe=task.recipe, out=task.folder, options=options)
    with EVALUATED_AT_ONCE:
        evaluation = measured(run, task.measuring, task.recipe.seed, stop)
    seconds = {"evaluation": evaluation.pop("seconds")}
    result = result_of(
        run, evaluation, experiment=task.experiment, label=task.label, seconds=seconds
    )
    write_result(result, task.results)
    if not task.keep:
        shutil.rmtree(task.folder)


_reading = threading.Lock()


def dataset(settings: Data, cache: Path) -> Dataset:
    """Return the images of a task, cached because the tasks of an experiment share them."""
    with _reading:
        return _read(settings, cache)


@lru_cache(maxsize=1)
def _read(settings: Data, cache: Path) -> Dataset:
    return read_data(settings, cache=cache)


def forget_images() -> None:
    """Free the cached images."""
    _read.cache_clear()
