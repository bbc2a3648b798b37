"""Sum tensors over the ranks of a process group, and say so if a rank waits for the others."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from poise.errors import RunError
from poise.support.progress import warn

WARN_AFTER = timedelta(minutes=1)
REMEDY = (
    "all ranks must compute the loss together; on one rank alone, "
    "use process_group=False, or balance.eval()"
)


def is_shared(process_group: Any) -> bool:
    """Return whether a module shares its state with other ranks.

    Args:
        process_group: a group, None (all ranks, if there are several) or False (no other rank).
    """
    return process_group is not False and dist.is_available() and dist.is_initialized()


def sum_over_ranks(values: Tensor, group: Any = None) -> None:
    """Sum values over the ranks of a process group, in place.

    On a CPU, a warning is printed after a minute. The time-out is that of the group, 30 minutes
    unless `init_process_group` says otherwise. On a GPU and in compiled code the host does not wait
    here, so that torch's own time-out applies.

    Args:
        values: of the same shape on all ranks.
        group: the process group. None: the default group.

    Raises:
        RunError: the other ranks did not take part before the time-out.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        dist.all_reduce(values, group=group)
        return
    work = dist.all_reduce(values, group=group, async_op=True)
    assert work is not None
    try:
        try:
            work.wait(WARN_AFTER)
        except RuntimeError:
            if work.is_completed():  # the group's own time-out, or a lost rank
                raise
            warn(f"a balance has waited {WARN_AFTER.seconds} s for other ranks: {REMEDY}")
            work.wait()
    except RuntimeError as error:
        if "timed out" not in str(error).lower():
            raise
        raise RunError(f"a balance waited for other ranks until the time-out: {REMEDY}") from error
