"""From a prior to pictures. Image i is a function of (seed, i): the same bits whatever the number drawn, and from where.

Latents and images are computed in chunks at fixed places (0-99, 100-199, ...), since a matrix product may round differently
in a batch of another size.

Image variance adjustment: generated images vary less than real ones. They are rescaled about their mean image by (mean
per-pixel standard deviation of real images) / (that of produced ones) and clipped to [0, 1].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.data.decoding import PixelMoments
from poise.priors import Prior
from poise.shapes import Images, Values
from poise.support.seeds import noise_per_image
from poise.vae import VAE

CHUNK = 100
ADJUSTMENT_DRAWS = 1_000


@dataclass(frozen=True)
class VarianceAdjustment:
    """Rescales images about a mean image.

    Args:
        mean: (channels, height, width).
        factor: real over produced standard deviation.
    """

    mean: Tensor
    factor: float

    def __call__(self, images: Images) -> Images:
        return (self.mean + self.factor * (images - self.mean)).clamp(0, 1)


def fit_adjustment(images: Images, real_std: float) -> VarianceAdjustment:
    """The adjustment that gives `images` the mean per-pixel standard deviation `real_std`, before clipping."""
    moments = PixelMoments()
    moments.add(images)
    return VarianceAdjustment(images.mean(0), real_std / max(moments.std(), 1e-12))


def sample(vae: VAE, prior: Prior, count: int, *, seed: int = 0, first: int = 0) -> Values:
    """Images (or whatever the VAE decodes) number `first` to `first + count - 1` of a seed, on the CPU.

    Args:
        vae: used in evaluation mode.
        prior: where latents come from.
        count: how many images.
        seed: any integer; image i of a seed is always the same image.
        first: number of the first image, for drawing a set in parts.
    """
    return torch.cat(list(sample_chunks(vae, prior, count, seed=seed, first=first)))


def sample_chunks(
    vae: VAE, prior: Prior, count: int, *, seed: int = 0, first: int = 0
) -> Iterator[Values]:
    """What `sample` gives, in parts, so that any number fits into memory."""
    device = next(vae.parameters()).device
    vae.eval()
    starts = range(first - first % CHUNK, first + count, CHUNK)
    noise = noise_per_image(CHUNK, prior.noise_dims, seed, starts.start)
    for start in starts:
        with torch.no_grad():
            images = vae.decode(prior.latents(noise.to(device))).float()
        noise = noise_per_image(
            CHUNK, prior.noise_dims, seed, start + CHUNK
        )  # while a device of its own decodes
        yield images.cpu()[max(first - start, 0) : first + count - start]
