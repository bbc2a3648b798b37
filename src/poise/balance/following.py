"""Balances with a gamma2 that follows the reconstruction error.

gamma2 is a running average (`ComputedBalance`), a learned parameter (`LearnedBalance`) or the MSE
of the batch (`OptimalBalance`). Equation numbers refer to `poise.balance`.
"""

import math
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from poise.balance.contract import FLOOR, Balance, BatchMeans, checked_decay, positive
from poise.errors import InputError


@final
class ComputedBalance(Balance):
    """Compute gamma2 as a running average of the reconstruction error (eq. 3 and 4).

    It has no hyperparameter to tune and no parameter to learn.

    Args:
        decay: decay of the running average per batch, in [0, 1). 0.99 averages over about 100
            batches.
        start: initial value of gamma2.
            "debiased": no initial value; gamma2 is the bias-corrected average of eq. 4.
            "first-batch": the error of the first batch, of which 0.99^500 = 0.7 % are left after
            500 batches.
            A number > 0: that value.
            Without a number, the first batch uses its own error.
        monotone: never let gamma2 grow, as in the released code. Batch noise then pushes gamma2
            below the MSE, more so with small batches (docs/replication.md).
        kl_weight, power, floor: see `Balance`.

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

    follows_error = True
    small_start = "start=0.001"

    # Sum of the weights in the average: 1 - decay^t after t batches if debiased, else 0 or 1.
    weight: Tensor

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
            return "Leave out monotone: gamma2 may then rise to the error again."
        batches = round(5 / (1 - self.decay))
        return (
            "Train longer: gamma2 is a running average of the error. At "
            f"decay={self.decay:g} it needs {batches} batches to settle."
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
        """Load a state, also one saved before 2026-11-26.

        Such states hold `started` in place of `weight`. They continue as a plain average (eq. 3).
        """
        if (started := state_dict.pop(f"{prefix}started", None)) is not None:
            state_dict[f"{prefix}weight"] = started.float()
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)

    def extra_repr(self) -> str:
        return f"decay={self.decay:g}, monotone={self.monotone}, {super().extra_repr()}"


@final
class LearnedBalance(Balance):
    """Learn gamma by gradient descent: pass `balance.parameters()` to the optimiser.

    Its fixed point is that of the computed balance, gamma2 = MSE. But Adam moves log gamma by about
    its learning rate per step: from 1 to 0.1 takes 23,000 steps at 1e-4.

    A saved state holds the value of gamma, so that a balance with another rate continues from it.

    Args:
        start: initial gamma2, > 0.
        rate: factor on the learning rate of log gamma under Adam, > 0. 1 is the published method.
        kl_weight, power, floor: see `Balance`.

    Raises:
        InputError: a value is out of range.

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
        """Load a state, and convert the parameter if it was saved at another rate.

        States saved before 2026-11-26 hold no rate. They are taken to have this balance's rate.
        """
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
    """Set gamma2 to the detached MSE of the batch.

    The gradient is that of (D/2) log MSE + KL. As in BatchNorm, training uses the value of the
    batch, and evaluation uses a running average. So the likelihood of a test image does not depend
    on the other images of its batch.

    Args:
        decay: decay of the running average for evaluation mode, in [0, 1).
        kl_weight, power, floor: see `Balance`.

    Raises:
        InputError: a value is out of range.

    Source: Rybkin, Daniilidis & Levine 2021, arXiv 2006.13202 ("optimal sigma").
    """

    follows_error = True

    # Whether gamma2 has seen a batch. Named unlike `ComputedBalance.weight`, so that the state of
    # one does not load into the other.
    followed: Tensor

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
        """Load a state. Those saved before 2026-11-26 hold `started` in place of `followed`."""
        if (started := state_dict.pop(f"{prefix}started", None)) is not None:
            state_dict[f"{prefix}followed"] = started
        super()._load_from_state_dict(state_dict, prefix, *rest, **named)
