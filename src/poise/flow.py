"""A flow that carries standard normal noise to codes, and its training target (flow matching).

For noise n ~ N(0, I), a standardised code z and a time t in [0, 1], let

    z_t = (1 - t) n + t z.                                                                      (1)

A network v is trained to minimise the mean, over codes, noise and times, of

    |v(z_t, t) - (z - n)|^2.                                                                    (2)

The minimum is v*(y, t) = E[z - n | z_t = y]. The solution of dy/dt = v*(y, t) that starts from
y ~ N(0, I) at t = 0 has the distribution of the codes at t = 1 (`poise.priors.FlowPrior`). For
codes N(m, S) the minimum is

    v*(y, t) = m + (t S - (1 - t) I) ((1 - t)^2 I + t^2 S)^-1 (y - t m).                        (3)

Times are t = sigmoid(u) with u ~ N(0, 1), so that times near 0 and 1 are rare.

Sources: Lipman et al. 2023, arXiv 2210.02747, and Liu et al. 2023, arXiv 2209.03003, for (1) and
(2); Esser et al. 2024, arXiv 2403.03206, section 3.1, for the times.
"""

import math
from typing import final

import torch
from torch import Tensor, nn

from poise.latent import DiagonalGaussian, variance_law
from poise.shapes import Latents, Noise, PerImage

LEAST_VARIANCE = 1e-12  # of the codes, so that constant latents can be standardised


@final
class Flow(nn.Module):
    """Velocity network of standardised codes, with the mean and standard deviation of the codes.

    Args:
        velocity: network that maps latents (n, L) and times (n,) to velocities (n, L).
        latent_shape: (L,), or (channels, height, width) of a latent map with L = c h w. Codes are
            standardised per latent, or per channel of the map.

    Attributes:
        mean, std: of the codes, (L,).
        noise_dims: columns of noise that eq. 1 needs for each code: L for n, and one for t.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, velocity: nn.Module, latent_shape: tuple[int, ...]) -> None:
        super().__init__()
        latents = math.prod(latent_shape)
        self.velocity, self.latent_shape, self.noise_dims = velocity, latent_shape, latents + 1
        self.register_buffer("mean", torch.zeros(latents))
        self.register_buffer("std", torch.ones(latents))

    def forward(self, latents: Latents, time: PerImage) -> Latents:
        """Return v for standardised latents (n, L) at times (n,)."""
        return self.velocity(latents, time)

    def set_statistics(self, codes: DiagonalGaussian) -> None:
        """Set `mean` and `std` to those of the aggregate posterior.

        Args:
            codes: (n, L), the posteriors of the training images.
        """
        by_channel = (self.latent_shape[0], -1)
        mean = codes.mean.mean(0, dtype=torch.float64)
        square = variance_law(codes.mean, codes.logvar) + mean.square()
        mean, square = (value.view(by_channel).mean(1) for value in (mean, square))
        std = (square - mean.square()).clamp_min(LEAST_VARIANCE).sqrt()
        repeats = len(self.mean) // len(mean)
        self.mean.copy_(mean.repeat_interleave(repeats))
        self.std.copy_(std.repeat_interleave(repeats))

    def target(self, codes: Latents, noise: Noise) -> tuple[Latents, PerImage, Latents]:
        """Return z_t and t of eq. 1, and the target z - n of eq. 2.

        Args:
            codes: (n, L), not standardised.
            noise: (n, L + 1), standard normal.
        """
        standardised = (codes - self.mean) / self.std
        start, time = noise[:, :-1], torch.sigmoid(noise[:, -1])
        between = torch.lerp(start, standardised, time[:, None])
        return between, time, standardised - start
