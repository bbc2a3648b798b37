"""The balance between reconstruction and KL: seven ways to set it, one contract.

A decoder that outputs the mean of a Gaussian with variance gamma^2 in each of D dimensions has, per image,

    -log p(x|z) = SE / (2 gamma^2) + D/2 log(2 pi gamma^2),        SE = sum over dimensions of (x - x^)^2,      (1)

and the loss of a VAE is the batch mean of (1) + kl_weight * KL. Everything hangs on gamma^2: large, and KL prevails and
blocks the reconstruction; small, and the latent space is never regularised.

For a fixed network, (1) averaged over the data is least where its derivative by gamma^2 vanishes:

    -E[SE] / (2 gamma^4) + D / (2 gamma^2) = 0    <=>    gamma^2 = E[SE] / D = MSE.                             (2)

So gamma^2 need not be learned: it *is* the current mean squared error. Asperti & Trentin (2020) compute it as a running
average over minibatches. With MSE_b the mean over all elements of one batch,

    m <- decay * m + (1 - decay) * MSE_b,        gamma^2 = m.                                                   (3)

At balance the quadratic term of (1) is D/2 whatever the MSE: as reconstruction improves, KL counts in proportion. No
gradient passes through gamma^2, and a step uses the value from *earlier* batches.

Taking gamma^2 from the current batch instead, detached, gives the gradient of (D/2) log MSE_b, since
grad SE / (2 MSE_b) = (D/2) grad MSE_b / MSE_b (sigma-VAE's "optimal sigma": Rybkin et al. 2021, arXiv 2006.13202).

Errors |x - x^|^p with p other than 2 belong to the generalised normal distribution, whose scale alpha obeys
alpha^p = p E|x - x^|^p. With m = E|x - x^|^p, kept by the same running average, (1) becomes

    -log p(x|z) = sum |x - x^|^p / (p m) + D [ log(2 Gamma(1 + 1/p)) + log(p m) / p ],                          (4)

which is (1) for p = 2 and the Laplace distribution for p = 1. Below, `gamma2` is m for any p.

Every loss term is one value per image, summed over its dimensions, in nats, and averaged over the batch in
`Balance.combine` and nowhere else. Where a torch.distributed process group is up, training reduces sums and counts over
its ranks, so every rank uses the same gamma2 and N ranks on shards equal one process on their union. Evaluation mode
never communicates.
"""

import inspect
import math
from abc import ABC, abstractmethod
from typing import Literal, NamedTuple, final

import torch
import torch.distributed as dist
from torch import Tensor, nn

from poise.errors import InputError
from poise.latent import gaussian_kl
from poise.shapes import Latents, PerImage, Scalar, Values

FLOOR = 1e-8  # of gamma2. Rounding to 8 bits alone leaves 1.3e-6, so no image model comes near it.


