"""Base class of all balances. Equation numbers refer to `poise.balance`."""

import math
from abc import ABC, abstractmethod
from typing import ClassVar, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from poise.errors import InputError
from poise.latent import gaussian_kl
from poise.shapes import Latents, PerImage, Values
from poise.support.collectives import sum_over_ranks
from poise.support.snapshots import snapshot

# Default minimum of gamma2. Rounding to 8 bits alone leaves an MSE of 1.3e-6, so no image model
# comes near it.
FLOOR = 1e-8


class LossTerms(NamedTuple):
    """The loss to minimise and its terms: scalars, each a mean over the batch.

    Attributes:
        loss: reconstruction + kl_weight * kl, in nats per image. Only this field has gradients. In
            a process group, the mean of `loss` over ranks, and so of its gradients, is that of the
            union of their batches.
        reconstruction: -log p(x|z), eq. 1 (eq. 5 for power p), in nats per image, detached.
        kl: KL(q(z|x) || p(z)), unweighted, in nats per image, detached.
        mse: mean over images *and* dimensions of the error, detached. The error is squared for
            power=2, absolute for power=1.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    mse: Tensor


class BatchMeans(NamedTuple):
    """Mean error and KL of a batch over all ranks.

    Attributes:
        error: mean over images and dimensions.
        kl: mean over images, in nats.
        share: factor on a rank's own mean loss, so that the mean over ranks is that of the union of
            their batches.
    """

    error: Tensor
    kl: Tensor
    share: Tensor | float


class Balance(nn.Module, ABC):
    """A VAE loss that sets the balance of reconstruction and KL.

    Its state is in the buffers of `state_dict`, as in BatchNorm. `forward` updates them in training
    mode only.

    Args:
        kl_weight: factor on the KL term, finite and >= 0. 1 gives the evidence lower bound.
        power: p of the error |x - x^|^p, finite and > 0. 2 is Gaussian, 1 is Laplace.
        floor: minimum of gamma2, finite and > 0.

    Attributes:
        gamma2: decoder variance (for power p, the mean of |x - x^|^p). A float32 scalar, also under
            autocast and after `.half()`.
        nonfinite_batches: number of training batches with a NaN or infinite error or KL. They never
            change the state.

    Class attributes, for a diagnosis and for early stopping:
        follows_error: gamma2 follows the reconstruction error, so that it is the training error.
        early_stopping: the ELBO of held-out data shows when to stop. False: the balance moves
            towards a fixed target, and the ELBO may be higher on the way than at the target.
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
        """Return advice if the KL weighs too much or too little under this balance.

        Args:
            over_regularised: True if the KL weighs too much, False if it weighs too little.

        Returns:
            A sentence for a diagnosis, or None if this balance has no advice of its own.
        """
        return None

    @abstractmethod
    def _factors(self, batch: BatchMeans) -> tuple[Tensor, Tensor | float]:
        """Return gamma2 and kl_weight for this batch."""

    @abstractmethod
    def _next_state(self, batch: BatchMeans) -> dict[str, Tensor | float]:
        """Return the new values of the buffers after this batch, by name."""

    def forward(
        self, reconstruction: Values, target: Values, mean: Latents, logvar: Latents
    ) -> LossTerms:
        """Return the loss of a batch for a Gaussian posterior and the error |x - x^|^power.

        Args:
            reconstruction, target: (n, ...), of the same shape, floating point. Any range; images
                are usually in [0, 1].
            mean, logvar: (n, latents). logvar is the log *variance* of the posterior.

        Raises:
            InputError: the shapes differ (broadcasting would silently give a wrong loss), or the
                values are integers.

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
                f"mean {tuple(mean.shape)} and logvar {tuple(logvar.shape)} must agree in "
                f"shape, with {len(target)} rows"
            )
        return self.combine(error, gaussian_kl(mean, logvar), num_dims=target[0].numel())

    def error_per_image(self, reconstruction: Values, target: Values) -> PerImage:
        """Return the error |x - x^|^power of each image, summed over its dimensions, (n,).

        Computed in float32 or better.

        Raises:
            InputError: the shapes differ, or the values are integers.
        """
        if reconstruction.shape != target.shape:
            raise InputError(
                f"reconstruction {tuple(reconstruction.shape)} and target {tuple(target.shape)} "
                "differ in shape"
            )
        if not (reconstruction.is_floating_point() and target.is_floating_point()):
            raise InputError(
                "reconstruction and target must be floating point, not "
                f"{reconstruction.dtype} and {target.dtype}"
            )
        difference = at_least_float32(reconstruction) - at_least_float32(target)
        error = difference.square() if self.power == 2 else difference.abs().pow(self.power)
        return error.flatten(1).sum(1)

    def combine(self, error: PerImage, kl: PerImage, num_dims: int) -> LossTerms:
        """Return the loss of a batch, given the error and KL of each image.

        Use it for a posterior or likelihood that `forward` does not know. In training mode it
        updates the state.

        Args:
            error: (n,), the error |x - x^|^power of each image, summed over its dimensions.
            kl: (n,), the KL of each image in nats, summed over its latents.
            num_dims: D, the number of dimensions that `error` is summed over.

        Raises:
            InputError: error or kl is not one value per image.
        """
        if error.dim() != 1 or error.shape != kl.shape:
            raise InputError(
                "error and kl must be one value per image, (n,) each, not "
                f"{tuple(error.shape)}, {tuple(kl.shape)}"
            )
        error, kl = at_least_float32(error), at_least_float32(kl)
        batch = self._batch_means(error, kl, num_dims)
        gamma2, kl_weight = self._factors(batch)
        gamma2 = snapshot(gamma2)
        kl_weight = snapshot(kl_weight) if isinstance(kl_weight, Tensor) else kl_weight
        if self.training:
            self._update_state(batch)
        scale, normaliser = scale_and_normaliser(gamma2, num_dims, self.power)
        loss = scaled(batch.share, (error / scale + normaliser + scaled(kl_weight, kl)).mean())
        reconstruction = (batch.error * num_dims / scale + normaliser).detach()
        return LossTerms(loss, reconstruction, batch.kl, batch.error)

    @torch.no_grad()
    def _batch_means(self, error: Tensor, kl: Tensor, num_dims: int) -> BatchMeans:
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return BatchMeans(error.sum() / (len(error) * num_dims), kl.sum() / len(kl), 1.0)
        # Made on the device, without a copy from the host.
        count = torch.full_like(error[:1], len(error)).sum()
        sums = torch.stack([error.sum(), kl.sum(), count])
        sum_over_ranks(sums)
        return BatchMeans(
            sums[0] / (sums[2] * num_dims),
            sums[1] / sums[2],
            dist.get_world_size() * count / sums[2],
        )

    @torch.no_grad()
    def _update_state(self, batch: BatchMeans) -> None:
        finite = torch.isfinite(batch.error) & torch.isfinite(batch.kl)
        for name, value in self._next_state(batch).items():
            buffer = getattr(self, name)
            buffer.copy_(torch.where(finite, value, buffer))
        self.nonfinite_batches += ~finite

    def _average(self, decay: float, average: Tensor, value: Tensor) -> Tensor:
        return (decay * average + (1 - decay) * value).clamp_min(self.floor)

    def _apply(self, fn, recurse: bool = True):
        """Move the state between devices, but never below float32.

        Half precision cannot represent gamma2 or its update.
        """

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
    """Return -log p(x|z) of each image, summed over its dimensions, in nats (eq. 5).

    For power 2 this is eq. 1.

    Args:
        error: any shape, |x - x^|^power summed over `num_dims` dimensions.
        gamma2: decoder variance (for power p, the mean of |x - x^|^p), scalar > 0.
        num_dims: D, the number of dimensions, >= 1.
        power: p, > 0.

    Returns:
        A tensor of the shape of `error`.
    """
    scale, normaliser = scale_and_normaliser(gamma2, num_dims, power)
    return error / scale + normaliser


def scale_and_normaliser(gamma2: Tensor, num_dims: int, power: float) -> tuple[Tensor, Tensor]:
    """Return the divisor of the error in eq. 5 and the term added to it.

    They are p m, and D [ log(2 Gamma(1 + 1/p)) + log(p m) / p ].
    """
    scale = power * gamma2
    return scale, num_dims * (math.log(2) + math.lgamma(1 + 1 / power) + scale.log() / power)


def scaled(factor: Tensor | float, values: Tensor) -> Tensor:
    """Return factor * values, without a kernel launch if the factor is the number 1.

    In small networks every operation costs measurable time.
    """
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
