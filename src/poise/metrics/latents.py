"""What the codes of a data set say about a model."""

from dataclasses import dataclass

from poise.latent import DiagonalGaussian, active_units, variance_law


@dataclass(frozen=True)
class LatentStatistics:
    """What the codes of a data set say.

    Attributes:
        variance_law: Var(mu) + E[s^2], mean over latents; 1 where the aggregate posterior fits the prior.
        noise_term: "E[s^2]", or "E[s]" for the released law.
        active_units: latents with Var(mu) > 0.01.
        latent_dim: latents in all.
    """

    variance_law: float
    noise_term: str
    active_units: int
    latent_dim: int


def latent_statistics(codes: DiagonalGaussian, *, released: bool = False) -> LatentStatistics:
    """The variance law (with E[s] for E[s^2] if `released`) and the number of active units of codes (n, latents)."""
    law = variance_law(codes.mean, codes.logvar, released=released)
    return LatentStatistics(float(law.mean()), "E[s]" if released else "E[s^2]", active_units(codes.mean), codes.mean.shape[1])
