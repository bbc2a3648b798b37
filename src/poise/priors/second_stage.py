"""Second-stage prior, z = f(u) with u ~ N(0, I) and the decoder f of stage 2: GEN-2.

Source: Dai & Wipf 2019.
"""

from typing import final

import torch

from poise.priors.base import Prior, TrainedModel
from poise.shapes import Latents, Noise, Scalar
from poise.vae import VAE


@final
class SecondStagePrior(Prior):
    """Draw u ~ N(0, I) and decode it with stage 2 (GEN-2).

    Args:
        vae: the VAE of stage 2.
        latent_dim: number of latents of stage 1, and of stage 2.
        gamma2: decoder variance of stage 2, for noise added to its output (Dai & Wipf). None: no
            noise (the released code).
    """

    def __init__(self, vae: VAE, latent_dim: int, gamma2: Scalar | None) -> None:
        super().__init__()
        self.vae, self.latent_dim, self.gamma2 = vae, latent_dim, gamma2
        self.noise_dims = latent_dim if gamma2 is None else 2 * latent_dim

    @classmethod
    def fitted(cls, model: TrainedModel) -> "SecondStagePrior":
        assert isinstance(model.second, VAE)
        return cls(model.second, model.latent_dim, model.gamma2)

    @torch.no_grad()
    def latents(self, noise: Noise) -> Latents:
        mean = self.vae.eval().decode(noise[:, : self.latent_dim])
        if self.gamma2 is None:
            return mean
        return mean + self.gamma2.sqrt() * noise[:, self.latent_dim :]
