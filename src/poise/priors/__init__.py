"""Latent priors: the distributions that latents are drawn from.

A prior is a map from standard normal noise to latents. `poise.variants.PRIORS` lists them by name.

GEN-1 draws z ~ N(0, I) (`normal`). The aggregate posterior of the training images differs from it.
GEN-2 draws z from a second VAE that was trained on the codes (`second_stage`; Dai & Wipf 2019).
GEN-mixture draws z from a mixture of Gaussians fitted to the codes (`mixture`), which is cheaper.

In reading order: `base` (what every prior is, and its renormalisation), then one module a prior.
"""

from poise.priors.base import (
    LOST_SHARE,
    Prior,
    RenormalisedPrior,
    TrainedModel,
    fit_prior,
    make_prior,
    renormalisation_factor,
)
from poise.priors.mixture import MixturePrior, expectation_maximisation, fit_mixture
from poise.priors.normal import NormalPrior
from poise.priors.second_stage import SecondStagePrior

__all__ = [
    "LOST_SHARE",
    "MixturePrior",
    "NormalPrior",
    "Prior",
    "RenormalisedPrior",
    "SecondStagePrior",
    "TrainedModel",
    "expectation_maximisation",
    "fit_mixture",
    "fit_prior",
    "make_prior",
    "renormalisation_factor",
]
