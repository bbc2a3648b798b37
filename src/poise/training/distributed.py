"""Several processes that train one model: `torchrun --nproc-per-node 2 -m poise train ...`. One process is the case N = 1.

Each process ("rank") computes on its share of every global batch. The loss of a rank is scaled by its share, so that the
average of gradients over ranks is the gradient of the whole batch:

    g = 1/N sum_r g_r,    g_r = gradient of  N n_r / n * (mean loss over the n_r images of rank r)

All ranks then take the same step from the same weights, and hold the same state to the last bit. Rank 0 alone writes files.

BatchNorm over the global batch of several processes, so that N ranks equal one process.

torch.nn.SyncBatchNorm is for CUDA alone; this one runs wherever sums can be reduced. With n_r values of a channel on rank r,
of mean m_r and variance v_r, the ranks sum n_r, n_r m_r and n_r (v_r + m_r^2) in double precision, and

    n = sum n_r,    m = sum n_r m_r / n,    v = sum n_r (v_r + m_r^2) / n - m^2.
"""

import atexit
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from poise.errors import InputError, RunError

LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun
PATIENCE = timedelta(
    hours=1
)  # with a process that does not answer; one that died is noticed at once

Result = TypeVar("Result")


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """A process group inside the block where a launcher started this process with others; nothing otherwise.

    The group stays up after the block: a launcher's meeting point serves for one group only.

    Raises:
        RunError: another process has gone.
    """
    if not launched() and not is_up():
        yield
        return
    if not is_up():
        cuda = device.type == "cuda"
        if cuda:
            torch.cuda.set_device(device)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=PATIENCE)
    atexit.unregister(leave)
    try:
        yield
    except (dist.DistError, RuntimeError) as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise
        raise RunError(
            "lost contact with another process of this run; its own message says why"
        ) from error
    atexit.register(
        leave
    )  # not after an error: NCCL would wait for processes that wait for this one


def leave() -> None:
    """End the process group."""
    if is_up():
        dist.destroy_process_group()


def launched() -> bool:
    """Whether a launcher started this process as one of several."""
    return all(name in os.environ for name in LAUNCH) and int(os.environ["WORLD_SIZE"]) > 1


