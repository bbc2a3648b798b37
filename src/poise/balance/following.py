"""Balances with a gamma2 that follows the reconstruction error.

gamma2 is a running average (`ComputedBalance`), a learned parameter (`LearnedBalance`) or the MSE
of the batch (`OptimalBalance`). Equation numbers refer to `poise.balance`.
"""

import math
from abc import ABC
from typing import Any, ClassVar, Literal, final

import torch
from torch import Tensor, nn

from poise.balance.contract import (
    LARGEST_ERROR,
    Balance,
    BatchMeans,
)
from poise.balance.inputs import at_least_float32, checked_decay, positive
from poise.errors import InputError

# Default minimum of gamma2, as a share of the first error. Errors of 1e-6 of the data's size are
# about ten times float32's rounding error; their squares are 1e-12 of the data's.
RELATIVE_FLOOR = 1e-12
# Stands for an error of exactly 0 as long as no other is known.
SMALLEST = 1e-30


class FollowingBalance(Balance, ABC):
    """A balance whose gamma2 follows the error of each group.

    Attributes:
        reference: first error of each group that is not 0, the scale of the data. 0: none yet.
    """

    follows_error: ClassVar[bool] = True
    needs_error: ClassVar[bool] = True

    reference: Tensor

    def _first_error(self, batch: BatchMeans) -> Tensor:
        return torch.where(self.reference > 0, self.reference, batch.error)

    def _at_least_floor(self, gamma2: Tensor, reference: Tensor) -> Tensor:
        if self.floor is not None:
            return gamma2.clamp_min(self.floor)
        return torch.maximum(gamma2, RELATIVE_FLOOR * reference).clamp_min(SMALLEST)


