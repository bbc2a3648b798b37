"""Standard normal prior, z ~ N(0, I): GEN-1."""

from typing import final

from poise.priors.base import Prior, TrainedModel
from poise.shapes import Latents, Noise


@final
class NormalPrior(Prior):
    """Draw latents z ~ N(0, I) (GEN-1).

    Args:
        latent_dim: number of latents.
    """

    std = 1.0

    def __init__(self, latent_dim: int) -> None:
        super().__init__()
        self.noise_dims = latent_dim

    @classmethod
    def fitted(cls, model: TrainedModel) -> "NormalPrior":
        return cls(model.latent_dim)

    def latents(self, noise: Noise) -> Latents:
        return noise
