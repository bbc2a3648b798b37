"""Train one model in several processes: `torchrun --nproc-per-node 2 -m poise train ...`.

Each process ("rank") computes on its share of every global batch. The loss of a rank is scaled by
its share. So the average of gradients over ranks is the gradient of the whole batch:

    g = 1/N sum_r g_r,    g_r = gradient of  N n_r / n * (mean loss over the n_r images of rank r)

All ranks then take the same step from the same weights, and their states are bit-identical. Only
rank 0 writes files.

BatchNorm uses the statistics of the global batch, so that N ranks compute the same as one process.
torch.nn.SyncBatchNorm is for CUDA only; `GlobalBatchNorm` also runs on CPUs. Rank r has n_r values
of a channel, with mean m_r and variance v_r. The ranks sum n_r, n_r m_r and n_r (v_r + m_r^2) in
double precision, and

    n = sum n_r,    m = sum n_r m_r / n,    v = sum n_r (v_r + m_r^2) / n - m^2.
"""

import atexit
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from inspect import signature
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from poise.balance import Balance, LossTerms
from poise.errors import InputError, RunError

LAUNCH = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # set by torchrun
# gloo raises RuntimeError, with a place in its source: [.../gloo/transport/tcp/pair.cc:553]
OF_GLOO = re.compile(r"\bgloo(/\w+)+\.(cc|cpp|h):\d+")
PATIENCE = timedelta(hours=1)  # timeout for a rank that hangs; a dead rank is detected at once

Result = TypeVar("Result")
Loss = Callable[[Any, Balance, Tensor, Tensor], LossTerms]  # called like an `Objective`


@contextmanager
def processes(device: torch.device) -> Iterator[None]:
    """Start a process group for the block, if a launcher started several processes.

    The group stays after the block, because a launcher's rendezvous serves one group only.

    Raises:
        RunError: another process ended.
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
    except RunError:
        raise
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not OF_GLOO.search(str(error)):
            raise
        raise RunError(
            "lost contact with another process of this run: read its own error message"
        ) from error
    # Only after success. After an error NCCL would wait for the other ranks, and they for this one.
    atexit.register(leave)


def leave() -> None:
    """Destroy the process group, if there is one."""
    if is_up():
        dist.destroy_process_group()


def launched() -> bool:
    """Return whether a launcher started this process as one of several."""
    return all(name in os.environ for name in LAUNCH) and int(os.environ["WORLD_SIZE"]) > 1


def is_up() -> bool:
    """Return whether there is a process group."""
    return dist.is_available() and dist.is_initialized()


def ranks() -> int:
    """Return the number of processes in the group; 1 without a group."""
    return dist.get_world_size() if is_up() else 1


def rank() -> int:
    """Return the rank of this process, from 0, even before the group starts."""
    return dist.get_rank() if is_up() else int(os.environ["RANK"]) if launched() else 0


def device_of_rank(device: torch.device) -> torch.device:
    """Return the device of this process: the GPU of its local rank, or the CPU.

    Raises:
        InputError: `device` names one GPU for all processes, is neither cuda nor cpu, or the
            machine has fewer GPUs than processes.
    """
    if not launched() or device.type == "cpu":
        return device
    if device.type != "cuda":
        raise InputError(
            f"several processes train on cuda or on cpu, not on {device.type}: "
            "give one of them as device"
        )
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device.index is not None:
        raise InputError(f"each process takes a GPU of its own: give cuda as device, not {device}")
    if local >= torch.cuda.device_count():
        raise InputError(
            f"this machine has more processes than its {torch.cuda.device_count()} GPUs: "
            "start one process per GPU"
        )
    return torch.device("cuda", local)


def share(size: int) -> slice:
    """Return this rank's rows of a global batch. Shares differ by at most one row.

    Args:
        size: number of rows of the global batch.
    """
    return (
        slice(rank() * size // ranks(), (rank() + 1) * size // ranks())
        if is_up()
        else slice(0, size)
    )


def on_first(work: Callable[[], Result]) -> Result:
    """Call `work` on rank 0 only. All ranks return its result or raise its error."""
    if not is_up():
        return work()
    outcome: list[Any] = [None, None]  # [value, None], or [class of the error, its text]
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
    """Raise InputError on all ranks if the ranks hold different values.

    Args:
        what: the name of the value in the error message.
        value: any value that can be pickled.
    """
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
    """Block until all ranks have called this function."""
    if is_up():
        dist.all_reduce(torch.zeros(1))  # not dist.barrier(), which would occupy the GPU


def share_gradients(network: nn.Module, balance: Balance) -> nn.Module:
    """Prepare a network and a balance for several ranks.

    All ranks get the weights of rank 0, and BatchNorm uses the statistics of the global batch.

    Returns:
        A module that maps (objective, batch, noise) to `LossTerms`. Its backward averages gradients
        over ranks while it computes further gradients.
    """
    use_global_batch_norm(network)
    copy_from_first(network)
    copy_from_first(balance)
    # Do not copy buffers from rank 0 at each step: all ranks compute them from the global batch.
    # torch 2.13 renamed this argument.
    known = signature(DistributedDataParallel).parameters
    copies = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    own_buffers: dict[str, Any] = {copies: False}
    return DistributedDataParallel(
        SharedLoss(network, balance),
        init_sync=False,
        static_graph=True,
        gradient_as_bucket_view=True,
        **own_buffers,
    )


@final
class SharedLoss(nn.Module):
    """Network and balance as one module, as DistributedDataParallel needs them."""

    def __init__(self, network: nn.Module, balance: Balance) -> None:
        super().__init__()
        self.network, self.balance = network, balance

    def forward(self, objective: Loss, batch: Tensor, noise: Tensor) -> LossTerms:
        return objective(self.network, self.balance, batch, noise)


@torch.no_grad()
def copy_from_first(module: nn.Module) -> None:
    """Copy rank 0's parameters and buffers to all ranks, in place."""
    for tensor in [*module.parameters(), *module.buffers()]:
        values = tensor.detach().contiguous()
        dist.broadcast(values, 0)
        tensor.copy_(values)


def start_average(*values: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """Start to average scalars over ranks; return a function that waits for the averages."""
    if not is_up():
        return lambda: values
    stacked = torch.stack(values)
    work = dist.all_reduce(stacked, async_op=True)
    assert work is not None

    def averages() -> tuple[Tensor, ...]:
        work.wait()
        return tuple(stacked / ranks())

    return averages


@final
class GlobalBatchNorm(_BatchNorm):
    """A BatchNorm layer that uses the statistics of all ranks in training mode."""

    @classmethod
    def of(cls, layer: _BatchNorm) -> "GlobalBatchNorm":
        """Return a layer that shares parameters, statistics and mode with the given one."""
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
        """Update the running statistics, as torch's layer does."""
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
    """Sum values over ranks. The backward sums the gradients of all ranks.

    The loss of every rank depends on the sum.
    """

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
    """Replace the BatchNorm layers of a module in place; names and parameters stay the same."""
    for name, child in module.named_children():
        if isinstance(child, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            setattr(module, name, GlobalBatchNorm.of(child))
        else:
            use_global_batch_norm(child)