class AveragingBalance(FollowingBalance, ABC):
    """A balance with a running average of the error of each group (eq. 6).

    Its state is gamma2 and the weight of the average relative to `count`, so that with equal counts
    the numbers are those of eq. 3 and 4.

    Attributes:
        count: observed dimensions of the last batch, (groups,) or a scalar. 0: none yet.
    """

    decay: float
    count: Tensor

    debiased: bool = False
    _from_data: bool = True  # the first batch is its own gamma2

    def _own_error(self, batch: BatchMeans) -> Tensor:
        """Return the error of the batch as its own gamma2, as long as no earlier one is known."""
        return batch.error.clamp_min(SMALLEST if self.floor is None else self.floor)

    def _next_average(
        self, batch: BatchMeans, gamma2: Tensor, weight: Tensor
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the new gamma2, count and reference, and the new weight."""
        known = self.reference > 0
        reference = torch.where(known, self.reference, batch.error)
        error = torch.minimum(batch.error, LARGEST_ERROR * gamma2)
        if not self._from_data:  # the start says nothing about the data
            error = torch.where(known, error, batch.error)
        count = batch.total_dims
        # In the dtype of the state, so that one and several processes round the weights alike.
        count = (
            count.to(self.count.dtype)
            if isinstance(count, Tensor)
            else torch.full_like(self.count, count)
        )
        earlier = weight * (torch.where(self.count > 0, self.count, count) / count)
        weight = self.decay * earlier + (1 - self.decay)
        share = (1 - self.decay) / weight
        # The same number, but where decay is near 0 the second is more exact.
        kept = 1 - share if self.debiased else self.decay * earlier / weight
        average = self._at_least_floor(kept * gamma2 + share * error, reference)
        return {"gamma2": average, "count": count, "reference": reference}, weight

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """Load a state, also one saved before 2026-11-27, which lacks `reference` and `count`."""
        gamma2 = state_dict.get(f"{prefix}gamma2")
        if gamma2 is not None and f"{prefix}reference" not in state_dict:
            weight = state_dict.get(f"{prefix}weight", state_dict.get(f"{prefix}followed"))
            known = torch.ones_like(gamma2) if weight is None else weight > 0
            state_dict[f"{prefix}reference"] = torch.where(known > 0, gamma2, 0.0)
            state_dict[f"{prefix}count"] = torch.zeros_like(gamma2)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)


@final
class ComputedBalance(AveragingBalance):
    """Compute gamma2 as a running average of the reconstruction error (eq. 3 and 4).

    It has no hyperparameter to tune and no parameter to learn.

    Args:
        decay: decay of the running average per batch, in [0, 1). 0.99 averages over about 100
            batches.
        start: initial value of gamma2.
            "debiased": no initial value; gamma2 is the bias-corrected average of eq. 4.
            "first-batch": the error of the first batch, of which 0.99^500 = 0.7 % are left after
            500 batches.
            A number > 0: that value, for every group.
            Without a number, the first batch uses its own error.
        monotone: never let gamma2 grow, as in the released code. Batch noise then pushes gamma2
            below the MSE, more so with small batches (docs/replication.md).
        floor: minimum of gamma2, > 0. None: 1e-12 times the first error of the group.
        kl_weight, power, groups, per, process_group: see `Balance`.

    Raises:
        InputError: a value is out of range.

    Source: Asperti & Trentin 2020, arXiv 2002.07514. `released` is the authors' variant.

    Example:
        >>> balance = poise.ComputedBalance(decay=0.9)
        >>> images, codes = torch.full((8, 3, 4, 4), 0.5), torch.zeros(8, 2)
        >>> terms = balance(torch.zeros_like(images), images, codes, codes)
        >>> balance.gamma2
        tensor(0.2500)
    """

    small_start = "start=0.001"

    # Sum of the weights in the average, in units of 1 / (dimensions of the last batch): with equal
    # batches, 1 - decay^t after t of them if debiased, else 1.
    weight: Tensor

    def __init__(
        self,
        decay: float = 0.99,
        start: float | Literal["debiased", "first-batch"] = "debiased",
        monotone: bool = False,
        kl_weight: float = 1.0,
        power: float = 2,
        floor: float | None = None,
        groups: int | None = None,
        per: Literal["channel"] | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            kl_weight=kl_weight,
            power=power,
            floor=floor,
            groups=groups,
            per=per,
            process_group=process_group,
        )
        self._from_data = isinstance(start, str)
        if self._from_data and start not in ("debiased", "first-batch"):
            raise InputError(
                f'start must be a number > 0, "debiased" or "first-batch", not {start!r}'
            )
        self.decay = checked_decay(decay)
        self.debiased = start == "debiased"
        self.monotone = monotone
        self._buffer("gamma2", 1.0 if isinstance(start, str) else positive("start", start))
        self._buffer("weight", 0.0 if self.debiased else 1.0)
        self._buffer("count", 0.0)
        self._buffer("reference", 0.0)

    @classmethod
    def released(cls, image_size: float, latent_dim: float) -> "ComputedBalance":
        """Return the balance of the authors' released code.

        gamma2 starts at 1 and never grows. The KL weight is (2 image_size / latent_dim)^2. At 64
        latents that is 1 for 32 pixels and 4 for 64. The paper does not mention this weight.

        Args:
            image_size: side of the images in pixels, > 0.
            latent_dim: number of latents, > 0.

        Raises:
            InputError: a value is not a finite number > 0.
        """
        kl_weight = (
            2 * positive("image_size", image_size) / positive("latent_dim", latent_dim)
        ) ** 2
        return cls(start=1.0, monotone=True, kl_weight=kl_weight)

    def remedy(self, *, over_regularised: bool) -> str:
        if self.monotone and not over_regularised:
            return (
                "Use the balance computed without monotone: gamma2 may then rise to the error "
                "again."
            )
        batches = round(5 / (1 - self.decay))
        return (
            "Train longer: gamma2 is a running average of the error. At "
            f"decay={self.decay:g} it needs {batches} batches to settle."
        )

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        gamma2 = self.gamma2
        if self._from_data:
            gamma2 = torch.where(self.reference > 0, gamma2, self._own_error(batch))
        return gamma2, self.kl_weight

    def _next_state(self, batch: BatchMeans, gamma2: Tensor) -> dict[str, Tensor]:
        state, weight = self._next_average(batch, gamma2, self.weight)
        if self.monotone:
            state["gamma2"] = torch.minimum(gamma2, state["gamma2"])
        return {**state, "weight": weight}  # dynamo of PyTorch 2.7 cannot trace "|"

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """Load a state, also one saved before 2026-11-26.

        Such states hold `started` in place of `weight`. They continue as a plain average (eq. 3).
        """
        if (started := state_dict.pop(f"{prefix}started", None)) is not None:
            state_dict[f"{prefix}weight"] = started.float()
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def extra_repr(self) -> str:
        return f"decay={self.decay:g}, monotone={self.monotone}, {super().extra_repr()}"


@final
class LearnedBalance(FollowingBalance):
    """Learn gamma by gradient descent: pass `balance.parameters()` to the optimiser.

    Its fixed point is that of the computed balance, gamma2 = MSE. But Adam moves log gamma by about
    its learning rate per step: from 1 to 0.1 takes 23,000 steps at 1e-4.

    A saved state holds the value of gamma, so that a balance with another rate continues from it.

    Args:
        start: initial gamma2, > 0.
        rate: factor on the learning rate of log gamma under Adam, > 0. 1 is the published method.
        floor: minimum of gamma2, > 0. None: 1e-12 times the first error of the group.
        kl_weight, power, groups, per, process_group: see `Balance`.

    Raises:
        InputError: a value is out of range.

    Source: Dai & Wipf 2019, arXiv 1903.05789, who learn log gamma.
    """

    saved_rate: Tensor

    def __init__(
        self,
        start: float = 1.0,
        rate: float = 1.0,
        kl_weight: float = 1.0,
        power: float = 2,
        floor: float | None = None,
        groups: int | None = None,
        per: Literal["channel"] | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            kl_weight=kl_weight,
            power=power,
            floor=floor,
            groups=groups,
            per=per,
            process_group=process_group,
        )
        self.rate = positive("rate", rate)
        self.start = positive("start", start)
        # Never a scalar, which fully_shard refuses.
        self.scaled_log_gamma = nn.Parameter(torch.empty(groups or 1))
        self._buffer("saved_rate", self.rate, ())
        self._buffer("reference", 0.0)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.scaled_log_gamma.fill_(0.5 * math.log(self.start) / self.rate)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """Load a state, and convert the parameter if it was saved at another rate.

        States saved before 2026-11-26 hold no rate. They are taken to have this balance's rate.
        Those saved before 2026-11-27 hold a scalar parameter and no `reference`.
        """
        name = f"{prefix}scaled_log_gamma"
        rate = float(state_dict.pop(f"{prefix}saved_rate", self.rate))
        if name in state_dict:
            if state_dict[name].dim() == 0:
                state_dict[name] = state_dict[name].reshape(1)
            if not math.isclose(rate, self.rate, rel_tol=1e-6):
                state_dict[name] = state_dict[name] * (rate / self.rate)
            state_dict.setdefault(f"{prefix}reference", torch.zeros_like(self.reference))
        state_dict[f"{prefix}saved_rate"] = torch.tensor(self.rate)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    @property
    def gamma2(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._gamma2(self.scaled_log_gamma.detach())

    def _gamma2(self, parameter: Tensor) -> Tensor:
        whole = getattr(parameter, "full_tensor", None)
        if whole is not None:  # by fully_shard, outside its forward
            parameter = whole()
        log_gamma2 = 2 * self.rate * at_least_float32(parameter)
        if self.groups is None:
            log_gamma2 = log_gamma2.squeeze(0)
        if self.floor is None:
            least = (RELATIVE_FLOOR * self.reference).log()
        else:
            least = torch.full_like(self.reference, math.log(self.floor))
        return ClampedBelow.apply(log_gamma2, least).exp()

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        return self._gamma2(self.scaled_log_gamma), self.kl_weight

    def _next_state(self, batch: BatchMeans, gamma2: Tensor) -> dict[str, Tensor]:
        return {"reference": self._first_error(batch)}


class ClampedBelow(torch.autograd.Function):
    """Clamp values from below, but let through the gradients that raise them.

    With `clamp_min`, a value below the minimum would have no gradient and stay there for ever.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, least: Tensor) -> Tensor:
        ctx.save_for_backward(values < least)
        return torch.maximum(values, least)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (below,) = ctx.saved_tensors
        return torch.where(below, gradients[0].clamp_max(0.0), gradients[0]), None