class LossTerms(NamedTuple):
    """The loss to minimise and its parts, each a scalar averaged over the batch.

    Attributes:
        loss: reconstruction + kl_weight * kl, in nats per image; the only part that carries gradients. In a process group
            the average of `loss` (and so of its gradients) over ranks is that of the union of their batches.
        reconstruction: -log p(x|z), eq. 1, in nats per image, detached.
        kl: KL(q(z|x) || p(z)), unweighted, in nats per image, detached.
        mse: mean over images *and* dimensions of the error (squared for power=2, absolute for power=1), detached.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    mse: Tensor


class BatchMeans(NamedTuple):
    """What a batch, over all ranks, tells a balance. `share` scales a rank's mean so that ranks average to the union's."""

    error: Tensor  # per dimension
    kl: Tensor  # per image
    share: Tensor


class Balance(nn.Module, ABC):
    """A loss that keeps its state as BatchNorm does: buffers in `state_dict`, updated by `forward` in training mode only.

    Args:
        kl_weight: factor on the KL term, >= 0. 1 is the evidence lower bound.
        power: p of the error |x - x^|^p: 2 (Gaussian) or 1 (Laplace); any p > 0 is allowed.
        floor: least gamma2, > 0.

    Attributes:
        gamma2: the decoder variance (for power p, the mean of |x - x^|^p): float32 scalar, whatever the autocast or
            `.half()` state.
        nonfinite_batches: how many training batches had a NaN or infinite error or KL. They never enter the state.
    """

    gamma2: Tensor
    nonfinite_batches: Tensor

    def __init__(self, *, kl_weight: float = 1.0, power: float = 2, floor: float = FLOOR) -> None:
        super().__init__()
        if not kl_weight >= 0:
            raise InputError(f"kl_weight must be >= 0, not {kl_weight}")
        if not power > 0:
            raise InputError(f"power must be > 0 (2: Gaussian, 1: Laplace), not {power}")
        self.kl_weight = kl_weight
        self.power = power
        self.floor = _positive("floor", floor)
        self.register_buffer("nonfinite_batches", torch.tensor(0))

    @abstractmethod
    def _factors(self, batch: BatchMeans) -> tuple[Tensor, Tensor | float]:
        """gamma2 and kl_weight for this batch."""

    @abstractmethod
    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor]:
        """The buffers' values after this batch."""

    def forward(self, reconstruction: Values, target: Values, mean: Latents, logvar: Latents) -> LossTerms:
        """The loss of a Gaussian posterior and an error |x - x^|^power.

        Args:
            reconstruction, target: (n, ...), the same shape, floating point. Any scale; images usually in [0, 1].
            mean, logvar: (n, latents); logvar is the log *variance* of the posterior.

        Raises:
            InputError: the shapes do not agree (broadcasting would give a wrong loss silently), or bytes were passed.

        Example:
            >>> balance = poise.ComputedBalance()
            >>> images, mean, logvar = torch.rand(8, 3, 4, 4), torch.zeros(8, 2), torch.zeros(8, 2)
            >>> terms = balance(torch.full_like(images, 0.5), images, mean, logvar)
            >>> float(terms.kl)
            0.0
        """
        if reconstruction.shape != target.shape:
            raise InputError(f"reconstruction {tuple(reconstruction.shape)} and target {tuple(target.shape)} differ in shape")
        if not (reconstruction.is_floating_point() and target.is_floating_point()):
            raise InputError(f"reconstruction and target must be floating point, not {reconstruction.dtype} and {target.dtype}")
        if mean.shape != logvar.shape or len(mean) != len(target):
            raise InputError(f"mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)} must agree, with {len(target)} rows")
        difference = _at_least_float32(reconstruction) - _at_least_float32(target)
        error = difference.square() if self.power == 2 else difference.abs().pow(self.power)
        return self.combine(error.flatten(1).sum(1), gaussian_kl(mean, logvar), num_dims=target[0].numel())

    def combine(self, error: PerImage, kl: PerImage, num_dims: int) -> LossTerms:
        """The loss for any other posterior, likelihood or network.

        Args:
            error: (n,), the error |x - x^|^power of each image, summed over its dimensions.
            kl: (n,), the KL term of each image in nats, summed over its latents.
            num_dims: D, the number of dimensions `error` was summed over.

        Raises:
            InputError: error or kl is not one value per image.
        """
        if error.dim() != 1 or error.shape != kl.shape:
            raise InputError(
                f"error and kl must be one value per image, (n,) each, not {tuple(error.shape)}, {tuple(kl.shape)}"
            )
        error, kl = _at_least_float32(error), _at_least_float32(kl)
        batch = self._batch_means(error, kl, num_dims)
        gamma2, kl_weight = self._factors(batch)
        gamma2 = _snapshot(gamma2)
        kl_weight = _snapshot(kl_weight) if isinstance(kl_weight, Tensor) else kl_weight
        if self.training:
            self._advance(batch)
        reconstruction = negative_log_likelihood(error, gamma2, num_dims, power=self.power)
        loss = (reconstruction + kl_weight * kl).mean() * batch.share
        whole = negative_log_likelihood(batch.error * num_dims, gamma2, num_dims, power=self.power).detach()
        return LossTerms(loss, whole, batch.kl, batch.error)

    @torch.no_grad()
    def _batch_means(self, error: Tensor, kl: Tensor, num_dims: int) -> BatchMeans:
        count = torch.full_like(error[:1], len(error)).sum()  # on the device, without a copy from the host
        sums = torch.stack([error.sum(), kl.sum(), count])
        ranks = 1
        if self.training and dist.is_available() and dist.is_initialized():
            ranks = dist.get_world_size()
            dist.all_reduce(sums)
        return BatchMeans(sums[0] / (sums[2] * num_dims), sums[1] / sums[2], ranks * count / sums[2])

    @torch.no_grad()
    def _advance(self, batch: BatchMeans) -> None:
        finite = torch.isfinite(batch.error) & torch.isfinite(batch.kl)
        for name, value in self._next_state(batch).items():
            buffer = getattr(self, name)
            buffer.copy_(torch.where(finite, value.to(buffer.dtype), buffer))
        self.nonfinite_batches += ~finite

    def _average(self, decay: float, average: Tensor, value: Tensor) -> Tensor:
        return (decay * average + (1 - decay) * value).clamp_min(self.floor)

    def _apply(self, fn, recurse: bool = True):
        """Moves the state between devices, but keeps its precision: half precision cannot hold gamma2 or its update."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            too_coarse = moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(moved.device) if too_coarse else moved

        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        return f"kl_weight={self.kl_weight:g}, power={self.power:g}"


def negative_log_likelihood(error: Tensor, gamma2: Tensor, num_dims: int, *, power: float = 2) -> Tensor:
    """-log p(x|z), eq. 4 (eq. 1 for power 2): one value per image, summed over its dimensions, in nats.

    Args:
        error: any shape, |x - x^|^power summed over `num_dims` dimensions.
        gamma2: decoder variance (for power p, the mean of |x - x^|^p), scalar > 0.
        num_dims: D.
        power: p.
    """
    log_normaliser = math.log(2) + math.lgamma(1 + 1 / power) + (power * gamma2).log() / power
    return error / (power * gamma2) + num_dims * log_normaliser


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
        self.decay = _decay(decay)
        self.monotone = monotone
        from_data = isinstance(start, str)
        self.register_buffer("gamma2", torch.tensor(1.0 if from_data else _positive("start", start)))
        self.register_buffer("started", torch.tensor(not from_data))

    @classmethod
    def released(cls, image_size: int, latent_dim: int) -> "ComputedBalance":
        """The authors' code exactly: start 1, never growing, KL weighted by (2 image_size / latent_dim)^2.

        The weight, which no text of theirs mentions, is 1 for 32 pixels and 4 for 64, at 64 latents.
        """
        kl_weight = (2 * _positive("image_size", image_size) / _positive("latent_dim", latent_dim)) ** 2
        return cls(start=1.0, monotone=True, kl_weight=kl_weight)

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        return torch.where(self.started, self.gamma2, batch.error.clamp_min(self.floor)), self.kl_weight

    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor]:
        gamma2, _ = self._factors(batch)
        average = self._average(self.decay, gamma2, batch.error)
        if self.monotone:
            average = torch.minimum(gamma2, average)
        return {"gamma2": average, "started": torch.ones_like(self.started)}

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
        self.rate = _positive("rate", rate)
        self.scaled_log_gamma = nn.Parameter(torch.tensor(0.5 * math.log(_positive("start", start)) / rate))

    @property
    def gamma2(self) -> Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._gamma2().detach()

    def _gamma2(self) -> Tensor:
        return (2 * self.rate * self.scaled_log_gamma).exp().clamp_min(self.floor)

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        return self._gamma2(), self.kl_weight

    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor]:
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
        self.decay = _decay(decay)
        self.register_buffer("gamma2", torch.tensor(1.0))
        self.register_buffer("started", torch.tensor(False))

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        own = batch.error.clamp_min(self.floor)
        return (own if self.training else torch.where(self.started, self.gamma2, own)), self.kl_weight

    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor]:
        previous = torch.where(self.started, self.gamma2, batch.error)
        average = self._average(self.decay, previous, batch.error)
        return {"gamma2": average, "started": torch.ones_like(self.started)}


@final
class FixedBalance(Balance):
    """A constant balance: a given decoder variance, or a given beta.

    Args:
        gamma2: the decoder variance, > 0, with KL weight 1. The default, if beta is absent too, is 1.
        beta: the KL weight of a beta-VAE, >= 0, at gamma2 = 1: SE/2 + beta KL, both *summed* over dimensions. The
            gradient is that of gamma2 = beta, scaled by beta. A beta quoted for errors averaged over D pixels is D times
            larger here.
        power, floor: see `Balance`.

    Raises:
        InputError: both gamma2 and beta were given.

    Source: Kingma & Welling 2014 (gamma2); Higgins et al. 2017 (beta).
    """

    def __init__(
        self, *, gamma2: float | None = None, beta: float | None = None, power: float = 2, floor: float = FLOOR
    ) -> None:
        if gamma2 is not None and beta is not None:
            raise InputError("FixedBalance takes gamma2=... or beta=..., not both")
        super().__init__(kl_weight=1.0 if beta is None else beta, power=power, floor=floor)
        self.register_buffer("gamma2", torch.tensor(1.0 if gamma2 is None else _positive("gamma2", gamma2)))

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        return self.gamma2, self.kl_weight

    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor]:
        return {}


@final
class ScheduledBalance(Balance):
    """KL annealing at a constant gamma2: the KL weight rises linearly, once or again and again.

    Args:
        ramp_steps: training batches over which the weight rises from `start` to `kl_weight`, > 0.
        period_steps: batches after which the ramp begins anew (cyclical annealing), >= ramp_steps; None: never.
        start: KL weight at the beginning of a ramp, >= 0.
        gamma2: the decoder variance, > 0.
        kl_weight: KL weight at the end of a ramp; power, floor: see `Balance`.

    Source: Bowman et al. 2016 (linear); Fu et al. 2019, arXiv 1903.10145, eq. 6 (cyclical).
    """

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
        floor: float = FLOOR,
    ) -> None:
        super().__init__(kl_weight=kl_weight, power=power, floor=floor)
        self.ramp_steps = _count("ramp_steps", ramp_steps)
        self.period_steps = None if period_steps is None else _count("period_steps", period_steps)
        if period_steps is not None and period_steps < ramp_steps:
            raise InputError(f"period_steps ({period_steps}) must be at least ramp_steps ({ramp_steps})")
        if not start >= 0:
            raise InputError(f"start must be >= 0, not {start}")
        self.start = start
        self.register_buffer("gamma2", torch.tensor(_positive("gamma2", gamma2)))
        self.register_buffer("step", torch.tensor(0))

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, Tensor]:
        phase = self.step if self.period_steps is None else self.step % self.period_steps
        fraction = (phase / self.ramp_steps).clamp(max=1.0)
        return self.gamma2, self.start + (self.kl_weight - self.start) * fraction

    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor]:
        return {"step": self.step + 1}


@final
class ConstrainedBalance(Balance):
    """Least KL for a given reconstruction error (GECO): a multiplier grows until the error meets the target.

    The multiplier of the squared error is 1 / (2 gamma2), so gamma2 itself is moved: with c = running average of MSE /
    target - 1, clipped to [-1, 1], gamma2 <- gamma2 * exp(-rate * c).

    Args:
        target_mse: the error to reach, mean over images and dimensions, > 0.
        rate: largest relative change of gamma2 per batch, > 0.
        decay: of the running average of the error, in [0, 1).
        start: initial gamma2, > 0.
        kl_weight, power, floor: see `Balance`; gamma2 stays within [floor, 1 / floor].

    Source: Rezende & Viola 2018, arXiv 1810.00597, algorithm 1. Differs: the constraint is relative to its target, hence
    free of units, and clipped.
    """

    started: Tensor
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
        floor: float = FLOOR,
    ) -> None:
        super().__init__(kl_weight=kl_weight, power=power, floor=floor)
        self.target_mse = _positive("target_mse", target_mse)
        self.rate = _positive("rate", rate)
        self.decay = _decay(decay)
        self.register_buffer("gamma2", torch.tensor(_positive("start", start)))
        self.register_buffer("error_average", torch.tensor(0.0))
        self.register_buffer("started", torch.tensor(False))

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, float]:
        return self.gamma2, self.kl_weight

    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor]:
        previous = torch.where(self.started, self.error_average, batch.error)
        average = self._average(self.decay, previous, batch.error)
        constraint = (average / self.target_mse - 1).clamp(-1, 1)
        gamma2 = (self.gamma2 * (-self.rate * constraint).exp()).clamp(self.floor, 1 / self.floor)
        return {"gamma2": gamma2, "error_average": average, "started": torch.ones_like(self.started)}


@final
class ControlledBalance(Balance):
    """A controller moves the KL weight until KL meets a set point (ControlVAE), at a constant gamma2.

    With e = target_kl - KL of the batch: integral <- integral - ki * e, held within [least, most] against wind-up, and
    weight = kp / (1 + exp(e)) + integral, held within the same bounds.

    Args:
        target_kl: the KL to reach, nats per image, > 0.
        kp, ki: gains of the proportional and of the integral part, >= 0.
        least, most: bounds of the KL weight.
        gamma2: the decoder variance, > 0; power, floor: see `Balance`.

    Source: Shao et al. 2020, arXiv 2004.05988, eq. 7 and algorithm 1. Differs: wind-up is met by bounding the integral.
    """

    integral: Tensor
    weight: Tensor

    def __init__(
        self,
        target_kl: float,
        *,
        kp: float = 0.01,
        ki: float = 1e-4,
        least: float = 0.0,
        most: float = 1.0,
        gamma2: float = 1.0,
        power: float = 2,
        floor: float = FLOOR,
    ) -> None:
        super().__init__(power=power, floor=floor)
        if not 0 <= least <= most:
            raise InputError(f"the bounds of the KL weight must obey 0 <= least <= most, not {least}, {most}")
        if not (kp >= 0 and ki >= 0):
            raise InputError(f"the gains kp and ki must be >= 0, not {kp}, {ki}")
        self.target_kl = _positive("target_kl", target_kl)
        self.kp, self.ki, self.least, self.most = kp, ki, least, most
        self.register_buffer("gamma2", torch.tensor(_positive("gamma2", gamma2)))
        self.register_buffer("integral", torch.tensor(float(least)))
        self.register_buffer("weight", torch.tensor(float(least)))

    def _factors(self, batch: BatchMeans) -> tuple[Tensor, Tensor]:
        return self.gamma2, self.weight

    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor]:
        missing = self.target_kl - batch.kl
        integral = (self.integral - self.ki * missing).clamp(self.least, self.most)
        weight = self.kp * torch.sigmoid(-missing) + integral
        return {"integral": integral, "weight": weight.clamp(self.least, self.most)}


BALANCES = {
    "computed": ComputedBalance,
    "released": ComputedBalance.released,
    "learned": LearnedBalance,
    "optimal": OptimalBalance,
    "fixed": FixedBalance,
    "scheduled": ScheduledBalance,
    "constrained": ConstrainedBalance,
    "controlled": ControlledBalance,
}


def make_balance(spec: str) -> Balance:
    """The balance that a short text names: a name, then options after a colon, separated by commas.

    Raises:
        InputError: unknown name or option, a value that is not a number or true/false, or one out of range.

    Example:
        >>> make_balance("fixed:gamma2=0.5").gamma2
        tensor(0.5000)
    """
    name, _, options = spec.partition(":")
    if name not in BALANCES:
        raise InputError(f"unknown balance {name!r}; there are {', '.join(BALANCES)}")
    make = BALANCES[name]
    allowed = inspect.signature(make).parameters
    values = {}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in allowed:
            raise InputError(f"balance {name!r} has no option {key!r}; it takes {', '.join(allowed)}")
        values[key] = _parse(key, value, allowed[key].default)
    missing = [key for key, p in allowed.items() if p.default is p.empty and key not in values]
    if missing:
        raise InputError(f"balance {name!r} needs {', '.join(missing)}: write {name}:{missing[0]}=NUMBER")
    return make(**values)


def _parse(key: str, value: str, default: object) -> float | bool | str:
    if isinstance(default, bool):
        if value not in ("true", "false"):
            raise InputError(f"{key}={value!r} is neither true nor false")
        return value == "true"
    if value == default:  # the one option that takes a word: start=first-batch
        return value
    try:
        number = float(value)
    except ValueError:
        raise InputError(f"{key}={value!r} is not a number") from None
    return int(number) if number.is_integer() else number


def _snapshot(factor: Tensor) -> Tensor:
    """A copy of what was read from the state: the state moves before backward reads this value.

    Compiled code needs more than a copy. To save memory its backward may recompute any simple operation on a buffer, and
    would read the buffer after the move: silently wrong gradients (pytorch/pytorch#197039; 10 % off in our tests, torch
    2.13). It never recomputes an operation that it does not know.
    """
    if factor.requires_grad:  # a parameter, which only the optimiser moves
        return factor
    return _opaque_copy(factor) if torch.compiler.is_compiling() else factor.clone()


@torch.library.custom_op("poise::opaque_copy", mutates_args=())
def _opaque_copy(tensor: Tensor) -> Tensor:
    return tensor.clone()


@_opaque_copy.register_fake
def _opaque_copy_of_fake(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _positive(name: str, value: float | Scalar) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name} must be a finite number > 0, not {value}")
    return float(value)


def _count(name: str, value: float) -> int:
    if not (value >= 1 and float(value).is_integer()):
        raise InputError(f"{name} must be a whole number >= 1, not {value}")
    return int(value)


def _decay(decay: float) -> float:
    if not 0 <= decay < 1:
        raise InputError(f"decay must be in [0, 1), not {decay}")
    return decay
