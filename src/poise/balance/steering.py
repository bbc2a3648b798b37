"""Balances that are constant, scheduled, or controlled towards a target.

They are the baselines for a gamma2 that follows the error (`poise.balance.following`).
"""

import math
from collections.abc import Sequence
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from poise.balance.contract import (
    LARGEST_ERROR,
    Balance,
    BatchMeans,
)
from poise.balance.inputs import checked_decay, positive, whole
from poise.errors import InputError

# A constrained gamma2 stays within this factor of its target error, on both sides.
WIDEST = 1e-8


@final
class FixedBalance(Balance):
    """Keep a constant decoder variance, or the constant beta of a beta-VAE.

    Args:
        gamma2: decoder variance, > 0, with KL weight 1. Default: 1, if beta is not given either. A
            sequence has one variance per group, for errors (n, groups).
        beta: KL weight of a beta-VAE, >= 0, at gamma2 = 1. The loss is SE/2 + beta KL, both
            *summed* over dimensions. Its gradient equals that of gamma2 = beta, times beta. A
            weight w beside a mean squared error of D pixels, w KL + SE/D, is beta = w D / 2 here.
        power, process_group: see `Balance`.

    Raises:
        InputError: both gamma2 and beta are given, or a value is out of range.

    Source: Kingma & Welling 2014 (gamma2); Higgins et al. 2017 (beta).
    """

    def __init__(
        self,
        *,
        gamma2: float | Sequence[float] | np.ndarray | Tensor | None = None,
        beta: float | None = None,
        power: float = 2,
        process_group: Any = None,
    ) -> None:
        if gamma2 is not None and beta is not None:
            raise InputError("FixedBalance takes gamma2=... or beta=..., not both")
        if beta is not None and not 0 <= beta < math.inf:
            raise InputError(f"beta must be a finite number >= 0, not {beta}")
        given: Any = gamma2.tolist() if isinstance(gamma2, (Tensor, np.ndarray)) else gamma2
        groups = len(given) if isinstance(given, Sequence) else None
        super().__init__(
            kl_weight=1.0 if beta is None else beta,
            power=power,
            groups=groups,
            process_group=process_group,
        )
        if isinstance(given, Sequence):
            self._buffer("gamma2", [positive("gamma2", value) for value in given])
        else:
            self._buffer("gamma2", 1.0 if given is None else positive("gamma2", given))

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        return self.gamma2, self.kl_weight

    def _next_state(self, batch: BatchMeans, gamma2: Tensor) -> dict[str, Tensor]:
        return {}


@final
class ScheduledBalance(Balance):
    """Anneal the KL weight linearly at a constant gamma2, once or cyclically.

    Args:
        ramp_steps: number of training batches in which the KL weight rises from `start` to
            `kl_weight`, > 0.
        period_steps: number of batches after which the ramp restarts (cyclical annealing), >=
            ramp_steps. None: the ramp does not restart.
        start: KL weight at the beginning of a ramp, >= 0.
        gamma2: decoder variance, > 0.
        kl_weight: KL weight at the end of a ramp, >= 0.
        power, process_group: see `Balance`.

    Raises:
        InputError: a value is out of range.

    Source: Bowman et al. 2016 (linear); Fu et al. 2019, arXiv 1903.10145, eq. 6 (cyclical).
    """

    early_stopping = False

    step: Tensor

    def __init__(
        self,
        ramp_steps: int,
        period_steps: int | None = None,
        *,
        start: float = 0.0,
        gamma2: float = 1.0,
        kl_weight: float = 1.0,
        power: float = 2,
        process_group: Any = None,
    ) -> None:
        super().__init__(kl_weight=kl_weight, power=power, process_group=process_group)
        self.ramp_steps = whole("ramp_steps", ramp_steps)
        self.period_steps = None if period_steps is None else whole("period_steps", period_steps)
        if period_steps is not None and period_steps < ramp_steps:
            raise InputError(
                f"period_steps ({period_steps}) must be at least ramp_steps ({ramp_steps})"
            )
        if not 0 <= start < math.inf:
            raise InputError(f"start must be a finite number >= 0, not {start}")
        self.start = start
        self._buffer("gamma2", positive("gamma2", gamma2))
        self._buffer("step", 0)

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, Tensor]:
        phase = self.step if self.period_steps is None else self.step % self.period_steps
        fraction = (phase / self.ramp_steps).clamp(max=1.0)
        return self.gamma2, self.start + (self.kl_weight - self.start) * fraction

    def _next_state(self, batch: BatchMeans, gamma2: Tensor) -> dict[str, Tensor]:
        return {"step": self.step + 1}


