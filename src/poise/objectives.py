"""Objectives: the VAE loss, deterministic autoencoders of equal capacity, and flow matching.

An objective has two terms, each one value per image, summed over its dimensions. A balance weighs
and averages them:

    loss = mean over images of [ SE / (2 gamma^2) + D/2 log(2 pi gamma^2) ]
           + kl_weight * mean penalty.                                                          (1)

For the VAE the penalty is KL(q(z|x) || N(0, I)). The deterministic autoencoders decode z = mean of
the encoder, without noise. Their penalties are

    autoencoder   0                                                                             (2)
    rae-l2        latent |z|^2 / 2 + decoder |W|^2                                              (3)
    rae-gp        latent |z|^2 / 2 + gradient |dD(z)/dz|^2                                      (4)
    wae-mmd       weight MMD^2(z, N(0, I)), one number for the whole batch                      (5)

with the weights W of the decoder, the decoder D, and |.|^2 the sum over all entries.

Sources: Ghosh et al. 2020, arXiv 1903.12436, section 3, for (3) and (4); their beta is `latent`,
their lambda `decoder` or `gradient`. Tolstikhin et al. 2018, arXiv 1711.01558, eq. 4 and algorithm
2, for (5).

Choice of balance. With "fixed:gamma2=0.5" the first term is SE plus a constant, as published for
the autoencoders. Any other balance may be used. A computed balance keeps the penalty in proportion
to the error, as it does with the KL. The plain autoencoder has nothing to balance: there a balance
only scales the loss.

Flow matching (`poise.flow`) is for stage 2 only. Its error is that of the velocity, and it has no
penalty. A balance only scales its loss.

`LossTerms.kl` is the penalty. Errors, penalties and sums are float32 also under autocast.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, ClassVar, Protocol, final, runtime_checkable

import torch
from torch import Tensor, nn

from poise.balance import Balance, LossTerms
from poise.balance.inputs import at_least_float32
from poise.errors import InputError
from poise.flow import Flow
from poise.recipes.settings import FLOW_OBJECTIVE
from poise.shapes import Latents, Noise, PerImage, Scalar, Values
from poise.support.specs import make_named
from poise.vae import VAE, as_posterior

# Log variance of deterministic codes: their standard deviation is 1e-6.
DETERMINISTIC_LOGVAR = math.log(1e-12)
IMQ_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@runtime_checkable
class Objective(Protocol):
    """Interface of the objectives: return the loss of a network under a balance.

    Attributes:
        deterministic: whether the encoder is deterministic. It then has no posterior, no KL and no
            likelihood.
        alone: whether the whole batch must be in one process.
    """

    deterministic: ClassVar[bool]
    alone: ClassVar[bool]

    def __call__(self, network: Any, balance: Balance, batch: Values, noise: Noise, /) -> LossTerms:
        """Return the loss of a batch (n, ...), with standard normal noise (n, noise).

        The network is a `VAE` or, for flow matching, a `Flow`.
        """
        ...


def make_objective(spec: str) -> Objective:
    """Return the objective described by a short text.

    Args:
        spec: "vae", "autoencoder", "rae-l2", "rae-gp" or "wae-mmd", or "flow" for stage 2. Those
            with "-" take options, written as in `poise.balance.make_balance`:
            "rae-l2:latent=0.01,decoder=0".

    Raises:
        InputError: the name or an option is unknown, or a value is not a finite number >= 0.

    Example:
        >>> make_objective("wae-mmd:weight=100")
        MaximumMeanDiscrepancy(weight=100)
    """
    return _make(spec)


@cache  # called at every training step
def _make(spec: str) -> Objective:
    return FlowMatching() if spec == FLOW_OBJECTIVE else make_named("objective", OBJECTIVES, spec)


def is_deterministic(spec: str) -> bool:
    """Return whether the encoder is deterministic under this objective, without a posterior."""
    return make_objective(spec).deterministic


@final
@dataclass(frozen=True)
class EvidenceLowerBound:
    """Compute the VAE loss: reconstruction from a posterior sample, and KL."""

    deterministic: ClassVar[bool] = False
    alone: ClassVar[bool] = False

    def __call__(self, vae: VAE, balance: Balance, batch: Values, noise: Latents) -> LossTerms:
        reconstruction, posterior = vae(batch, noise)
        with full_precision(batch):
            return balance(reconstruction, batch, posterior.mean, posterior.logvar)


@final
@dataclass(frozen=True)
class Autoencoder:
    """Compute the loss of a plain autoencoder: reconstruction without a penalty (eq. 2)."""

    deterministic: ClassVar[bool] = True
    alone: ClassVar[bool] = False

    def __call__(self, vae: VAE, balance: Balance, batch: Values, noise: Latents) -> LossTerms:
        latents = vae.encode(batch).mean
        reconstruction = vae.decode(latents)
        with full_precision(batch):
            return _combine(balance, reconstruction, batch, latents.new_zeros(len(batch)))


@final
@dataclass(frozen=True)
class RegularisedByWeights:
    """Compute the loss of RAE-L2: penalise large codes and large decoder weights (eq. 3).

    W is every weight matrix and kernel of the decoder, without biases and BatchNorm. The paper
    takes all parameters of the decoder, the released code the kernels of its transposed
    convolutions.

    Args:
        latent: factor of |z|^2 / 2, >= 0.
        decoder: factor of |W|^2, >= 0.

    Raises:
        InputError: a factor is not a finite number >= 0.

    The released code (ParthaEth/Regularized_autoencoders-RAE-) minimises
    SE / D + b |z|^2 / L + w |W|^2 for D values and L latents. This is (3) times 1 / D, at
    latent = 2 b D / L and decoder = w D. Its settings amount to:

    - CIFAR-10 (b = 1e-3, w = 1e-6, L = 128): the defaults, rounded.
    - MNIST (b = 1e-4, w = 1e-7, L = 16, at 32x32): latent = 0.013, decoder = 1e-4.
    - CelebA (b = 1e-4, w = 1e-7, L = 64): latent = 0.038, decoder = 0.0012.
    """

    latent: float = 0.05
    decoder: float = 0.003
    deterministic: ClassVar[bool] = True
    alone: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_weights(self)

    def __call__(self, vae: VAE, balance: Balance, batch: Values, noise: Latents) -> LossTerms:
        latents = vae.encode(batch).mean
        reconstruction = vae.decode(latents)
        with full_precision(batch):
            penalty = self.latent * half_square(latents) + self.decoder * weight_norm(vae.decoder)
            return _combine(balance, reconstruction, batch, penalty)


@final
@dataclass(frozen=True)
class RegularisedByGradient:
    """Compute the loss of RAE-GP: penalise large codes and a steep decoder (eq. 4).

    |dD/dz|^2 is estimated from one random direction v ~ N(0, I) in the space of images:
    E|v dD/dz|^2 is the sum over all entries. v is drawn from torch's global generator, which the
    training loop seeds at every step. If BatchNorm couples the images of a batch, the derivative is
    that of the whole batch.

    The paper penalises |dD/dz|^2. The released code takes the mean over latents of the squared
    gradient of |D(z)|^2: its direction is the image itself in place of v.

    Args:
        latent: factor of |z|^2 / 2, >= 0.
        gradient: factor of |dD/dz|^2, >= 0.

    Raises:
        InputError: a factor is not a finite number >= 0.

    The defaults are the released CelebA settings (b = 1e-4, w = 1e-7, L = 64). `latent` is
    converted as in `RegularisedByWeights`. `gradient` is w D / L, the equivalent of w if images
    were random directions with mean square 1/4. The released CIFAR-10 settings have w = 0.
    """

    latent: float = 0.04
    gradient: float = 2e-5
    deterministic: ClassVar[bool] = True
    alone: ClassVar[bool] = True  # synchronised BatchNorm has no second derivative

    def __post_init__(self) -> None:
        check_weights(self)

    def __call__(self, vae: VAE, balance: Balance, batch: Values, noise: Latents) -> LossTerms:
        latents = vae.encode(batch).mean
        reconstruction = vae.decode(latents)
        with full_precision(batch):
            slope = squared_slope(reconstruction, latents, torch.randn_like(reconstruction))
            penalty = self.latent * half_square(latents) + self.gradient * slope
            return _combine(balance, reconstruction, batch, penalty)


@final
@dataclass(frozen=True)
class MaximumMeanDiscrepancy:
    """Compute the loss of WAE-MMD: penalise the MMD between the batch's codes and N(0, I) (eq. 5).

    The noise of the step serves as the sample of N(0, I).

    Args:
        weight: lambda of the paper, >= 0. The paper uses 10. The released code (tolstikhin/wae)
            multiplies SE by 0.05, so that its 10 is 200 here for values in [0, 1]. It also fits the
            codes to the prior before training, and adds noise to images.

    Raises:
        InputError: the weight is not a finite number >= 0.
    """

    weight: float = 10.0
    deterministic: ClassVar[bool] = True
    alone: ClassVar[bool] = True  # the MMD is a sum over all pairs of the batch

    def __post_init__(self) -> None:
        check_weights(self)

    def __call__(self, vae: VAE, balance: Balance, batch: Values, noise: Latents) -> LossTerms:
        latents = vae.encode(batch).mean
        reconstruction = vae.decode(latents)
        with full_precision(batch):
            codes = at_least_float32(latents)
            penalty = self.weight * squared_mmd(codes, noise.to(codes.dtype))
            return _combine(balance, reconstruction, batch, penalty.expand(len(batch)))


@final
@dataclass(frozen=True)
class FlowMatching:
    """Compute the loss of flow matching: the error of the velocity (eq. 2 of `poise.flow`)."""

    deterministic: ClassVar[bool] = False
    alone: ClassVar[bool] = False

    def __call__(self, flow: Flow, balance: Balance, batch: Latents, noise: Noise) -> LossTerms:
        codes, noise, labels = flow.separate(batch, noise)
        between, time, target = flow.target(codes, noise)
        velocity = flow(between, time, labels)
        with full_precision(batch):
            return _combine(balance, velocity, target, velocity.new_zeros(len(batch)))


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "vae": EvidenceLowerBound,
    "autoencoder": Autoencoder,
    "rae-l2": RegularisedByWeights,
    "rae-gp": RegularisedByGradient,
    "wae-mmd": MaximumMeanDiscrepancy,
}


def check_weights(objective: Any) -> None:
    """Check the weights of an objective.

    Raises:
        InputError: a weight is not a finite number >= 0.
    """
    for field in fields(objective):
        value = getattr(objective, field.name)
        if not 0 <= value < math.inf:
            raise InputError(f"{field.name} must be a finite number >= 0, not {value}")


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Disable autocast inside the block, so that sums and balances are float32."""
    return torch.autocast(like.device.type, enabled=False)


