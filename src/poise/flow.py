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

With classes c the network is v(z_t, t, c). In a share `DROPPED` of the items c is replaced by
"no class", so that one network learns the flow of each class and that of all codes. Guidance g
(`poise.priors.flow_prior`) goes further in the direction of the class:

    v(y, t, no class) + g (v(y, t, c) - v(y, t, no class)).                                     (4)

Sources: Lipman et al. 2023, arXiv 2210.02747, and Liu et al. 2023, arXiv 2209.03003, for (1) and
(2); Esser et al. 2024, arXiv 2403.03206, section 3.1, for the times; Ho & Salimans 2022, arXiv
2207.12598, for the dropped class and (4).
"""

import math
from typing import final

import torch
from torch import Tensor, nn

from poise.latent import DiagonalGaussian, channel_moments
from poise.shapes import Batch, ClassOfEach, Latents, Noise, PerImage

DROPPED = 0.1


@final
class Flow(nn.Module):
    """Velocity network of standardised codes, with the mean and standard deviation of the codes.

    Args:
        velocity: network that maps latents (n, L) and times (n,) to velocities (n, L). With
            classes it also takes the class of each, (n,), where `classes` stands for none.
        latent_shape: (L,), or (channels, height, width) of a latent map with L = c h w. Codes are
            standardised per latent, or per channel of the map.
        classes: number of classes. 0: the flow takes no class.

    Attributes:
        mean, std: of the codes, (L,).
        frequencies: share of each class among the codes, (classes,). Only with classes.
        noise_dims: columns of noise that eq. 1 needs for each code: L for n, and one for t. With
            classes, another one decides whether the class is dropped.
    """

    mean: Tensor
    std: Tensor
    frequencies: Tensor

    def __init__(
        self, velocity: nn.Module, latent_shape: tuple[int, ...], classes: int = 0
    ) -> None:
        super().__init__()
        latents = math.prod(latent_shape)
        self.velocity, self.latent_shape, self.classes = velocity, latent_shape, classes
        self.noise_dims = latents + 1 + (classes > 0)
        self.register_buffer("mean", torch.zeros(latents))
        self.register_buffer("std", torch.ones(latents))
        if classes:
            self.register_buffer("frequencies", torch.full((classes,), 1 / classes))

    def forward(
        self, latents: Latents, time: PerImage, labels: ClassOfEach | None = None
    ) -> Latents:
        """Return v for standardised latents (n, L) at times (n,).

        Args:
            latents, time: (n, L) and (n,).
            labels: the class of each, (n,). None: no class.
        """
        if not self.classes:
            return self.velocity(latents, time)
        if labels is None:
            labels = torch.full(latents.shape[:1], self.classes, device=latents.device)
        return self.velocity(latents, time, labels)

    def set_statistics(self, codes: DiagonalGaussian, labels: ClassOfEach | None = None) -> None:
        """Set `mean` and `std` to those of the aggregate posterior, and `frequencies`.

        Args:
            codes: (n, L), the posteriors of the training images.
            labels: (n,), the classes of the training images. Needed with classes.
        """
        if labels is not None and self.classes:
            self.frequencies.copy_(labels.bincount(minlength=self.classes) / len(labels))
        mean, variance = channel_moments(codes, self.latent_shape)
        repeats = len(self.mean) // len(mean)
        self.mean.copy_(mean.repeat_interleave(repeats))
        self.std.copy_(variance.sqrt().repeat_interleave(repeats))

    def separate(self, batch: Batch, noise: Batch) -> tuple[Latents, Noise, ClassOfEach | None]:
        """Return codes (n, L), noise for `target`, and the classes, a share of them dropped.

        Args:
            batch: codes (n, L). With classes (n, L + 1): the last column is the class.
            noise: (n, noise_dims), standard normal.
        """
        if not self.classes:
            return batch, noise, None
        dropped = torch.special.ndtr(noise[:, -1]) < DROPPED
        labels = torch.where(dropped, self.classes, batch[:, -1].long())
        return batch[:, :-1], noise[:, :-1], labels

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
