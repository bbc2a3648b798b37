"""Replace a worker in the tests of a study by one that trains nothing."""

import os
import signal
import time
from pathlib import Path

from poise.studies.comparison.plan import Share
from poise.studies.comparison.worker import Ended, is_held


def work(share: Share, lease: Path) -> list[Ended]:
    """Return, fail, die or sleep, as the task's label says."""
    (task,) = share.tasks
    if task.label == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    while task.label == "sleeps" and is_held(lease):
        time.sleep(0.05)
    if task.label == "sleeps":
        return [Ended(task, "interrupted")]
    return [Ended(task, "failed", "too bad") if task.label == "fails" else Ended(task, "done")]
