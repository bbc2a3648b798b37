"""What every balance is: a loss with state, of one form. Equations are those of `poise.balance`."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from poise.errors import InputError
from poise.latent import gaussian_kl
from poise.shapes import Latents, PerImage, Values
from poise.support.snapshots import snapshot

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
    share: Tensor | float


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

    Class attributes, for a diagnosis and for early stopping:
        follows_error: gamma2 follows the reconstruction error, so that it is the training error.
        early_stopping: the ELBO of held-out data shows when to stop. False: the balance moves to a
            target that is set, and passes through higher ELBOs on its way.
        small_start: the option that starts with a small gamma2, as advice against posterior
            collapse. None: a diagnosis recommends `ComputedBalance` instead.
    """

    follows_error: ClassVar[bool] = False
    early_stopping: ClassVar[bool] = True
    small_start: ClassVar[str | None] = None

    gamma2: Tensor
    nonfinite_batches: Tensor

    def __init__(self, *, kl_weight: float = 1.0, power: float = 2, floor: float = FLOOR) -> None:
        super().__init__()
        if not 0 <= kl_weight < math.inf:
            raise InputError(f"kl_weight must be a finite number >= 0, not {kl_weight}")
        self.kl_weight = kl_weight
        self.power = positive("power", power)
        self.floor = positive("floor", floor)
        self.register_buffer("nonfinite_batches", torch.tensor(0))

    def remedy(self, *, over_regularised: bool) -> str | None:
        """Return what to try if the KL counts for too much or too little under this balance.

        Args:
            over_regularised: the KL counts for too much. False: for too little.

        Returns:
            A sentence for a diagnosis. None: there is no advice for this balance alone.
        """
        return None

    @abstractmethod
    def _factors(self, batch: BatchMeans) -> tuple[Tensor, Tensor | float]:
        """gamma2 and kl_weight for this batch."""

    @abstractmethod
    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor | float]:
        """The buffers' values after this batch."""

    def forward(
        self, reconstruction: Values, target: Values, mean: Latents, logvar: Latents
    ) -> LossTerms:
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
        error = self.error_per_image(reconstruction, target)
        if mean.shape != logvar.shape or len(mean) != len(target):
            raise InputError(
                f"mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)} must agree, with {len(target)} rows"
            )
        return self.combine(error, gaussian_kl(mean, logvar), num_dims=target[0].numel())

    def error_per_image(self, reconstruction: Values, target: Values) -> PerImage:
        """The error |x - x^|^power of each image, summed over its dimensions, in float32 or better: (n,).

        Raises:
            InputError: the shapes do not agree, or bytes were passed.
        """
        if reconstruction.shape != target.shape:
            raise InputError(
                f"reconstruction {tuple(reconstruction.shape)} and target {tuple(target.shape)} differ in shape"
            )
        if not (reconstruction.is_floating_point() and target.is_floating_point()):
            raise InputError(
                f"reconstruction and target must be floating point, not {reconstruction.dtype} and {target.dtype}"
            )
        difference = at_least_float32(reconstruction) - at_least_float32(target)
        error = difference.square() if self.power == 2 else difference.abs().pow(self.power)
        return error.flatten(1).sum(1)

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
        error, kl = at_least_float32(error), at_least_float32(kl)
        batch = self._batch_means(error, kl, num_dims)
        gamma2, kl_weight = self._factors(batch)
        gamma2 = snapshot(gamma2)
        kl_weight = snapshot(kl_weight) if isinstance(kl_weight, Tensor) else kl_weight
        if self.training:
            self._advance(batch)
        scale, normaliser = scale_and_normaliser(gamma2, num_dims, self.power)
        loss = scaled(batch.share, (error / scale + normaliser + scaled(kl_weight, kl)).mean())
        reconstruction = (batch.error * num_dims / scale + normaliser).detach()
        return LossTerms(loss, reconstruction, batch.kl, batch.error)

    @torch.no_grad()
    def _batch_means(self, error: Tensor, kl: Tensor, num_dims: int) -> BatchMeans:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return BatchMeans(error.sum() / (len(error) * num_dims), kl.sum() / len(kl), 1.0)
        count = torch.full_like(
            error[:1], len(error)
        ).sum()  # on the device, without a copy from the host
        sums = torch.stack([error.sum(), kl.sum(), count])
        dist.all_reduce(sums)
        return BatchMeans(
            sums[0] / (sums[2] * num_dims),
            sums[1] / sums[2],
            dist.get_world_size() * count / sums[2],
        )

    @torch.no_grad()
    def _advance(self, batch: BatchMeans) -> None:
        finite = torch.isfinite(batch.error) & torch.isfinite(batch.kl)
        for name, value in self._next_state(batch).items():
            buffer = getattr(self, name)
            buffer.copy_(torch.where(finite, value, buffer))
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


def negative_log_likelihood(
    error: Tensor, gamma2: Tensor, num_dims: int, *, power: float = 2
) -> Tensor:
    """-log p(x|z), eq. 5 (eq. 1 for power 2): one value per image, summed over its dimensions, in nats.

    Args:
        error: any shape, |x - x^|^power summed over `num_dims` dimensions.
        gamma2: decoder variance (for power p, the mean of |x - x^|^p), scalar > 0.
        num_dims: D.
        power: p.
    """
    scale, normaliser = scale_and_normaliser(gamma2, num_dims, power)
    return error / scale + normaliser


def scale_and_normaliser(gamma2: Tensor, num_dims: int, power: float) -> tuple[Tensor, Tensor]:
    """What eq. 5 divides the error by, and what it adds: p m, and D [ log(2 Gamma(1 + 1/p)) + log(p m) / p ]."""
    scale = power * gamma2
    return scale, num_dims * (math.log(2) + math.lgamma(1 + 1 / power) + scale.log() / power)


def scaled(factor: Tensor | float, values: Tensor) -> Tensor:
    """The product; small networks feel every operation, so none is spent on the number 1."""
    return values if isinstance(factor, float) and factor == 1 else factor * values


def at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def positive(name: str, value: float) -> float:
    if not (value > 0 and math.isfinite(value)):
        raise InputError(f"{name} must be a finite number > 0, not {value}")
    return float(value)


def whole(name: str, value: float) -> int:
    if not (value >= 1 and float(value).is_integer()):
        raise InputError(f"{name} must be a whole number >= 1, not {value}")
    return int(value)


def checked_decay(decay: float) -> float:
    if not 0 <= decay < 1:
        raise InputError(f"decay must be in [0, 1), not {decay}")
    return decay