def _combine(
    balance: Balance, reconstruction: Values, batch: Values, penalty: PerImage
) -> LossTerms:
    error, num_dims = balance.errors(reconstruction, batch)
    return balance.combine(error, penalty, num_dims)


def half_square(latents: Latents) -> PerImage:
    """Return |z|^2 / 2 of each image, in float32 or better."""
    return 0.5 * at_least_float32(latents).square().sum(1)


def weight_norm(network: nn.Module) -> Scalar:
    """Return |W|^2, the sum of squares of all weight matrices and kernels.

    Biases and BatchNorm parameters, which have one dimension, are left out.
    """
    return torch.stack(
        [weight.square().sum() for weight in network.parameters() if weight.dim() > 1]
    ).sum()


def squared_slope(reconstruction: Values, latents: Latents, direction: Values) -> PerImage:
    """Return |v dD/dz|^2 of each image for a direction v in the space of images.

    The result is differentiable. Its mean over v ~ N(0, I) is |dD/dz|^2.
    """
    (slope,) = torch.autograd.grad(reconstruction, latents, direction, create_graph=True)
    return at_least_float32(slope).square().sum(1)


def squared_mmd(latents: Latents, draws: Latents) -> Scalar:
    """Return the unbiased estimate of the squared maximum mean discrepancy of two sets of points.

        1/(n(n-1)) sum_{i != j} [ k(z_i, z_j) + k(u_i, u_j) ] - 2/n^2 sum_{i,j} k(z_i, u_j)

    It may be negative. The kernel is the inverse multiquadratics kernel

        k(x, y) = sum over scales s of C s / (C s + |x - y|^2),        C = 2 L.

    C is the mean squared distance of two draws from N(0, I) in L dimensions.

    Args:
        latents, draws: (n, L) each, n >= 2.

    Source: Tolstikhin et al. 2018, algorithm 2 and section 4. The scales are those of the released
    code.
    """
    n = len(latents)
    within = imq_kernel(latents, latents) + imq_kernel(draws, draws)
    apart = within.sum() - within.diagonal().sum()
    return apart / (n * (n - 1)) - 2 * imq_kernel(latents, draws).mean()


def imq_kernel(points: Latents, others: Latents) -> Tensor:
    """Return the kernel k(x, y) of `squared_mmd` for each pair of points, (n, m)."""
    squares = points.square().sum(1)[:, None] + others.square().sum(1) - 2 * points @ others.T
    width = 2 * points.shape[1]
    return torch.stack([width * scale / (width * scale + squares) for scale in IMQ_SCALES]).sum(0)


@final
class Deterministic(nn.Module):
    """Make an encoder deterministic: return its mean, with a posterior variance of 1e-12.

    So codes, reconstructions, priors and stage 2 need no special case. The wrapped encoder keeps
    its head for the log variance, so that the parameter count is that of the VAE. No gradient
    reaches this head, and Adam does not change it.

    Args:
        encoder: the encoder to wrap, which returns `(mean, logvar)`.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Values) -> tuple[Tensor, Tensor]:
        mean = as_posterior(self.encoder(images)).mean
        return mean, torch.full_like(mean, DETERMINISTIC_LOGVAR)
