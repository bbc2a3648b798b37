"""Generate images from a prior.

Reproducibility. Image i is a function of (seed, i). It has the same bits, however many images are
drawn and whichever is the first. A matrix product may round differently in a batch of another size.
So latents and images are computed in chunks with fixed bounds (0-99, 100-199, ...).

Image variance adjustment. Generated images have less variance than real ones. They are rescaled
about their mean image by (mean per-pixel standard deviation of real images) / (that of generated
images), and clipped to [0, 1].
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from poise.data.decoding import PixelMoments
from poise.priors import Prior
from poise.shapes import Images, Values
from poise.support.kernels import own_kernels
from poise.support.seeds import noise_per_image
from poise.vae import VAE

CHUNK = 100
ADJUSTMENT_DRAWS = 1_000


@dataclass(frozen=True)
class VarianceAdjustment:
    """Rescale images about a mean image, and clip them to [0, 1].

    Args:
        mean: (channels, height, width), the mean image.
        factor: standard deviation of real images over that of generated images.
    """

    mean: Tensor
    factor: float

    def __call__(self, images: Images) -> Images:
        return (self.mean + self.factor * (images - self.mean)).clamp(0, 1)


def fit_adjustment(images: Images, real_std: float) -> VarianceAdjustment:
    """Return the variance adjustment that gives generated images the variance of real ones.

    Args:
        images: generated images.
        real_std: mean per-pixel standard deviation of real images. The adjusted images have it
            before clipping.
    """
    moments = PixelMoments()
    moments.add(images)
    return VarianceAdjustment(images.mean(0), real_std / max(moments.std(), 1e-12))


def sample(vae: VAE, prior: Prior, count: int, *, seed: int = 0, first: int = 0) -> Values:
    """Generate images `first` to `first + count - 1` of a seed.

    Args:
        vae: the VAE, which is set to evaluation mode. It may decode other values than images.
        prior: prior of the latents.
        count: number of images, >= 1.
        seed: any integer. Image i of a seed is always the same image.
        first: index of the first image, >= 0, to generate a set in parts.

    Returns:
        The images, (count, ...), float32, on the CPU.
    """
    return torch.cat(list(sample_chunks(vae, prior, count, seed=seed, first=first)))


def sample_chunks(
    vae: VAE, prior: Prior, count: int, *, seed: int = 0, first: int = 0
) -> Iterator[Values]:
    """Yield the images of `sample` in chunks, so that any number fits into memory.

    Args:
        vae, prior, count, seed, first: see `sample`.
    """
    device = next(vae.parameters()).device
    vae.eval()
    starts = range(first - first % CHUNK, first + count, CHUNK)
    noise = noise_per_image(CHUNK, prior.noise_dims, seed, starts.start)
    for start in starts:
        with torch.no_grad(), own_kernels(device):
            images = vae.decode(prior.latents(noise.to(device))).float()
        # Drawn here, while an accelerator decodes.
        noise = noise_per_image(CHUNK, prior.noise_dims, seed, start + CHUNK)
        yield images.cpu()[max(first - start, 0) : first + count - start]
