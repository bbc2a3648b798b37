"""Images through an encoder in chunks of fixed size, so that no figure depends on a batch size."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from poise.data import gather
from poise.data.decoding import PixelMoments
from poise.errors import InputError
from poise.latent import DiagonalGaussian
from poise.shapes import Values
from poise.support.seeds import noise_per_image
from poise.vae import VAE

CHUNK = 100


def encode_all(vae: VAE, images: Any) -> DiagonalGaussian:
    """The posteriors of all images, (n, latents), float32 on the CPU; the networks in evaluation mode.

    Raises:
        InputError: there are none.
    """
    codes = list(encode_chunks(vae, images))
    return DiagonalGaussian(
        torch.cat([part.mean for part in codes]), torch.cat([part.logvar for part in codes])
    )


def encode_chunks(vae: VAE, images: Any) -> Iterator[DiagonalGaussian]:
    """What `encode_all` gives, in parts, so that any number of images can be encoded."""
    for _, posterior in posteriors(vae, images):
        yield DiagonalGaussian(posterior.mean.float().cpu(), posterior.logvar.float().cpu())


def posteriors(vae: VAE, images: Any) -> Iterator[tuple[Values, DiagonalGaussian]]:
    """Chunks of images and their posteriors, on the networks' device; the networks in evaluation mode.

    Raises:
        InputError: there are none.
    """
    if not len(images):
        raise InputError("there are no images to encode")
    device = next(vae.parameters()).device
    vae.eval()
    for start in range(0, len(images), CHUNK):
        batch = gather(images, range(start, min(start + CHUNK, len(images)))).to(device)
        with torch.no_grad():
            posterior = vae.encode(batch)
        yield batch, posterior


def encoded(vae: VAE, images: Any, seed: int) -> Iterator[tuple[Values, DiagonalGaussian, Tensor]]:
    """`posteriors`, and standard normal noise for one sample per image: image i's is a function of (seed, i)."""
    first = 0
    for batch, posterior in posteriors(vae, images):
        noise = noise_per_image(len(batch), posterior.mean.shape[1], seed, first).to(batch.device)
        first += len(batch)
        yield batch, posterior, noise


def pixel_std(images: Any) -> float:
    """Standard deviation of each dimension over all images, averaged over dimensions.

    Args:
        images: (n, channels, height, width), uint8 or float in [0, 1].
    """
    moments = PixelMoments()
    for start in range(0, len(images), CHUNK):
        moments.add(gather(images, range(start, min(start + CHUNK, len(images)))))
    return moments.std()
