"""What the loss of stage 1 is made of: the VAE's own, or one of its deterministic rivals at equal capacity.

Every objective has two terms, each one value per image, summed over its dimensions, which a balance weighs and averages:

    loss = mean over images of [ SE / (2 gamma^2) + D/2 log(2 pi gamma^2) ] + kl_weight * mean penalty.              (1)

For the VAE the penalty is KL(q(z|x) || N(0, I)). The rivals decode z = mean of the encoder, without noise, and put in its place

    autoencoder   0                                                                                                 (2)
    rae-l2        latent |z|^2 / 2 + decoder |W|^2,        W: the decoder's weights                                  (3)
    rae-gp        latent |z|^2 / 2 + gradient |dD(z)/dz|^2,        D: the decoder, |.|^2 the sum over all entries    (4)
    wae-mmd       weight MMD^2(z, N(0, I)), one number for the whole batch.                                          (5)

With the balance "fixed:gamma2=0.5" the first term is SE and a constant, which is how the rivals were published: (3) and (4) in
Ghosh et al. 2020, arXiv 1903.12436, section 3 (beta is `latent`, lambda `decoder` or `gradient`), (5) in Tolstikhin et al.
2018, arXiv 1711.01558, eq. 4 and algorithm 2. Any other balance may be used; a computed one keeps the penalty in proportion to
the error, as it does with KL. The autoencoder has nothing to balance: there a balance only scales the loss.

`LossTerms.kl` is the penalty. The balance sees errors, penalties and sums in float32 also under autocast.
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
from poise.balance.contract import at_least_float32
from poise.errors import InputError
from poise.shapes import Latents, PerImage, Scalar, Values
from poise.support.specs import make_named
from poise.vae import VAE, as_posterior

VANISHING = math.log(
    1e-12
)  # the log variance of codes that have none: 1e-6 of the width of N(0, I)
IMQ_SCALES = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)


@runtime_checkable
class Objective(Protocol):
    """A function of a network, a balance, a batch and noise.

    Attributes:
        deterministic: whether codes are points: there is no posterior, no KL, no likelihood.
        alone: whether it needs the whole batch in one process.
    """

    deterministic: ClassVar[bool]
    alone: ClassVar[bool]

    def __call__(self, vae: VAE, balance: Balance, batch: Values, noise: Latents) -> LossTerms:
        """The loss of a batch (n, ...), with standard normal noise (n, latents)."""
        ...


def make_objective(spec: str) -> Objective:
    """The objective that a short text names, written as a balance is (see `poise.balance.make_balance`).

    Args:
        spec: "vae", "autoencoder", "rae-l2", "rae-gp", "wae-mmd", the last three with options: "rae-l2:latent=0.01,decoder=0".

    Raises:
        InputError: unknown name or option, or a value that is not a finite number >= 0.

    Example:
        >>> make_objective("wae-mmd:weight=100")
        MaximumMeanDiscrepancy(weight=100)
    """
    return _make(spec)


@cache  # it is asked for at every step
def _make(spec: str) -> Objective:
    return make_named("objective", OBJECTIVES, spec)


def is_deterministic(spec: str) -> bool:
    """Whether codes under this objective are points, without a posterior."""
    return make_objective(spec).deterministic


@final
@dataclass(frozen=True)
class EvidenceLowerBound:
    """The VAE's: a reconstruction from a posterior sample, and KL."""

    deterministic: ClassVar[bool] = False
    alone: ClassVar[bool] = False

    def __call__(self, vae: VAE, balance: Balance, batch: Values, noise: Latents) -> LossTerms:
        reconstruction, posterior = vae(batch, noise)
        with full_precision(batch):
            return balance(reconstruction, batch, posterior.mean, posterior.logvar)


