"""Base class of all priors, functions that make a prior by name, and latent renormalisation.

Latent renormalisation. An autoencoder loses variance, by about its MSE, and so does stage 2.
Asperti & Trentin multiply the latents by one scalar, without centring. It gives them the standard
deviation t of the variance law of the codes (`poise.latent`):

    z <- z t / (mean over dimensions of the standard deviation of z).

For GEN-1 this is z <- z t. The released code measures the standard deviation over each generated
batch. Here it is measured over a reference draw of 10,000 latents (1,000 of a flow), so that image
i does not depend on the number of images.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from pkgutil import resolve_name
from typing import final

import torch
from torch import nn

from poise.errors import InputError
from poise.flow import Flow
from poise.latent import DiagonalGaussian, variance_law
from poise.recipes.settings import Generation
from poise.shapes import ClassOfEach, Latents, Noise, Scalar
from poise.support.seeds import REFERENCE_SEED, noise_per_image
from poise.vae import VAE
from poise.variants import SecondStage, find_prior

REFERENCE_DRAWS = 10_000
# The released rule renormalises if stage 2 lost more variance than this share of its MSE.
LOST_SHARE = 0.25


class Prior(nn.Module, ABC):
    """Map standard normal noise to latents. Base class of all priors.

    Priors in `poise.variants.PRIORS` also have a class method `fitted(model: TrainedModel)`.

    Attributes:
        noise_dims: number of columns of the noise.
        std: standard deviation of the latents. None: measured over a reference draw.
        reference_draws: number of latents of the reference draw.
    """

    noise_dims: int
    std: float | None = None
    reference_draws: int = REFERENCE_DRAWS

    @abstractmethod
    def latents(self, noise: Noise) -> Latents:
        """Return latents (n, latents) for standard normal noise (n, noise_dims)."""

    def of_class(self, label: int) -> "Prior":
        """Return the prior of one class, with the same noise.

        Args:
            label: position of the class among the classes of the training images.

        Raises:
            InputError: this prior takes no class.
        """
        raise InputError(
            "this prior takes no label: use the prior mixture, or the prior flow of a run that was "
            "trained with --labels --second flow"
        )


@dataclass(frozen=True)
class TrainedModel:
    """Hold the parts of a trained model from which a prior is made.

    Attributes:
        latent_dim: number of latents, >= 1.
        codes: function that returns the posteriors of the training images, (n, latents).
        second: stage 2, a VAE or a flow, or None.
        gamma2: decoder variance of a VAE as stage 2, for noise added to its output. None: no noise.
        generation: its solver of the flow is used.
        components: maximum number of mixture components, >= 1.
        seed: seed of all randomness in fitting.
        device: device on which a prior is fitted.
        labels: (n,), the classes of the training images. None: they are not known.
    """

    latent_dim: int
    codes: Callable[[], DiagonalGaussian]
    second: VAE | Flow | None = None
    gamma2: Scalar | None = None
    generation: Generation = field(default_factory=Generation)
    components: int = 10
    seed: int = 0
    device: str | torch.device = "cpu"
    labels: ClassOfEach | None = None

    @property
    def second_stage(self) -> SecondStage | None:
        """Kind of the second stage, or None."""
        return None if self.second is None else "flow" if isinstance(self.second, Flow) else "vae"


def make_prior(name: str, model: TrainedModel) -> Prior:
    """Return a prior by name, made from a trained model.

    Args:
        name: a key of `poise.variants.PRIORS`.
        model: the trained model.

    Raises:
        InputError: the name is unknown, or the prior needs a second stage of another kind than the
            model has.
    """
    named = find_prior(name)
    if named.second_stage not in (None, model.second_stage):
        raise InputError(
            f"the prior {name} needs a trained {named.second_stage} as second stage, "
            f"and this model has {'none' if model.second is None else 'another kind'}"
        )
    return resolve_name(named.home).fitted(model)


def fit_prior(name: str, codes: DiagonalGaussian, *, seed: int = 0) -> Prior:
    """Return a prior by name, fitted to codes.

    Args:
        name: a key of `poise.variants.PRIORS` that needs no second stage.
        codes: (n, latents), the posteriors of the training images.
        seed: seed of all randomness in fitting.

    Raises:
        InputError: the name is unknown, or the prior needs a second stage.

    Example:
        >>> codes = DiagonalGaussian(torch.randn(100, 2), torch.zeros(100, 2))
        >>> fit_prior("mixture", codes).noise_dims
        3
    """
    return make_prior(name, TrainedModel(codes.mean.shape[1], lambda: codes, seed=seed))


@final
class RenormalisedPrior(Prior):
    """Multiply the latents of another prior by a scalar.

    Args:
        prior: the other prior.
        factor: the scalar, from `renormalisation_factor`.
    """

    def __init__(self, prior: Prior, factor: float) -> None:
        super().__init__()
        self.prior, self.factor = prior, factor
        self.noise_dims = prior.noise_dims

    def latents(self, noise: Noise) -> Latents:
        return self.factor * self.prior.latents(noise)

    def of_class(self, label: int) -> Prior:
        return RenormalisedPrior(self.prior.of_class(label), self.factor)


def renormalisation_factor(
    prior: Prior,
    codes: DiagonalGaussian,
    *,
    released: bool = False,
    device: str | torch.device = "cpu",
) -> float:
    """Return the scalar that gives a prior's latents the standard deviation of the variance law.

    It is t over the mean standard deviation of the latents (see `poise.priors.base`), as in the
    released code. If the standard deviations of the latents differ, it exceeds 1 even for a prior
    that fits: by 4 % if they vary by 30 %.

    Args:
        prior: the prior whose latents are scaled.
        codes: (n, latents), the posteriors of the training images.
        released: use the released variance law (E[s] in place of E[s^2]).
        device: device of the prior.
    """
    target = variance_law(codes.mean, codes.logvar, released=released).mean().sqrt()
    if prior.std is not None:
        return float(target) / prior.std
    noise = noise_per_image(prior.reference_draws, prior.noise_dims, seed=REFERENCE_SEED)
    produced = prior.latents(noise.to(device)).cpu().double().std(0, correction=0).mean()
    return float(target / produced)
