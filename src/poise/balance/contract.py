"""Base class of all balances. Equation numbers refer to `poise.balance`."""

import copy
import math
import warnings
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from poise.balance.inputs import (
    NumDims,
    check_data,
    checked_dims,
    checked_terms,
    positive,
    whole,
)
from poise.balance.kinds import Error, FeatureError, PowerError
from poise.balance.table_error import TableError
from poise.errors import InputError
from poise.latent import gaussian_kl
from poise.shapes import Batch, PerImage
from poise.support.collectives import is_shared, sum_over_ranks
from poise.support.snapshots import in_backward, snapshot

# Faults of training batches that show only in the values. `Balance.doubtful_batches` counts them on
# the device, because a look at values would wait for the device at every step.
FAULTS = {
    "negative": "a negative error. An error is |x - x^|^power; pass nats to combine as nll=",
    "unobserved": "a negative number of dimensions, or an error where num_dims is 0",
    "empty": "no observed value at all: the mask or num_dims was 0 everywhere",
    "binary": "data of 0 and 1 only. A cross-entropy fits them better: pass it to combine as nll=",
}
# In a running average, the error of a batch counts at most this many times the average so far. At
# decay=0.99 one batch then at most doubles it, after some hundred batches. Before, a batch has
# a greater share of the average (docs/balances.md has measurements).
LARGEST_ERROR = 100.0
# A recomputed forward finds the state that it used among this many forwards.
REMEMBERED = 64