@final
@dataclass(frozen=True)
class Autoencoder:
    """Reconstruction alone (eq. 2)."""

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
    """RAE-L2 (eq. 3): small codes, and a decoder of small weights.

    W is every weight matrix and kernel of the decoder, without biases and BatchNorm (the paper: all of its parameters; the
    released code: the kernels of its transposed convolutions).

    Args:
        latent: factor of |z|^2 / 2, >= 0.
        decoder: factor of |W|^2, >= 0.

    The released code (ParthaEth/Regularized_autoencoders-RAE-) minimises SE / D + b |z|^2 / L + w |W|^2 for D values and L
    latents, which is (3) times 1 / D at latent = 2 b D / L, decoder = w D. Its CIFAR-10 settings (b = 1e-3, w = 1e-6, L = 128)
    give the defaults, rounded; MNIST's (1e-4, 1e-7, L = 16, at 32x32) 0.013 and 1e-4, CelebA's (1e-4, 1e-7, L = 64) 0.038 and
    0.0012.
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
    """RAE-GP (eq. 4): small codes, and a decoder that changes little with them.

    |dD/dz|^2 is estimated from one random direction v in the space of images: E|v dD/dz|^2 is the sum over all entries for
    v ~ N(0, I). v is drawn from torch's global generator, which the training loop seeds at every step. Where BatchNorm joins
    the images of a batch, the derivative of the whole batch is meant. (The paper says |dD/dz|^2; the released code takes the
    mean over latents of the squared gradient of |D(z)|^2, along the image itself in place of v.)

    Args:
        latent: factor of |z|^2 / 2, >= 0.
        gradient: factor of |dD/dz|^2, >= 0.

    The defaults are the released CelebA settings (b = 1e-4, w = 1e-7, L = 64), as in `RegularisedByWeights`, with w D / L for
    `gradient`: what its w amounts to if images were random directions of the mean square 1/4. (Its CIFAR-10 settings have
    w = 0.)
    """

    latent: float = 0.04
    gradient: float = 2e-5
    deterministic: ClassVar[bool] = True
    alone: ClassVar[bool] = True  # BatchNorm over several processes has no second derivative

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
    """WAE-MMD (eq. 5): codes that, as a set, look like draws from N(0, I); the noise of the step is what they are held against.

    Args:
        weight: lambda, >= 0. The paper's is 10. (The released code, tolstikhin/wae, multiplies SE by 0.05, so that its 10 is
            200 here for values in [0, 1]; it also fits codes to the prior before training, and adds noise to images.)
    """

    weight: float = 10.0
    deterministic: ClassVar[bool] = True
    alone: ClassVar[bool] = True  # a sum over all pairs of the batch

    def __post_init__(self) -> None:
        check_weights(self)

    def __call__(self, vae: VAE, balance: Balance, batch: Values, noise: Latents) -> LossTerms:
        latents = vae.encode(batch).mean
        reconstruction = vae.decode(latents)
        with full_precision(batch):
            codes = at_least_float32(latents)
            penalty = self.weight * squared_mmd(codes, noise.to(codes.dtype))
            return _combine(balance, reconstruction, batch, penalty.expand(len(batch)))


OBJECTIVES: dict[str, Callable[..., Objective]] = {
    "vae": EvidenceLowerBound,
    "autoencoder": Autoencoder,
    "rae-l2": RegularisedByWeights,
    "rae-gp": RegularisedByGradient,
    "wae-mmd": MaximumMeanDiscrepancy,
}


def check_weights(objective: Any) -> None:
    """Raises InputError for a weight that is no finite number >= 0."""
    for field in fields(objective):
        value = getattr(objective, field.name)
        if not 0 <= value < math.inf:
            raise InputError(f"{field.name} must be a finite number >= 0, not {value}")


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """No autocast inside the block: sums and balances are float32, whatever the networks are."""
    return torch.autocast(like.device.type, enabled=False)


def _combine(
    balance: Balance, reconstruction: Values, batch: Values, penalty: PerImage
) -> LossTerms:
    return balance.combine(
        balance.error_per_image(reconstruction, batch), penalty, num_dims=batch[0].numel()
    )


def half_square(latents: Latents) -> PerImage:
    """|z|^2 / 2 of each image, in float32 or better."""
    return 0.5 * at_least_float32(latents).square().sum(1)


def weight_norm(network: nn.Module) -> Scalar:
    """|W|^2: the sum of squares of all weight matrices and kernels; biases and BatchNorm, of one dimension, are left out."""
    return torch.stack(
        [weight.square().sum() for weight in network.parameters() if weight.dim() > 1]
    ).sum()


def squared_slope(reconstruction: Values, latents: Latents, direction: Values) -> PerImage:
    """|v dD/dz|^2 of each image for a direction v of images, differentiable; averaged over v ~ N(0, I) it is |dD/dz|^2."""
    (slope,) = torch.autograd.grad(reconstruction, latents, direction, create_graph=True)
    return at_least_float32(slope).square().sum(1)


def squared_mmd(latents: Latents, draws: Latents) -> Scalar:
    """The squared maximum mean discrepancy of two sets of n >= 2 points each, estimated without bias: it may be negative.

        1/(n(n-1)) sum_{i != j} [ k(z_i, z_j) + k(u_i, u_j) ] - 2/n^2 sum_{i,j} k(z_i, u_j)

    with the inverse multiquadratics kernel k(x, y) = sum over scales s of C s / (C s + |x - y|^2), C = 2 L: the mean squared
    distance of two draws from N(0, I) in L dimensions. Source: Tolstikhin et al. 2018, algorithm 2 and section 4; the scales
    are the released code's.
    """
    n = len(latents)
    within = imq_kernel(latents, latents) + imq_kernel(draws, draws)
    apart = within.sum() - within.diagonal().sum()
    return apart / (n * (n - 1)) - 2 * imq_kernel(latents, draws).mean()


def imq_kernel(points: Latents, others: Latents) -> Tensor:
    """k(x, y) of each pair, (n, m)."""
    squares = points.square().sum(1)[:, None] + others.square().sum(1) - 2 * points @ others.T
    width = 2 * points.shape[1]
    return torch.stack([width * scale / (width * scale + squares) for scale in IMQ_SCALES]).sum(0)


@final
class Deterministic(nn.Module):
    """An encoder whose codes are points: a posterior of variance 1e-12 about another encoder's mean.

    Codes, reconstructions, priors and stage 2 then need not know. The other encoder's head for the log variance stays, so that
    parameters are as many as the VAE's; no gradient reaches it, and Adam leaves it alone.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Values) -> tuple[Tensor, Tensor]:
        mean = as_posterior(self.encoder(images)).mean
        return mean, torch.full_like(mean, VANISHING)