def is_up() -> bool:
    """Whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def ranks() -> int:
    """The number of processes that compute together now."""
    return dist.get_world_size() if is_up() else 1


def rank() -> int:
    """The number of this process, from 0, also before and after there is a group."""
    return dist.get_rank() if is_up() else int(os.environ["RANK"]) if launched() else 0


def device_of_rank(device: torch.device) -> torch.device:
    """The device of this process: the GPU of its number on this machine.

    Raises:
        InputError: one GPU was named for all, there are fewer than processes, or the device cannot be used by several.
    """
    if not launched() or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise InputError(
            f"several processes train on cuda or on cpu, not on {device.type}: give one of them as device"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.index is not None:
        raise InputError(f"each process takes a GPU of its own: give cuda as device, not {device}")
    if local >= torch.cuda.device_count():
        raise InputError(
            f"there are more processes on this machine than its {torch.cuda.device_count()} GPUs"
        )
    return torch.device("cuda", local)


def share(size: int) -> slice:
    """The rows of a global batch that are this rank's; shares differ by one row at most."""
    return (
        slice(rank() * size // ranks(), (rank() + 1) * size // ranks())
        if is_up()
        else slice(0, size)
    )


def on_first(work: Callable[[], Result]) -> Result:
    """What `work` gives on rank 0, which alone does it; all ranks get it, or the InputError or RunError that it raised."""
    if not is_up():
        return work()
    outcome: list[Any] = [None, None]  # a value, or a kind of error and its text
    if rank() == 0:
        try:
            outcome = [work(), None]
        except (InputError, RunError) as error:
            outcome = [InputError if isinstance(error, InputError) else RunError, str(error)]
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[0](outcome[1])
    return outcome[0]


def check_agreement(what: str, value: Any) -> None:
    """Raises InputError, on all ranks, where the ranks hold different values."""
    if not is_up():
        return
    values: list[Any] = [None] * ranks()
    dist.all_gather_object(values, value)
    differing = [str(number) for number, other in enumerate(values) if other != values[0]]
    if differing:
        raise InputError(
            f"processes {', '.join(differing)} were started with {what} other than process 0's"
        )


def wait() -> None:
    """Returns when all ranks are here."""
    if is_up():
        dist.all_reduce(torch.zeros(1))  # not dist.barrier(), which would occupy the GPU


@torch.no_grad()
def copy_from_first(module: nn.Module) -> None:
    """Give a module rank 0's parameters and buffers on all ranks: a network of the user's own may be drawn by each."""
    if is_up():
        for tensor in [*module.parameters(), *module.buffers()]:
            values = tensor.detach().contiguous()
            dist.broadcast(values, 0)
            tensor.copy_(values)


@torch.no_grad()
def average(gradients: Sequence[Tensor], *values: Tensor) -> tuple[Tensor, ...]:
    """Average gradients over ranks in place, and return the averages of some scalars, in one all-reduce.

    Not DistributedDataParallel: at each forward pass it overwrites all buffers with rank 0's, so that gamma2 and the
    statistics of BatchNorm would be estimates from one rank's images, silently; it fits no model that is entered through
    `encode` and `decode` as well; and with BatchNorm it drops CUDA graphs (pytorch/pytorch#139207). What it has over one
    all-reduce, communication during backward, gains little on networks of this size.
    """
    if not is_up():
        return values
    flat = torch.cat([*(gradient.flatten() for gradient in gradients), torch.stack(values)])
    dist.all_reduce(flat)
    flat /= ranks()
    *averages, means = flat.split([gradient.numel() for gradient in gradients] + [len(values)])
    for gradient, averaged in zip(gradients, averages, strict=True):
        gradient.copy_(averaged.view_as(gradient))
    return tuple(means)


@final
class GlobalBatchNorm(_BatchNorm):
    """A BatchNorm layer that normalises by the statistics of all ranks in training, and is as it was otherwise."""

    @classmethod
    def of(cls, layer: _BatchNorm) -> "GlobalBatchNorm":
        """A layer that shares everything with the given one: parameters, statistics, mode."""
        shared = cls.__new__(cls)
        object.__setattr__(shared, "__dict__", layer.__dict__)
        return shared

    def _check_input_dim(self, input: Tensor) -> None:
        pass

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or ranks() == 1:
            return super().forward(input)
        values = input.to(torch.promote_types(input.dtype, torch.float32))
        over = [dim for dim in range(input.dim()) if dim != 1]
        v, m = torch.var_mean(values, over, correction=0)
        n = torch.full_like(m[:1], values.numel() // len(m), dtype=torch.float64)
        sums = SumOverRanks.apply(torch.cat([n, n * m, n * (v + m.double().square())]))
        assert isinstance(sums, Tensor)
        total, mean, variance = sums[0], *(sums[1:] / sums[0]).chunk(2)
        variance = (variance - mean.square()).clamp_min(0)
        self._follow(mean.detach(), variance.detach() * total / (total - 1))
        scale = (
            (variance + self.eps).rsqrt()
            if self.weight is None
            else (variance + self.eps).rsqrt() * self.weight
        )
        column = (-1, *[1] * (input.dim() - 2))
        normalised = (values - mean.to(values.dtype).view(column)) * scale.to(values.dtype).view(
            column
        )
        return (normalised if self.bias is None else normalised + self.bias.view(column)).to(
            input.dtype
        )

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, as torch's layer does."""
        if (
            self.running_mean is None
            or self.running_var is None
            or self.num_batches_tracked is None
        ):
            return
        self.num_batches_tracked += 1
        momentum = 1 / self.num_batches_tracked if self.momentum is None else self.momentum
        self.running_mean += momentum * (mean.to(self.running_mean.dtype) - self.running_mean)
        self.running_var += momentum * (variance.to(self.running_var.dtype) - self.running_var)


class SumOverRanks(torch.autograd.Function):
    """The sum over ranks. Its gradient is the sum of the ranks' gradients, since each rank's loss depends on it."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def use_global_batch_norm(module: nn.Module) -> None:
    """Replace the BatchNorm layers inside a module, in place; parameters, their names and evaluation stay as they are."""
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            setattr(module, name, GlobalBatchNorm.of(child))
        else:
            use_global_batch_norm(child)
