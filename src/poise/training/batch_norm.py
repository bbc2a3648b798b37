"""BatchNorm over the global batch of several processes, so that N ranks equal one process.

torch.nn.SyncBatchNorm is for CUDA alone; this one runs wherever sums can be reduced. With n_r values of a channel on rank r,
of mean m_r and variance v_r, the ranks sum n_r, n_r m_r and n_r (v_r + m_r^2) in double precision, and

    n = sum n_r,    m = sum n_r m_r / n,    v = sum n_r (v_r + m_r^2) / n - m^2.
"""

from typing import Any, final

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from poise.training.distributed import ranks


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
        scale = (variance + self.eps).rsqrt() if self.weight is None else (variance + self.eps).rsqrt() * self.weight
        column = (-1, *[1] * (input.dim() - 2))
        normalised = (values - mean.to(values.dtype).view(column)) * scale.to(values.dtype).view(column)
        return (normalised if self.bias is None else normalised + self.bias.view(column)).to(input.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics, as torch's layer does."""
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
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