class LossTerms(NamedTuple):
    """The loss to minimise and its terms, each a mean over the batch.

    All are scalars, except those per group.

    Attributes:
        loss: reconstruction + kl_weight * kl, in nats per image. Only this field has gradients. In
            a process group, the mean of `loss` over ranks, and so of its gradients, is that of the
            union of their batches.
        reconstruction: -log p(x|z), eq. 1 (eq. 5 for power p) summed over groups, plus `nll`, in
            nats per image, detached.
        kl: KL(q(z|x) || p(z)), unweighted, in nats per image, detached.
        error: mean over images *and* observed dimensions of the balance's error, detached: the MSE
            for the squared error, the mean absolute error for power=1. NaN if nothing was observed.
        group_reconstruction: (groups,), -log p(x|z) of each group, in nats per image, without
            `nll`, detached. Without groups: a scalar.
        group_error: (groups,), `error` of each group. NaN for a group that was not observed.
            Without groups: a scalar.

    Deprecated: `mse` and `group_mse` are the old names of `error` and `group_error`.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    error: Tensor
    group_reconstruction: Tensor
    group_error: Tensor

    @property
    def mse(self) -> Tensor:
        return self.error

    @property
    def group_mse(self) -> Tensor:
        return self.group_error


class BatchMeans(NamedTuple):
    """Means of a batch over all ranks.

    Attributes:
        error: mean over observed dimensions, () or (groups,). 0 if none was observed.
        kl: mean over images, in nats.
        nll: mean over images, in nats. None: there is none.
        num_dims: observed dimensions per image, a mean over images. A tensor is () or (groups,).
        total_dims: observed dimensions of all images, a number or a tensor like `num_dims`.
        share: factor on a rank's own mean loss, so that the mean over ranks is that of the union of
            their batches.
        sums: the sums of errors and of KL on this rank.
    """

    error: Tensor
    kl: Tensor
    nll: Tensor | None
    num_dims: int | Tensor
    total_dims: int | Tensor
    share: Tensor | float
    sums: tuple[Tensor, Tensor]


class Remembered(NamedTuple):
    """Hold what a training step used, so that gradient checkpointing can recompute it.

    Attributes:
        batch, gamma2, kl_weight: as in the step. A recomputation finds its step by `batch.sums`.
    """

    batch: BatchMeans
    gamma2: Tensor
    kl_weight: Tensor | float


class Balance(nn.Module, ABC):
    """A VAE loss that sets the balance of reconstruction and KL.

    Its state is in the buffers of `state_dict`, as in BatchNorm. `forward` and `combine` update
    them in training mode only. `reset_parameters` sets them to their initial values.

    Args:
        kl_weight: factor on the KL term, finite and >= 0. 1 gives the evidence lower bound.
        power: p of the error |x - x^|^p, finite and > 0. 2 is Gaussian, 1 is Laplace.
        floor: minimum of gamma2, finite and > 0. None: relative to the data, see the subclass.
        groups: number of groups of dimensions, each with a gamma2 of its own, >= 1. None: one
            gamma2 for all dimensions.
        per: "channel" makes each index of dimension 1 of the data a group in `forward`: a channel
            of images, a column of tables. None: groups are known to `combine` only.
        process_group: ranks that share one state, a group of torch.distributed. None: all ranks.
            False: each rank has a state of its own.

    Attributes:
        error: the error that gamma2 weighs, |x - x^|^power unless `measuring` has set another.
        gamma2: decoder variance (for power p, the mean of |x - x^|^p), (groups,) or a scalar.
            float32, also under autocast and after `.half()`.
        nonfinite_batches: number of training batches with a NaN or infinite error or KL. They never
            change the state.
        doubtful_batches: numbers of training batches with the faults that `faults` describes.
        data_checked: whether `forward` has looked if the data are 0 and 1 only. It does so in its
            first training batch, unless this is set to True before.
        follows_error: gamma2 follows the reconstruction error, so that it is the training error.
            This and the next three are of the class, for a diagnosis and for early stopping.
        early_stopping: the ELBO of held-out data shows when to stop. False: the balance moves
            towards a fixed target, and the ELBO may be higher on the way than at the target.
        small_start: the option that starts with a small gamma2, as advice against posterior
            collapse. None: a diagnosis recommends `ComputedBalance` instead.
        needs_error: a batch without an observed value leaves the state as it is.
    """

    follows_error: ClassVar[bool] = False
    early_stopping: ClassVar[bool] = True
    small_start: ClassVar[str | None] = None
    needs_error: ClassVar[bool] = False

    gamma2: Tensor
    nonfinite_batches: Tensor
    doubtful_batches: Tensor

    def __init__(
        self,
        *,
        kl_weight: float = 1.0,
        power: float = 2,
        floor: float | None = None,
        groups: int | None = None,
        per: Literal["channel"] | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__()
        if not 0 <= kl_weight < math.inf:
            raise InputError(f"kl_weight must be a finite number >= 0, not {kl_weight}")
        if per not in (None, "channel"):
            raise InputError(f'per must be "channel" or None, not {per!r}')
        if per is not None and groups is None:
            raise InputError('per="channel" needs groups=, the number of channels')
        if not (process_group is None or process_group is False or hasattr(process_group, "rank")):
            raise InputError(
                "process_group must be a group of torch.distributed, None (all ranks) or False "
                f"(no other rank), not {process_group!r}"
            )
        self.kl_weight = kl_weight
        self.power = positive("power", power)
        self.error: Error = PowerError(self.power)
        self.floor = None if floor is None else positive("floor", floor)
        self.groups = None if groups is None else whole("groups", groups)
        self.per = per
        self.process_group: Any = process_group
        self._starts: dict[str, float | Sequence[float]] = {}
        self._steps: deque[Remembered] = deque(maxlen=REMEMBERED)
        self._reported: set[str] = set()
        self.data_checked = False
        self._buffer("nonfinite_batches", 0)
        self._buffer("doubtful_batches", 0, (len(FAULTS),))

    def _buffer(
        self, name: str, start: float | Sequence[float], shape: tuple[int, ...] | None = None
    ) -> None:
        """Register a buffer that `reset_parameters` sets to `start`; by default one per group."""
        if shape is None:
            shape = () if self.groups is None else (self.groups,)
        self._starts[name] = start
        self.register_buffer(name, torch.tensor(start).expand(shape).clone())

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Set the state to its initial value. Call it after `to_empty` of a meta module."""
        for name, start in self._starts.items():
            getattr(self, name).copy_(torch.tensor(start))
        self._steps.clear()
        if isinstance(self.error, FeatureError):
            self.error.reset_parameters()

    def measuring(self, error: Error) -> "Balance":
        """Measure another error from now on, and return this balance.

        Args:
            error: an error of `poise.balance.kinds`. Its groups must be those of the balance.

        Raises:
            InputError: the balance has other groups, or a power that is not the error's.
        """
        if error.groups is not None and (self.groups != error.groups or self.per is not None):
            raise InputError(
                f"the error {error.name} has {error.groups} groups, but the balance has "
                f"{self.groups or 1}: construct a balance that takes groups={error.groups}, "
                "such as computed"
            )
        if self.power not in (2, error.power):
            raise InputError(
                f"the balance has power={self.power:g}, but the error {error.name} has power "
                f"{error.power:g}: leave out one of the two"
            )
        self.error, self.power = error, error.power
        return self

    def remedy(self, *, over_regularised: bool) -> str | None:
        """Return advice if the KL weighs too much or too little under this balance.

        Args:
            over_regularised: True if the KL weighs too much, False if it weighs too little.

        Returns:
            A sentence for a diagnosis, or None if this balance has no advice of its own.
        """
        return None

    def faults(self) -> dict[str, str]:
        """Return a sentence for each kind of fault in the training batches so far.

        This waits for the device. `repr`, `state_dict` and `poise.diagnose` call it.
        """
        if self.doubtful_batches.is_meta:
            return {}
        counts = dict(zip(FAULTS, self.doubtful_batches.tolist(), strict=True))
        return {
            name: f"{count} training batches had {FAULTS[name]}."
            if name != "binary"
            else f"The first training batch had {FAULTS[name]}."
            for name, count in counts.items()
            if count > 0
        }

    @abstractmethod
    def _factors(self, batch: BatchMeans) -> tuple[Tensor, Tensor | float]:
        """Return gamma2 and kl_weight for this batch."""

    @abstractmethod
    def _next_state(self, batch: BatchMeans, gamma2: Tensor) -> dict[str, Tensor]:
        """Return the new values of the buffers after this batch, by name.

        Args:
            batch: the batch.
            gamma2: the gamma2 of this step, from `_factors`.
        """

    def forward(
        self,
        reconstruction: Batch,
        target: Batch,
        mean: Batch,
        logvar: Batch,
        *,
        mask: Tensor | None = None,
        samples: int | None = None,
    ) -> LossTerms:
        """Return the loss of a batch for a Gaussian posterior and the error |x - x^|^power.

        Pass `mask` if the data have padding or missing values. Otherwise these count as data. Zeros
        in both arguments count as perfect reconstructions, and gamma2 is too small.

        Args:
            reconstruction, target: (n, ...), of the same shape, floating point. Any range; images
                are usually in [0, 1].
            mean, logvar: (n, ...), of the same shape. logvar is the log *variance* of the
                posterior. The KL is summed over all dimensions but the first.
            mask: True or 1 for observed values, False or 0 for others, which do not count. Numbers
                between weigh a value. (n, ...), with the sizes of `target` or 1. Dimensions that it
                lacks at the end are those it does not depend on: (n, time) for (n, time, features).
                `target` may be NaN where the mask is 0.
            samples: number K of posterior samples per item. `reconstruction` is then (n, K, ...),
                and the error is the mean over samples. The KL counts once per item.

        Raises:
            InputError: the shapes differ (broadcasting would silently give a wrong loss), the
                values are integers, the batch is empty, or `target` repeats each item along
                dimension 1 as if for several samples, but `samples` is not given.

        Example:
            >>> balance = poise.ComputedBalance()
            >>> images, mean, logvar = torch.rand(8, 3, 4, 4), torch.zeros(8, 2), torch.zeros(8, 2)
            >>> terms = balance(torch.full_like(images, 0.5), images, mean, logvar)
            >>> float(terms.kl)
            0.0
        """
        error, num_dims = self.errors(reconstruction, target, mask=mask, samples=samples)
        if mean.shape != logvar.shape or mean.dim() < 2 or len(mean) != len(target):
            raise InputError(
                f"mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)} must agree in "
                f"shape, (n, ...), with {len(target)} rows"
            )
        of_rows = isinstance(self.error, TableError)  # one-hot values are categories
        looks = self.training and not (self.data_checked or of_rows)
        if looks and not torch.compiler.is_compiling():
            self._look_at(target)
        kl = gaussian_kl(mean, logvar)
        if isinstance(self.error, TableError):
            nll = self.error.nats(reconstruction, target)
            if self.error.numeric == 0:
                return self.combine(None, kl, nll=nll)
            return self.combine(error, kl, num_dims, nll=nll)
        return self.combine(error, kl, num_dims, samples=samples)

    if TYPE_CHECKING:  # for checkers of types: a call of a plain Module returns Any

        def __call__(
            self,
            reconstruction: Batch,
            target: Batch,
            mean: Batch,
            logvar: Batch,
            *,
            mask: Tensor | None = None,
            samples: int | None = None,
        ) -> LossTerms: ...

    def errors(
        self,
        reconstruction: Batch,
        target: Batch,
        *,
        mask: Tensor | None = None,
        samples: int | None = None,
    ) -> tuple[Batch, int | Tensor]:
        """Return the error of each image and the number of its dimensions.

        They are the first and third argument of `combine`. Computed in float32 or better.

        Args:
            reconstruction, target, mask, samples: as in `forward`.

        Returns:
            The error summed over dimensions: (n,), or (n, groups) with `per`; with `samples` K,
            (n, K) or (n, K, groups). And the number of dimensions that each sum is over, or, with
            a mask, the number of those observed: (n,), (n, 1) or (n, groups).

        Raises:
            InputError: see `forward`.
        """
        own_groups = self.error.groups is not None
        check_data(reconstruction, target, samples, None if own_groups else self.groups, self.per)
        return self.error(
            reconstruction, target, per_group=self.per is not None, mask=mask, samples=samples
        )

    @torch.no_grad()
    def _look_at(self, target: Tensor) -> None:
        """Count a first batch of 0 and 1 only. Only the first, because it reads all values."""
        self.data_checked = True
        binary = ((target == 0) | (target == 1)).all() & (target.amin() < target.amax())
        self.doubtful_batches[list(FAULTS).index("binary")].add_(binary)

    def combine(
        self,
        error: Batch | None,
        kl: PerImage,
        num_dims: NumDims | None = None,
        *,
        nll: Batch | None = None,
        samples: int | None = None,
    ) -> LossTerms:
        """Return the loss of a batch, given the error and KL of each image.

        Leave padding and missing values out of `error` *and* `num_dims`. Zeros in padding would
        count as perfect reconstructions, and gamma2 would be too small.

        Use it for a posterior or likelihood that `forward` does not know. `error` is what gamma2
        weighs. A negative log-likelihood in nats, such as a cross-entropy, is `nll`. In training
        mode it updates the state.

        Args:
            error: (n,), the error |x - x^|^power of each image, summed over its dimensions; with
                `groups`, (n, groups). None: there is only `nll`.
            kl: (n,), the KL of each image in nats, summed over its latents.
            num_dims: the number of dimensions that `error` is summed over, >= 1. It broadcasts
                against `error`: a number, (n,) or, with groups, (groups,), (n, 1) or (n, groups).
                In a tensor, 0 means not observed.
            nll: (n,), negative log-likelihood of further data in nats, summed over its dimensions.
                It is added to the loss as it is.
            samples: number K of posterior samples per item. `error` is then (n, K) or
                (n, K, groups), `nll` (n, K), and both are averaged over samples.

        Raises:
            InputError: a shape is wrong, the batch is empty, or `num_dims` is missing.

        Example:
            >>> balance, kl = poise.ComputedBalance(groups=2), torch.zeros(8)
            >>> pixels, features = torch.rand(8) * 3072, torch.rand(8) * 512
            >>> error = torch.stack([pixels, features], dim=1)
            >>> terms = balance.combine(error, kl, num_dims=[3072, 512])
            >>> balance.gamma2.shape
            torch.Size([2])
        """
        if error is None and num_dims is not None:
            raise InputError("num_dims counts the dimensions of error, but error is None")
        only_nats = error is None
        error, kl, nll = checked_terms(error, kl, nll, samples, self.groups)
        dims = torch.zeros_like(error) if only_nats else checked_dims(error, num_dims, self.groups)
        self._restore_precision()
        recomputed = self.training and in_backward()
        batch = self._batch_means(error, kl, nll, dims, alone=recomputed or not self.training)
        gamma2, kl_weight = self._factors(batch)
        gamma2 = snapshot(gamma2)
        kl_weight = snapshot(kl_weight) if isinstance(kl_weight, Tensor) else kl_weight
        if recomputed:
            batch, gamma2, kl_weight = self._recall(batch, gamma2, kl_weight)
        elif self.training:
            self._update_state(batch, gamma2)
            if not only_nats:
                self._count_faults(error, dims)
            if not torch.compiler.is_compiling():
                used = gamma2.detach() if gamma2.requires_grad else gamma2
                self._steps.append(Remembered(batch, used, kl_weight))
        scale, log_scale = scale_and_nats(gamma2, self.power)
        normaliser = dims * log_scale
        of_all = normaliser if isinstance(batch.num_dims, int) else batch.num_dims * log_scale
        nats_of_groups = batch.error * batch.num_dims / scale + of_all
        learned = None
        if gamma2.requires_grad and isinstance(batch.share, Tensor):
            # Its gradient comes from the errors of all ranks, because nobody averages gradients of
            # a balance beside DDP. The term is 0.
            learned = nats_of_groups.sum() - nats_of_groups.sum().detach()
            scale, normaliser = scale.detach(), normaliser.detach()
        nats = error / scale + normaliser
        if self.groups is not None:
            nats = nats.sum(1)
        nats = nats + scaled(kl_weight, kl)
        loss = scaled(batch.share, (nats if nll is None else nats + nll).mean())
        if learned is not None:
            loss = loss + learned
        nats_of_groups = nats_of_groups.detach()
        reconstruction = nats_of_groups if self.groups is None else nats_of_groups.sum()
        if batch.nll is not None:
            reconstruction = reconstruction + batch.nll
        error_of_groups, mse = batch.error, batch.error
        if isinstance(batch.total_dims, Tensor):
            error_of_groups = mse = torch.where(batch.total_dims > 0, batch.error, math.nan)
        if self.groups is not None:
            whole = (
                batch.total_dims if isinstance(batch.total_dims, Tensor) else torch.ones_like(mse)
            )
            mse = (batch.error * whole).sum() / whole.sum()
        return LossTerms(loss, reconstruction, batch.kl, mse, nats_of_groups, error_of_groups)

    @torch.no_grad()
    def _batch_means(
        self, error: Tensor, kl: Tensor, nll: Tensor | None, dims: int | Tensor, *, alone: bool
    ) -> BatchMeans:
        items, kls = len(error), kl.sum()
        errors = error.sum() if self.groups is None else error.sum(0)
        sums = (errors, kls)
        communicates = not alone and is_shared(self.process_group)
        if isinstance(dims, int) and not communicates:
            mean_nll = None if nll is None else nll.sum() / items
            count = items * dims
            return BatchMeans(errors / count, kls / items, mean_nll, dims, count, 1.0, sums)
        # Made on the device, without a copy from the host.
        total = own = torch.full_like(kls, items)
        if isinstance(dims, int):
            dims = torch.full_like(errors, dims)
        counts = dims.expand(error.shape).sum(0)
        nlls = torch.zeros_like(kls) if nll is None else nll.sum()
        share: Tensor | float = 1.0
        if communicates:
            parts = [errors.reshape(-1), counts.reshape(-1), torch.stack([kls, nlls, own])]
            together = torch.cat(parts)
            group = self.process_group or None
            sum_over_ranks(together, group)
            *split, rest = together.split([errors.numel(), errors.numel(), 3])
            errors, counts = (part.reshape(errors.shape) for part in split)
            kls, nlls, total = rest.unbind()
            share = dist.get_world_size(group) * own / total
        mean = errors / counts.clamp_min(torch.finfo(counts.dtype).tiny)
        mean_nll = None if nll is None else nlls / total
        return BatchMeans(mean, kls / total, mean_nll, counts / total, counts, share, sums)

    @torch.no_grad()
    def _update_state(self, batch: BatchMeans, gamma2: Tensor) -> None:
        total = batch.error + batch.kl if batch.nll is None else batch.error + batch.kl + batch.nll
        finite = total - total == 0  # half the cost of isfinite
        if self.groups is not None:
            finite = finite.all()
        usable = finite
        if self.needs_error and isinstance(batch.total_dims, Tensor):
            usable = finite & (batch.total_dims > 0)
        for name, value in self._next_state(batch, gamma2).items():
            buffer = self._buffers[name]
            assert buffer is not None
            torch.where(usable, value.to(buffer.dtype), buffer, out=buffer)
        self.nonfinite_batches += ~finite

    @torch.no_grad()
    def _count_faults(self, error: Tensor, dims: int | Tensor) -> None:
        if isinstance(dims, int):
            self.doubtful_batches[0].add_((error < 0).any())
            return
        dims = dims.expand(error.shape)
        unobserved = (dims < 0) | ((dims == 0) & (error != 0))
        found = [(error < 0).any(), unobserved.any(), (dims == 0).all()]
        self.doubtful_batches[:3].add_(torch.stack(found))

    def _recall(
        self, batch: BatchMeans, gamma2: Tensor, kl_weight: Tensor | float
    ) -> tuple[BatchMeans, Tensor, Tensor | float]:
        """Return the means over ranks, gamma2 and kl_weight of the step that is recomputed.

        It is the remembered step with the nearest sums, the last of equal ones, found without a
        look at values.
        """
        steps = list(reversed(self._steps))
        if not steps:
            return batch, gamma2, kl_weight
        errors, kls = batch.sums
        sums = [step.batch.sums for step in steps]
        apart = [(errors - of_step[0]).abs().sum() + (kls - of_step[1]).abs() for of_step in sums]
        index = torch.stack(apart).argmin(0, keepdim=True)

        def recalled(of_step: Callable[[Remembered], Any]) -> Any:
            values = [of_step(step) for step in steps]
            if not isinstance(values[0], Tensor):
                return values[0]
            return torch.stack(values).index_select(0, index).squeeze(0)  # [index] would wait

        if not gamma2.requires_grad:  # else it is a parameter, which only the optimizer updates
            gamma2 = recalled(lambda step: step.gamma2)
        if isinstance(steps[0].batch.share, Tensor):  # the means were those over ranks
            batch = batch._replace(
                error=recalled(lambda step: step.batch.error),
                num_dims=recalled(lambda step: step.batch.num_dims),
                share=recalled(lambda step: step.batch.share),
            )
        return batch, gamma2, recalled(lambda step: step.kl_weight)

    def _restore_precision(self) -> None:
        """Make buffers float32 again after something converted them in place, as FSDP1 does."""
        if torch.compiler.is_compiling():
            return
        for buffer in self._buffers.values():
            if buffer is not None and too_coarse(buffer):
                buffer.data = buffer.float()

    def _apply(self, fn, recurse: bool = True):
        """Move the state between devices, but never below float32.

        Half precision cannot represent gamma2 or its update.
        """

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if too_coarse(moved) else moved

        self._steps.clear()  # they are on the earlier device
        return super()._apply(keep_precision, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """Load a state, also one saved before 2026-11-27, which lacks `doubtful_batches`."""
        state_dict.setdefault(f"{prefix}doubtful_batches", torch.zeros(len(FAULTS)))
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def _save_to_state_dict(self, *arguments: Any, **named: Any) -> None:
        """Save the state, and warn once of each kind of fault in the training batches so far."""
        super()._save_to_state_dict(*arguments, **named)
        for name, sentence in self.faults().items():
            if name not in self._reported:
                self._reported.add(name)
                warnings.warn(f"{type(self).__name__}: {sentence}", stacklevel=2)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_steps": deque(maxlen=REMEMBERED)}

    def __deepcopy__(self, memo: dict[int, Any]) -> "Balance":
        """Copy the balance. The copy has the same process group, which cannot be copied."""
        memo[id(self.process_group)] = self.process_group
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        for name, value in copy.deepcopy(self.__getstate__(), memo).items():
            object.__setattr__(copied, name, value)
        return copied

    def extra_repr(self) -> str:
        groups = "" if self.groups is None else f", groups={self.groups}"
        per = "" if self.per is None else f', per="{self.per}"'
        faults = "".join(f"\n{sentence}" for sentence in self.faults().values())
        return f"kl_weight={self.kl_weight:g}, power={self.power:g}{groups}{per}{faults}"


def negative_log_likelihood(
    error: Tensor, gamma2: Tensor, num_dims: int | Tensor, *, power: float = 2
) -> Tensor:
    """Return -log p(x|z) of each image, summed over its dimensions, in nats (eq. 5).

    For power 2 this is eq. 1.

    Args:
        error: any shape, |x - x^|^power summed over `num_dims` dimensions.
        gamma2: decoder variance (for power p, the mean of |x - x^|^p), > 0: a scalar, or (groups,)
            for an error (n, groups).
        num_dims: D, the number of dimensions: a number, or a tensor that broadcasts against
            `error`.
        power: p, > 0.

    Returns:
        A tensor of the shape of `error`. With groups, sum it over the last dimension.
    """
    scale, nats = scale_and_nats(gamma2, power)
    return error / scale + num_dims * nats


def scale_and_nats(gamma2: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """Return the divisor of the error in eq. 5 and the term added to it for each dimension.

    They are p m, and log(2 Gamma(1 + 1/p)) + log(p m) / p.
    """
    scale = power * gamma2
    return scale, math.log(2) + math.lgamma(1 + 1 / power) + scale.log() / power


def scaled(factor: Tensor | float, values: Tensor) -> Tensor:
    """Return factor * values, without a kernel launch if the factor is the number 1.

    In small networks every operation costs measurable time.
    """
    return values if isinstance(factor, float) and factor == 1 else factor * values


def too_coarse(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize < 4
