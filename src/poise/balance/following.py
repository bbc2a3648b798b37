"""gamma2 follows the reconstruction error: computed as a running average, learned, or taken from the batch."""

import math
from typing import Literal, final

import torch
from torch import Tensor, nn

from poise.balance.contract import FLOOR, Balance, BatchMeans, checked_decay, positive
from poise.errors import InputError


@final
class ComputedBalance(Balance):
    """gamma2 is a running average of the reconstruction error (eq. 3): nothing to tune, nothing to learn.

    Args:
        decay: of the running average per batch, in [0, 1). At 0.99 it settles in about 500 batches.
        start: gamma2 before the first batch: a number > 0, or "first-batch" for that batch's own MSE.
        monotone: never let gamma2 grow, as the released code does. This makes it a ratchet: batch noise pushes it below the
            MSE, the more the smaller the batch (docs/replication.md).
        kl_weight, power, floor: see `Balance`.

    Source: Asperti & Trentin 2020, arXiv 2002.07514. Differs from the released code: see `released`.
    """

    started: Tensor

    def __init__(
        self,
        decay: float = 0.99,
        start: float | Literal["first-batch"] = "first-batch",
        monotone: bool = False,
        kl_weight: float = 1.0,
        power: float = 2,
        floor: float = FLOOR,
    ) -> None:
        super().__init__(kl_weight=kl_weight, power=power, floor=floor)
        if isinstance(start, str) and start != "first-batch":
            raise InputError(f'start must be a number > 0 or "first-batch", not {start!r}')
        self.decay = checked_decay(decay)
        self.monotone = monotone
        from_data = isinstance(start, str)
        self.register_buffer("gamma2", torch.tensor(1.0 if from_data else positive("start", start)))
        self.register_buffer("started", torch.tensor(not from_data))

    @classmethod
    def released(cls, image_size: int, latent_dim: int) -> "ComputedBalance":
        """The authors' code exactly: start 1, never growing, KL weighted by (2 image_size / latent_dim)^2.

        The weight, which no text of theirs mentions, is 1 for 32 pixels and 4 for 64, at 64 latents.
        """
        kl_weight = (2 * positive("image_size", image_size) / positive("latent_dim", latent_dim)) ** 2
        return cls(start=1.0, monotone=True, kl_weight=kl_weight)

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        return torch.where(self.started, self.gamma2, batch.error.clamp_min(self.floor)), self.kl_weight

    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor | bool]:
        gamma2, _ = self._factors(batch)
        average = self._average(self.decay, gamma2, batch.error)
        if self.monotone:
            average = torch.minimum(gamma2, average)
        return {"gamma2": average, "started": True}

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

    Source: Dai & Wipf 2019, arXiv 1903.05789, who learn log gamma.
    """

    def __init__(
        self, start: float = 1.0, rate: float = 1.0, kl_weight: float = 1.0, power: float = 2, floor: float = FLOOR
    ) -> None:
        super().__init__(kl_weight=kl_weight, power=power, floor=floor)
        self.rate = positive("rate", rate)
        self.scaled_log_gamma = nn.Parameter(torch.tensor(0.5 * math.log(positive("start", start)) / rate))

    @property
    def gamma2(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._gamma2().detach()

    def _gamma2(self) -> Tensor:
        return (2 * self.rate * self.scaled_log_gamma).exp().clamp_min(self.floor)

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        return self._gamma2(), self.kl_weight

    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor | bool]:
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

    started: Tensor

    def __init__(self, decay: float = 0.99, kl_weight: float = 1.0, power: float = 2, floor: float = FLOOR) -> None:
        super().__init__(kl_weight=kl_weight, power=power, floor=floor)
        self.decay = checked_decay(decay)
        self.register_buffer("gamma2", torch.tensor(1.0))
        self.register_buffer("started", torch.tensor(False))

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        own = batch.error.clamp_min(self.floor)
        return (own if self.training else torch.where(self.started, self.gamma2, own)), self.kl_weight

    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor | bool]:
        previous = torch.where(self.started, self.gamma2, batch.error)
        average = self._average(self.decay, previous, batch.error)
        return {"gamma2": average, "started": True}
