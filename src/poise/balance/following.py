"""gamma2 follows the reconstruction error: computed as a running average, learned, or taken from the batch."""

import math
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from poise.balance.contract import FLOOR, Balance, BatchMeans, checked_decay, positive
from poise.errors import InputError


@final
class ComputedBalance(Balance):
    """gamma2 is a running average of the reconstruction error (eq. 3 and 4): nothing to tune, nothing to learn.

    Args:
        decay: of the running average per batch, in [0, 1). At 0.99 it looks back about 100 batches.
        start: "debiased": gamma2 is the average (eq. 4) of the errors of all earlier batches, without a start of its own;
            "first-batch": it starts at the first batch's error, of which 0.99^500 = 0.7 % are left after 500 batches; a
            number > 0: it starts there. The first batch uses its own error where no number is given.
        monotone: never let gamma2 grow, as the released code does. This makes it a ratchet: batch noise pushes it below the
            MSE, the more the smaller the batch (docs/replication.md).
        kl_weight, power, floor: see `Balance`.

    Source: Asperti & Trentin 2020, arXiv 2002.07514. Differs from the released code: see `released`.
    """

    follows_error = True
    small_start = "start=0.001"

    weight: Tensor  # the sum of the average's weights: 1 - decay^t after t batches if debiased, else 0 or 1

    def __init__(
        self,
        decay: float = 0.99,
        start: float | Literal["debiased", "first-batch"] = "debiased",
        monotone: bool = False,
        kl_weight: float = 1.0,
        power: float = 2,
        floor: float = FLOOR,
    ) -> None:
        super().__init__(kl_weight=kl_weight, power=power, floor=floor)
        from_data = isinstance(start, str)
        if from_data and start not in ("debiased", "first-batch"):
            raise InputError(
                f'start must be a number > 0, "debiased" or "first-batch", not {start!r}'
            )
        self.decay = checked_decay(decay)
        self.debiased = start == "debiased"
        self.monotone = monotone
        self.register_buffer("gamma2", torch.tensor(1.0 if from_data else positive("start", start)))
        self.register_buffer("weight", torch.tensor(0.0 if from_data else 1.0))

    @classmethod
    def released(cls, image_size: int, latent_dim: int) -> "ComputedBalance":
        """The authors' code exactly: start 1, never growing, KL weighted by (2 image_size / latent_dim)^2.

        The weight, which no text of theirs mentions, is 1 for 32 pixels and 4 for 64, at 64 latents.
        """
        kl_weight = (
            2 * positive("image_size", image_size) / positive("latent_dim", latent_dim)
        ) ** 2
        return cls(start=1.0, monotone=True, kl_weight=kl_weight)

    def remedy(self, *, over_regularised: bool) -> str:
        if self.monotone and not over_regularised:
            return "Leave out monotone: gamma2 may then rise to the error again."
        batches = round(5 / (1 - self.decay))
        return (
            "Train longer: gamma2 is a running average of the error, and at "
            f"decay={self.decay:g} takes {batches} batches."
        )

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        return torch.where(
            self.weight > 0, self.gamma2, batch.error.clamp_min(self.floor)
        ), self.kl_weight

    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor | float]:
        gamma2, _ = self._factors(batch)
        weight: Tensor | float = 1.0
        if self.debiased:  # eq. 4
            weight = self.decay * self.weight + (1 - self.decay)
            share = (1 - self.decay) / weight
            average = ((1 - share) * gamma2 + share * batch.error).clamp_min(self.floor)
        else:  # eq. 3
            average = self._average(self.decay, gamma2, batch.error)
        if self.monotone:
            average = torch.minimum(gamma2, average)
        return {"gamma2": average, "weight": weight}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """States before 2026-11-26 hold `started`, and go on as plain averages."""
        if (started := state_dict.pop(f"{prefix}started", None)) is not None:
            state_dict[f"{prefix}weight"] = started.float()
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def extra_repr(self) -> str:
        return f"decay={self.decay:g}, monotone={self.monotone}, {super().extra_repr()}"


@final
class LearnedBalance(Balance):
    """gamma is a parameter, trained with the rest: give `balance.parameters()` to the optimiser.

    Its fixed point is that of the computed balance, gamma2 = MSE, but Adam moves log gamma by about its learning rate a
    step: from 1 to 0.1 takes 23,000 steps at 1e-4.

    Args:
        start: initial gamma2, > 0.
        rate: how many times faster than other parameters log gamma moves under Adam, > 0. 1 is the published method.
        kl_weight, power, floor: see `Balance`.

    A saved state is a gamma: a balance of another rate continues from the same one.

    Source: Dai & Wipf 2019, arXiv 1903.05789, who learn log gamma.
    """

    follows_error = True

    saved_rate: Tensor

    def __init__(
        self,
        start: float = 1.0,
        rate: float = 1.0,
        kl_weight: float = 1.0,
        power: float = 2,
        floor: float = FLOOR,
    ) -> None:
        super().__init__(kl_weight=kl_weight, power=power, floor=floor)
        self.rate = positive("rate", rate)
        self.scaled_log_gamma = nn.Parameter(
            torch.tensor(0.5 * math.log(positive("start", start)) / rate)
        )
        self.register_buffer("saved_rate", torch.tensor(self.rate))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """States before 2026-11-26 do not hold their rate: it counts as this one's."""
        name = f"{prefix}scaled_log_gamma"
        rate = float(state_dict.pop(f"{prefix}saved_rate", self.rate))
        if name in state_dict and not math.isclose(rate, self.rate, rel_tol=1e-6):
            state_dict[name] = state_dict[name] * (rate / self.rate)
        state_dict[f"{prefix}saved_rate"] = torch.tensor(self.rate)
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    @property
    def gamma2(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._gamma2().detach()

    def _gamma2(self) -> Tensor:
        return (2 * self.rate * self.scaled_log_gamma).exp().clamp_min(self.floor)

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        return self._gamma2(), self.kl_weight

    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor | float]:
        return {}


@final
class OptimalBalance(Balance):
    """gamma2 is the batch's own MSE, detached: the gradient is that of (D/2) log MSE + KL.

    As with BatchNorm, training uses the batch's value and evaluation a running average, so that a test image's likelihood
    does not depend on its neighbours.

    Args:
        decay: of the running average used in evaluation mode, in [0, 1).
        kl_weight, power, floor: see `Balance`.

    Source: Rybkin, Daniilidis & Levine 2021, arXiv 2006.13202 ("optimal sigma").
    """

    follows_error = True

    followed: Tensor  # whether a batch has come: not `weight`, lest its states pass for those of ComputedBalance

    def __init__(
        self, decay: float = 0.99, kl_weight: float = 1.0, power: float = 2, floor: float = FLOOR
    ) -> None:
        super().__init__(kl_weight=kl_weight, power=power, floor=floor)
        self.decay = checked_decay(decay)
        self.register_buffer("gamma2", torch.tensor(1.0))
        self.register_buffer("followed", torch.tensor(False))

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        own = batch.error.clamp_min(self.floor)
        return (
            own if self.training else torch.where(self.followed, self.gamma2, own)
        ), self.kl_weight

    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor | float]:
        previous = torch.where(self.followed, self.gamma2, batch.error)
        average = self._average(self.decay, previous, batch.error)
        return {"gamma2": average, "followed": True}

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *rest: Any, **named: Any
    ) -> None:
        """States before 2026-11-26 hold `started`."""
        if (started := state_dict.pop(f"{prefix}started", None)) is not None:
            state_dict[f"{prefix}followed"] = started
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)