@final
class ConstrainedBalance(Balance):
    """Minimise the KL subject to a given reconstruction error (GECO).

    A Lagrange multiplier grows until the error meets the target. The multiplier of the squared
    error is 1 / (2 gamma2), so the update changes gamma2. With c = (running average of the MSE) /
    target_mse - 1, clipped to [-1, 1],

        gamma2 <- gamma2 * exp(-rate * c),        clipped to [floor, ceiling].

    Args:
        target_mse: target error, mean over images and dimensions, > 0.
        rate: largest relative change of gamma2 per batch, > 0.
        decay: decay of the running average of the error, in [0, 1).
        start: initial gamma2, > 0.
        floor: minimum of gamma2, > 0. The ceiling is 1 / floor, or 1e8 times target_mse if the
            floor is 1 or more. None: gamma2 is from 1e-8 to 1e8 times target_mse.
        kl_weight, power, process_group: see `Balance`.

    Raises:
        InputError: a value is out of range.

    Source: Rezende & Viola 2018, arXiv 1810.00597, algorithm 1. Unlike there, the constraint is
    relative to its target (dimensionless) and clipped.
    """

    early_stopping = False
    needs_error = True

    started: Tensor  # 1 once there was a batch, else 0
    error_average: Tensor

    def __init__(
        self,
        target_mse: float,
        *,
        rate: float = 0.01,
        decay: float = 0.99,
        start: float = 1.0,
        kl_weight: float = 1.0,
        power: float = 2,
        floor: float | None = None,
        process_group: Any = None,
    ) -> None:
        super().__init__(kl_weight=kl_weight, power=power, floor=floor, process_group=process_group)
        self.target_mse = positive("target_mse", target_mse)
        self.rate = positive("rate", rate)
        self.decay = checked_decay(decay)
        self._least = WIDEST * self.target_mse if self.floor is None else self.floor
        below_1 = self.floor is not None and self.floor < 1
        self._most = 1 / self._least if below_1 else self.target_mse / WIDEST
        self._buffer("gamma2", positive("start", start))
        self._buffer("error_average", 0.0)
        self._buffer("started", 0.0)

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        return self.gamma2, self.kl_weight

    def _next_state(self, batch: BatchMeans, gamma2: Tensor) -> dict[str, Tensor]:
        previous = torch.where(self.started > 0, self.error_average, batch.error)
        error = torch.minimum(batch.error, LARGEST_ERROR * previous)
        average = self.decay * previous + (1 - self.decay) * error
        average = average.clamp_min(WIDEST * self.target_mse)  # the cap is relative to it
        constraint = (average / self.target_mse - 1).clamp(-1, 1)
        gamma2 = (gamma2 * (-self.rate * constraint).exp()).clamp(self._least, self._most)
        return {"gamma2": gamma2, "error_average": average, "started": torch.ones_like(average)}


@final
class ControlledBalance(Balance):
    """Control the KL weight so that the KL meets a target (ControlVAE), at a constant gamma2.

    With e = target_kl - KL of the batch,

        integral <- integral - ki * e,                        clipped to [least, most],
        weight    = kp / (1 + exp(e)) + integral,             clipped to [least, most].

    Args:
        target_bits: target KL in bits per image, > 0. One bit is ln 2 = 0.693 nats.
        target_kl: the same in nats, in place of `target_bits`.
        kp, ki: gains of the proportional and of the integral term, >= 0.
        least, most: bounds of the KL weight, 0 <= least <= most.
        gamma2: decoder variance, > 0.
        power, process_group: see `Balance`.

    Attributes:
        target_kl: target KL in nats per image.

    Raises:
        InputError: there is no target, or there are two, or a value is out of range.

    Source: Shao et al. 2020, arXiv 2004.05988, eq. 7 and algorithm 1. Unlike there, clipping the
    integral prevents wind-up.
    """

    early_stopping = False

    integral: Tensor
    weight: Tensor

    def __init__(
        self,
        *,
        target_bits: float | None = None,
        target_kl: float | None = None,
        kp: float = 0.01,
        ki: float = 1e-4,
        least: float = 0.0,
        most: float = 1.0,
        gamma2: float = 1.0,
        power: float = 2,
        process_group: Any = None,
    ) -> None:
        super().__init__(power=power, process_group=process_group)
        if not 0 <= least <= most:
            raise InputError(
                f"the bounds of the KL weight must obey 0 <= least <= most, not {least}, {most}"
            )
        if not (kp >= 0 and ki >= 0):
            raise InputError(f"the gains kp and ki must be >= 0, not {kp}, {ki}")
        if target_bits is not None and target_kl is None:
            self.target_kl = positive("target_bits", target_bits) * math.log(2)
        elif target_kl is not None and target_bits is None:
            self.target_kl = positive("target_kl", target_kl)
        else:
            given = "neither" if target_kl is None else "both"
            raise InputError(
                f"a controlled balance needs target_bits=... or target_kl=... (nats), not {given}: "
                'write ControlledBalance(target_bits=30) or "controlled:target_bits=30"'
            )
        self.kp, self.ki, self.least, self.most = kp, ki, least, most
        self._buffer("gamma2", positive("gamma2", gamma2))
        self._buffer("integral", float(least))
        self._buffer("weight", float(least))

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, Tensor]:
        return self.gamma2, self.weight

    def _next_state(self, batch: BatchMeans, gamma2: Tensor) -> dict[str, Tensor]:
        missing = self.target_kl - batch.kl
        integral = (self.integral - self.ki * missing).clamp(self.least, self.most)
        weight = self.kp * torch.sigmoid(-missing) + integral
        return {"integral": integral, "weight": weight.clamp(self.least, self.most)}