@final
class OptimalBalance(AveragingBalance):
    """Set gamma2 to the detached MSE of the batch.

    The gradient is that of (D/2) log MSE + KL. As in BatchNorm, training uses the value of the
    batch, and evaluation uses a running average. So the likelihood of a test image does not depend
    on the other images of its batch.

    Args:
        decay: decay of the running average for evaluation mode, in [0, 1).
        floor: minimum of gamma2, > 0. None: 1e-12 times the first error of the group.
        kl_weight, power, groups, per, process_group: see `Balance`.

    Raises:
        InputError: a value is out of range.

    Source: Rybkin, Daniilidis & Levine 2021, arXiv 2006.13202 ("optimal sigma").
    """

    # Weight of the average. Named unlike `ComputedBalance.weight`, so that the state of one does
    # not load into the other.
    followed: Tensor

    def __init__(
        self,
        decay: float = 0.99,
        kl_weight: float = 1.0,
        power: float = 2,
        floor: float | None = None,
        groups: int | None = None,
        per: Literal["channel"] | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(
            kl_weight=kl_weight,
            power=power,
            floor=floor,
            groups=groups,
            per=per,
            process_group=process_group,
        )
        self.decay = checked_decay(decay)
        self._buffer("gamma2", 1.0)
        self._buffer("followed", 1.0)
        self._buffer("count", 0.0)
        self._buffer("reference", 0.0)

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        if self.training:
            return self._at_least_floor(batch.error, self._first_error(batch)), self.kl_weight
        return self._average_so_far(batch), self.kl_weight

    def _average_so_far(self, batch: BatchMeans) -> Tensor:
        return torch.where(self.reference > 0, self.gamma2, self._own_error(batch))

    def _next_state(self, batch: BatchMeans, gamma2: Tensor) -> dict[str, Tensor]:
        state, weight = self._next_average(batch, self._average_so_far(batch), self.followed)
        return {**state, "followed": weight}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """Load a state. Those saved before 2026-11-26 hold `started` in place of `followed`."""
        if (started := state_dict.pop(f"{prefix}started", None)) is not None:
            state_dict[f"{prefix}followed"] = started.float()
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)
