"""Priors of the latents, from which new images are generated.

A prior maps standard normal noise to latents. `poise.variants.PRIORS` lists the priors by name.

GEN-1 draws z ~ N(0, I) (`normal`). The aggregate posterior of the training images differs from it.
GEN-2 draws z from a second VAE, trained on the codes (`second_stage`; Dai & Wipf 2019).
GEN-mixture draws z from a Gaussian mixture fitted to the codes (`mixture`). It is cheaper.
GEN-flow draws z by a flow, trained on the codes (`flow_prior`). It also learns latent maps.

Reading order: `base` (base class and renormalisation), then one module per prior.
"""

from poise.priors.base import (
    Prior,
    RenormalisedPrior,
    TrainedModel,
    fit_prior,
    make_prior,
    renormalisation_factor,
)
from poise.priors.flow_prior import FlowPrior
from poise.priors.mixture import MixturePrior, expectation_maximisation, fit_mixture
from poise.priors.normal import NormalPrior
from poise.priors.second_stage import SecondStagePrior

__all__ = [
    "FlowPrior",
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
